"""Figure 4: a row of loss landscapes on MNIST or CIFAR-10, and their convexity scores against I.

    python scripts/run.py --config=configs/figure4.py:row=mnist
    python scripts/run.py --config=configs/figure4.py:row=cifar_1layer
    python scripts/run.py --config=configs/figure4.py:row=cifar_3layer,I=1/3/5/1000

`seeds=3` repeats each I at as many seeds and gives the scores intervals; `scale=common` puts all panels on one scale.

Rows: mnist (top; I = 1, 3, 5, 100), cifar_1layer (middle; the same I), cifar_3layer (bottom; the paper's last I is
50,000: 5 GB of memory and 30 GB of disk; see cifar_3layer.py).  Each panel is the config of that row at that I.
Expect the envelope distance to fall with I on MNIST in units of loss, and not to fall on CIFAR-10, whose 50,000 images
small networks cannot fit; figure4_examples.py shows from where on it does.
"""

from pathlib import Path

from dualgap_jax.config import Absent, ConfigError, experiment_config, load, parse_arg, spec_of
from dualgap_jax.experiments.landscape import LandscapeSpec
from dualgap_jax.experiments.row import RowSpec
from dualgap_jax.registry import unknown

ROWS = {
    "mnist": ("mnist_1layer.py", "top row", "MNIST, one hidden layer", (1, 3, 5, 100)),
    "cifar_1layer": ("cifar_1layer.py", "middle row", "CIFAR-10, one hidden layer", (1, 3, 5, 100)),
    "cifar_3layer": ("cifar_3layer.py", "bottom row", "CIFAR-10, three hidden layers", (1, 3, 5, 50_000)),
}


def get_config(arg=None):
    args = parse_arg(arg, row="mnist", I=Absent((1, 3, 5)), seed=0, seeds=1, scale="own", smoke=False)
    if args.row not in ROWS:
        raise ConfigError(unknown("row", args.row, ROWS))
    file, item, title, counts = ROWS[args.row]
    counts = args.I or counts
    # One rate for the whole row: that of its largest I.
    cell = load(Path(__file__).with_name(file), f"I={max(counts)},seed={args.seed},smoke={args.smoke}")
    row = RowSpec(
        title=f"Loss landscapes on {title}",
        paper_item=f"Figure 4, {item}",
        num_branches=counts[:2] if args.smoke else counts,
        seeds=args.seeds,
        scale=args.scale,
        cell=spec_of(cell, LandscapeSpec),
    )
    return experiment_config("landscape_row", row)
