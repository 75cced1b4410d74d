"""How far from the optimum?  Networks of I branches against F*, the least regularised risk over all of them.

    python scripts/run.py --config=configs/certify.py
    python scripts/run.py --config=configs/certify.py:loss=hinge
    python scripts/run.py --config=configs/certify.py:loss=squared,along=30
    python scripts/run.py --config=configs/certify.py:data=mnist,n=100,share=0.5,loss=squared

`along=30` follows the branches of a network of 30 under SGD: how much worse each is than the best possible branch.

Three regimes on synthetic data in R^2: tanh units with weight decay in a ball (branch and bound proves F*), chains of
three ReLU layers with a budget (cells), ReLU units with weight decay (cells).  On images (even against odd digits) only
the last, by the moment relaxation.  `share` is the weight decay over the least one at which the zero network is
optimal, and the budget over the squared radius.

Expect the best known risk of I branches to fall to F* faster than 1/I for tanh, like the sawtooth of 1/I for the chain,
and to be F* from a few branches on for ReLU units.  On two CPU cores the default run takes half a minute, images take
up to one for 1,000 examples and one and a half for 10,000.
"""

from dualgap_jax.certify import OptimumSpec
from dualgap_jax.config import ConfigError, component, experiment_config, parse_arg
from dualgap_jax.data import DATASETS
from dualgap_jax.experiments.certify import CertifySpec
from dualgap_jax.losses import LOSSES
from dualgap_jax.registry import unknown

NAMES = {"hinge": "binary_hinge", "logistic": "logistic", "squared": "squared"}
SOURCES = ("synthetic", "mnist", "cifar10")


def get_config(arg=None):
    args = parse_arg(
        arg, data="synthetic", loss="squared", n=16, share=0.1, I=(1, 2, 5, 10, 100, 1000), along=0, seed=0, smoke=False
    )
    for key, allowed in (("data", SOURCES), ("loss", NAMES)):
        if getattr(args, key) not in allowed:
            raise ConfigError(unknown(f"value of {key}:", getattr(args, key), allowed))
    images = args.data != "synthetic"
    n = 8 if args.smoke else args.n
    if images:
        data, regimes = component(DATASETS, args.data, num_examples=n, labels="parity"), ("two_layer",)
    else:
        data = component(DATASETS, "synthetic_relu", n=n, d=2, seed=args.seed + 1)
        regimes = ("chain", "two_layer") if args.smoke else ("tanh", "chain", "two_layer")
    spec = CertifySpec(
        data=data,
        loss=component(LOSSES, NAMES[args.loss]),
        regimes=regimes,
        share=args.share,
        num_branches=args.I[:2] if args.smoke else args.I,
        seeds=1 if args.smoke else 3,
        steps=20 if args.smoke else 500,
        optimum=OptimumSpec(units=4, rounds=1, steps=20, starts=4)
        if args.smoke
        else OptimumSpec(seconds=30.0 if images else 120.0),
        along=args.along,
        along_steps=100 if args.smoke else 10_000,
        seed=args.seed,
    )
    return experiment_config("certify", spec)
