"""Figure 1: loss landscapes on synthetic ReLU data for I = 10, 30, 70, 1000, and their convexity scores against I.

    python scripts/run.py --config=configs/figure1.py
    python scripts/run.py --config=configs/figure1.py:seeds=5,scale=common
    python scripts/run.py --config=configs/figure1.py:preset=authors
    python scripts/run.py --config=configs/figure1.py:I=2/5/10/20/50,seed=1,data_seed=3

Each panel is synthetic_relu.py at that I, in its regime; every solution converges.  Expect the envelope distance and
the barriers to fall with I in units of loss, and the rate of midpoint violations to rise: relative to the surface's own
range the wide landscape is not more convex.  A minute and a half on two CPU cores.
"""

from pathlib import Path

from dualgap_jax.config import experiment_config, load, parse_arg, spec_of
from dualgap_jax.experiments.landscape import LandscapeSpec
from dualgap_jax.experiments.row import RowSpec


def get_config(arg=None):
    args = parse_arg(arg, I=(10, 30, 70, 1000), seed=0, seeds=1, data_seed=1, scale="own", preset="paper", smoke=False)
    same = f"seed={args.seed},data_seed={args.data_seed},preset={args.preset},smoke={args.smoke}"
    cell = load(Path(__file__).with_name("synthetic_relu.py"), same)
    row = RowSpec(
        title="Loss landscapes on synthetic ReLU data",
        paper_item="Figure 1",
        num_branches=args.I[:2] if args.smoke else args.I,
        seeds=args.seeds,
        scale=args.scale,
        cell=spec_of(cell, LandscapeSpec),
    )
    return experiment_config("landscape_row", row)
