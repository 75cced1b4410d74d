"""Figure 4 against the number of training images: from where on the barriers fall with I.

    python scripts/run.py --config=configs/figure4_examples.py:row=cifar_1layer
    python scripts/run.py --config=configs/figure4_examples.py:row=cifar_3layer,examples=2000,I=1/3/5/30,seeds=3

Rows as in figure4.py; every landscape twice, through the solutions as trained and aligned modulo symmetry.  `examples=`
images each (0: all), `seeds=` independent repetitions.  Expect barriers to rise with I while the networks cannot fit
the images and to fall from where they can.
"""

import dataclasses
from pathlib import Path

from dualgap_jax.config import experiment_config, load, parse_arg, spec_of
from dualgap_jax.experiments.examples import ExamplesSpec
from dualgap_jax.experiments.row import RowSpec


def get_config(arg=None):
    args = parse_arg(
        arg, row="cifar_1layer", examples=(2000, 10_000, 50_000), I=(1, 3, 5, 30, 100), seeds=1, seed=0, smoke=False
    )
    counts = "/".join(map(str, args.I))
    row = load(Path(__file__).with_name("figure4.py"), f"row={args.row},I={counts},seed={args.seed},smoke={args.smoke}")
    row = spec_of(row, RowSpec)
    align = "units" if len(row.cell.branch.settings["hidden"]) == 1 else "branches"
    spec = ExamplesSpec(
        title=row.title.replace("Loss landscapes", "Barriers"),
        paper_item=row.paper_item,
        num_examples=(128, 256) if args.smoke else args.examples,
        num_branches=row.num_branches,
        seeds=args.seeds,
        cell=dataclasses.replace(row.cell, plane=dataclasses.replace(row.cell.plane, align=align)),
    )
    return experiment_config("landscape_examples", spec)
