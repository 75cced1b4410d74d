"""Figure 1, one panel: loss landscape on synthetic ReLU data (I = 10, 30, 70, 1000).

    python scripts/run.py --config=configs/synthetic_relu.py:I=10

1,000 points in R^10 labelled by a ReLU network with 11 hidden units; branches are single ReLU units with biases;
hinge, tau = 1.  `data_seed` draws the teacher and the points; at 0 the teacher gives 96 % of them one label, so 1 is
the default.

Regime: mean over branches, PyTorch initialisation with biases, rate 0.1 times I, batches of 100; all three solutions
reach loss 0 (mean over 100 steps below 1e-5) within 40,000 steps.  Expect, at I = 10, a largest envelope distance near
0.85 in loss and a largest barrier near 0.75; seeds matter.  20 seconds on two CPU cores.

`preset=authors` takes what is known of the authors' own figure: their loss (multi-margin of two outputs), their stop
rule (`plateau_authors`: single mini-batches), the window ±0.7 with 100 x 100 points, which shows one of the three
solutions.  Not known of it: their rate, branches, batch and data; those stay as above.
"""

import dataclasses

from dualgap_jax.config import ConfigError, component, experiment_config, parse_arg
from dualgap_jax.data import DATASETS
from dualgap_jax.experiments.landscape import LandscapeSpec, PlaneSpec, smoke
from dualgap_jax.losses import LOSSES
from dualgap_jax.networks import BRANCHES
from dualgap_jax.registry import unknown
from dualgap_jax.schedules import SCHEDULES
from dualgap_jax.training import TrainingSpec

PRESETS = ("paper", "authors")


def get_config(arg=None):
    args = parse_arg(arg, I=10, seed=0, data_seed=1, preset="paper", smoke=False)
    if args.preset not in PRESETS:
        raise ConfigError(unknown("preset", args.preset, PRESETS))
    spec = LandscapeSpec(
        title="Synthetic ReLU data, I = {I}",
        num_branches=args.I,
        seed=args.seed,
        branch=component(BRANCHES, "mlp", hidden=(1,)),
        data=component(DATASETS, "synthetic_relu", seed=args.data_seed),
        loss=component(LOSSES, "binary_hinge"),
        training=TrainingSpec(
            batch_size=100,
            max_steps=40_000,
            learning_rate=0.1,
            schedule=component(SCHEDULES, "plateau", patience=20),
        ),
    )
    if args.preset == "authors":
        spec = dataclasses.replace(
            spec,
            data=component(DATASETS, "synthetic_relu", seed=args.data_seed, labels="class"),
            loss=component(LOSSES, "multi_margin"),
            training=dataclasses.replace(spec.training, schedule=component(SCHEDULES, "plateau_authors")),
            plane=PlaneSpec(half_width=0.7, points=100),
        )
    return experiment_config("landscape", smoke(spec, n=64) if args.smoke else spec)
