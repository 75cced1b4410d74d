"""Theorem 1: the duality gap for I = 1 to 100,000 branches, certified where it can be, beside the bound 2/I.

    python scripts/run.py --config=configs/theorem1.py
    python scripts/run.py --config=configs/theorem1.py:branch=tanh
    python scripts/run.py --config=configs/theorem1.py:branch=single_relu
    python scripts/run.py --config=configs/theorem1.py:branch=conv,data=mnist
    python scripts/run.py --config=configs/theorem1.py:branch=mixed

Branches (h(w) is the squared norm, W a ball): deep_relu, one unit in each of two hidden layers, no biases; tanh, the
same with tanh (inputs in R); single_relu, one hidden ReLU unit, where h is the norm, since with its square the value
function is linear and the gap 0; conv, a small convolutional net; mixed, half of the branches deep_relu and half of
them with a layer more, with one margin scale for both.  On synthetic data (in R^2; R for tanh) the first
three are certified: by the cells of one ReLU unit, and by branch and bound.  On images everything rests on a search:
estimated.

Expect `verified` in every certified row, a gap that falls like 1/I far below 2/I, and no trained network below the
lower bound on inf(P).  On two CPU cores the default run and conv take half a minute, tanh takes about two.
"""

from dualgap_jax.config import ConfigError, component, experiment_config, parse_arg
from dualgap_jax.data import DATASETS
from dualgap_jax.duality.branch_and_bound import BoundSpec
from dualgap_jax.duality.search import SearchSpec
from dualgap_jax.duality.trained import TrainedSpec
from dualgap_jax.experiments.duality_gap import DualityGapSpec
from dualgap_jax.networks import BRANCHES
from dualgap_jax.registry import unknown

NUM_BRANCHES = (1, 2, 3, 4, 5, 7, 10, 14, 20, 30, 50, 70, 100, 200, 300, 500, 1000, 3000, 10_000, 30_000, 100_000)
KINDS = ("deep_relu", "tanh", "single_relu", "conv", "mixed")
SOURCES = ("synthetic", "mnist", "cifar10")


def get_config(arg=None):
    args = parse_arg(arg, branch="deep_relu", data="synthetic", I=NUM_BRANCHES, seed=0, data_seed=0, smoke=False)
    for key, allowed in (("branch", KINDS), ("data", SOURCES)):
        if getattr(args, key) not in allowed:
            raise ConfigError(unknown(f"value of {key}:", getattr(args, key), allowed))
    if args.branch == "mixed" and args.data != "synthetic":
        raise ConfigError("branch=mixed is for data=synthetic.")
    if args.branch == "conv" and args.data == "synthetic":
        raise ConfigError("branch=conv needs images: data=mnist or data=cifar10.")
    images = args.data != "synthetic"
    kinds = {
        "deep_relu": component(BRANCHES, "mlp", hidden=(4, 4) if images else (1, 1), use_bias=False),
        "tanh": component(BRANCHES, "mlp", hidden=(4, 4) if images else (1, 1), activation="tanh", use_bias=False),
        "single_relu": component(BRANCHES, "mlp", hidden=(1,), use_bias=False),
        "conv": component(BRANCHES, "conv", channels=(2, 4)),
    }
    branch = kinds["deep_relu" if args.branch == "mixed" else args.branch]
    mixed = args.branch == "mixed"
    if images:
        data = component(DATASETS, args.data, num_examples=64 if args.smoke else 300)
        # Two convolutional branches in one call keep their patches in the processor's caches, 36 do not.
        effort = SearchSpec(
            budgets=6, starts=6, steps=40, sweeps=1, survivors=2, chunk=2 if args.branch == "conv" else 36
        )
    else:
        size = 40 if args.smoke else {"tanh": 30}.get(args.branch, 500)
        data = component(DATASETS, "synthetic_relu", n=size, d=1 if args.branch == "tanh" else 2, seed=args.data_seed)
        effort = SearchSpec(budgets=16, starts=64, steps=150, sweeps=2)
    if args.smoke:
        effort = SearchSpec(budgets=3, starts=4, steps=10, sweeps=1, survivors=2)
    spec = DualityGapSpec(
        title={
            "deep_relu": "Duality gap, deep ReLU branches",
            "tanh": "Duality gap, deep tanh branches",
            "single_relu": "Duality gap, branches of one ReLU unit",
            "conv": "Duality gap, convolutional branches",
            "mixed": "Duality gap, deep ReLU branches of two depths",
        }[args.branch],
        branch=branch,
        second=component(BRANCHES, "mlp", hidden=(1, 1, 1), use_bias=False),
        second_share=0.5 if mixed else 0.0,
        data=data,
        tau=1000.0 if args.branch == "conv" else 0.0,
        radius={"tanh": 3.0, "conv": 5.0}.get(args.branch, 2.0),
        budget_share=0.05 if args.branch == "tanh" else 0.381966,
        power=1.0 if args.branch == "single_relu" else 2.0,
        num_branches=args.I[:3] if args.smoke else args.I,
        grid=65 if args.smoke else (257 if images or mixed else 4097),
        search=effort,
        bound=BoundSpec(3e-4, 200 if args.smoke else 100_000),
        dual_bound=BoundSpec(1e-8, 200 if args.smoke else 300_000),
        fresh_samples=0 if args.branch == "conv" or mixed else (2 if args.smoke or images else 8),
        trained=TrainedSpec(
            num_branches=() if mixed else (1, 2) if args.smoke or images else (1, 2, 4, 8, 16, 32, 64),
            steps=20 if args.smoke else (200 if images else 2000),
            seeds=2 if args.smoke else (3 if images else 32),
        ),
        seed=args.seed,
    )
    return experiment_config("duality_gap", spec)
