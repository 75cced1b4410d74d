"""Theorem 2: the certified global optimum of a regularised deep linear network, and SGD on the same network.

    python scripts/run.py --config=configs/theorem2.py
    python scripts/run.py --config=configs/theorem2.py:data=mnist
    python scripts/run.py --config=configs/theorem2.py:data=cifar10,H=3,gamma=5

data: random (Y = T X + noise), mnist, cifar10 (X: standardised pixels; Y: centred one-hot labels).  The
defaults of gamma and of the hidden width meet the conditions of the theorem.  Expect relative gaps of 1e-15 (random,
float64) to 1e-10 (images), the fast factorisation on CIFAR-10 and the accurate one, in float64, on MNIST, whose X is
rank deficient; SGD with H = 2 and 3 reaches the optimum on random data, H = 5 does not, and on CIFAR-10 none does in
5,000 steps.
"""

from dualgap_jax.config import Absent, ConfigError, component, experiment_config, parse_arg
from dualgap_jax.data import DATASETS
from dualgap_jax.experiments.linear_dual import MATRICES, DescentSpec, LinearDualSpec, smoke
from dualgap_jax.registry import unknown

GAMMA = {"random": 1.0, "mnist": 10.0, "cifar10": 5.0}
TITLE = {"random": "random data", "mnist": "MNIST", "cifar10": "CIFAR-10"}
WIDTH = {"random": 10, "mnist": 9, "cifar10": 9}  # centred one-hot labels of ten classes have rank 9


def get_config(arg=None):
    args = parse_arg(arg, data="random", H=3, gamma=Absent(1.0), width=Absent(10), seed=0, smoke=False)
    if args.data not in GAMMA:
        raise ConfigError(unknown("data", args.data, GAMMA))
    spec = LinearDualSpec(
        title=f"Theorem 2 on {TITLE[args.data]}",
        data=component(MATRICES if args.data in MATRICES else DATASETS, args.data),
        depth=args.H,
        width=WIDTH[args.data] if args.width is None else args.width,
        gamma=GAMMA[args.data] if args.gamma is None else args.gamma,
        seed=args.seed,
        sgd=DescentSpec(),
    )
    return experiment_config("linear_dual", smoke(spec) if args.smoke else spec)
