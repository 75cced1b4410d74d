"""Few wide branches or many narrow ones: test accuracy, barriers and convexity against I at equal size.

    python scripts/run.py --config=configs/architecture.py
    python scripts/run.py --config=configs/architecture.py:branch=vgg9,I=1/2/4,seeds=3
    python scripts/run.py --config=configs/architecture.py:I=1/4/16/64,seeds=3,num_examples=60000

The paper recommends many branches for the landscape; this asks what they cost in accuracy.  `branch=mlp`: one hidden
layer on MNIST, 64 units in all, which compute the same however they are divided, aligned over all units; `hidden=64/64`
has two layers.  `branch=vgg9`: VGG-9 on CIFAR-10, width 16 at I = 1.  Each network has about as many parameters as the
single branch.  Small by default: 5,000 images, one seed, surfaces over 1,000 of them.  Rates are those of
mnist_1layer.py and cifar_vgg9.py.  A minute of CPU time; VGG-9 wants a GPU.
"""

import dataclasses
from pathlib import Path

from dualgap_jax.config import ConfigError, component, experiment_config, load, parse_arg, spec_of
from dualgap_jax.data import DATASETS
from dualgap_jax.experiments.architecture import ArchitectureSpec
from dualgap_jax.experiments.landscape import LandscapeSpec
from dualgap_jax.experiments.planes import PlaneSpec
from dualgap_jax.networks import BRANCHES
from dualgap_jax.registry import unknown

# The config of the landscape, the setting that narrows, its value at I = 1, and what the figure calls it.
FAMILIES = {
    "mlp": ("mnist_1layer.py", "hidden", (64,), "MNIST, MLP"),
    "vgg9": ("cifar_vgg9.py", "width", 16, "CIFAR-10, VGG-9"),
}


def get_config(arg=None):
    args = parse_arg(arg, branch="mlp", I=(1, 4, 16), hidden=(64,), seed=0, seeds=1, num_examples=5000, smoke=False)
    if args.branch not in FAMILIES:
        raise ConfigError(unknown("branch", args.branch, FAMILIES))
    file, width, value, title = FAMILIES[args.branch]
    cell = spec_of(load(Path(__file__).with_name(file), f"I=1,seed={args.seed},smoke={args.smoke}"), LandscapeSpec)
    if args.branch == "mlp":
        value = args.hidden
    if args.smoke:
        value = (8,) * len(args.hidden) if args.branch == "mlp" else 8
    else:
        plane = PlaneSpec(points=31, samples=min(1000, args.num_examples))
        data = component(DATASETS, cell.data.name, **{**cell.data.settings, "num_examples": args.num_examples})
        training = dataclasses.replace(cell.training, max_steps=20_000)
        cell = dataclasses.replace(cell, data=data, plane=plane, training=training)
    branch = component(BRANCHES, args.branch, **{**cell.branch.settings, width: value})
    align = "units" if args.branch == "mlp" and len(value) == 1 else "branches"
    plane = dataclasses.replace(cell.plane, align=align)
    spec = ArchitectureSpec(
        title=f"{title}: accuracy and convexity at an equal number of parameters",
        num_branches=args.I[:2] if args.smoke else args.I,
        seeds=args.seeds,
        width=width,
        cell=dataclasses.replace(cell, branch=branch, plane=plane),
    )
    return experiment_config("architecture", spec)
