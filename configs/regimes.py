"""The regimes behind Figure 1: init scale x learning-rate scaling x reduction x I against the convexity scores.

    python scripts/run.py --config=configs/regimes.py
    python scripts/run.py --config=configs/regimes.py:repeats=1,I=10/100

Each cell is synthetic_relu.py in another regime, repeated with other teachers, data and seeds.
"""

from pathlib import Path

from dualgap_jax.config import experiment_config, load, parse_arg, spec_of
from dualgap_jax.experiments.landscape import LandscapeSpec
from dualgap_jax.experiments.regimes import RegimesSpec


def get_config(arg=None):
    args = parse_arg(arg, I=(10, 30, 70, 1000), repeats=3, seed=0, smoke=False)
    cell = load(Path(__file__).with_name("synthetic_relu.py"), f"seed={args.seed},smoke={args.smoke}")
    spec = RegimesSpec(num_branches=args.I, repeats=args.repeats, cell=spec_of(cell, LandscapeSpec))
    if args.smoke:
        spec = RegimesSpec(inits=("torch",), reduces=("mean",), num_branches=args.I[:2], repeats=1, cell=spec.cell)
    return experiment_config("regimes", spec)
