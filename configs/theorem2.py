"""Theorem 2: the certified global optimum of a regularised deep linear network, and SGD on the same network.

    python scripts/run.py --config=configs/theorem2.py
    python scripts/run.py --config=configs/theorem2.py:data=mnist
    python scripts/run.py --config=configs/theorem2.py:data=cifar10,H=3,gamma=5

data: random (Y = T X + noise), mnist, cifar10 (X: standardised pixels; Y: centred one-hot labels).  The
defaults of gamma and of the hidden width meet the conditions of the theorem.  EXPECT
"""

from dualgap_jax.config import Component, ConfigError, experiment_config, parse_arg
from dualgap_jax.experiments.linear_dual import DescentSpec, LinearDualSpec, smoke
from dualgap_jax.registry import unknown

GAMMA = {"random": 1.0, "mnist": 10.0, "cifar10": 5.0}
WIDTH = {"random": 10, "mnist": 9, "cifar10": 9}  # centred one-hot labels of ten classes have rank 9


def get_config(arg=None):
    args = parse_arg(arg, data="random", H=3, gamma=-1.0, width=0, seed=0, smoke=False)
    if args.data not in GAMMA:
        raise ConfigError(unknown("data", args.data, GAMMA))
    spec = LinearDualSpec(
        title=f"Theorem 2 on {args.data} data" if args.data == "random" else f"Theorem 2 on {args.data.upper()}",
        data=Component(args.data, {}),
        depth=args.H,
        width=args.width or WIDTH[args.data],
        gamma=GAMMA[args.data] if args.gamma == -1.0 else args.gamma,
        seed=args.seed,
        sgd=DescentSpec(),
    )
    return experiment_config("linear_dual", smoke(spec) if args.smoke else spec)
