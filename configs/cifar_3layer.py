"""Figure 4, bottom row, one panel: three hidden layers 8-8-8 per branch on CIFAR-10 (I = 1, 3, 5, 50,000).

    python scripts/run.py --config=configs/cifar_3layer.py:I=5

    python scripts/run.py --config=configs/cifar_3layer.py:I=50000

The setting is that of cifar_1layer.py with deeper branches and rate 0.2 times I, or 0.02 times I for more than 100
branches, which larger rates send through spikes of the loss (at 50,000 branches 0.2 diverges within 41 steps).
I = 50,000 has 1.2e9 parameters, 5 GB in float32.  Where memory asks for it a network is trained by the streamed step,
in 1.2 times its bytes, and left on disk (two checkpoints of each of three solutions, 30 GB); the run says beforehand
what it will take.  On two cores that is five seconds a step: `--config.training.max_steps=80
--config.training.check_every=20 --config.plane.samples=512` is a run of half an hour.  Expect, at I = 5, training loss
0.17 and a largest envelope distance near 0.77 in loss.
"""

import dataclasses
from pathlib import Path

from dualgap_jax.config import experiment_config, load, spec_of
from dualgap_jax.experiments.landscape import LandscapeSpec


def get_config(arg=None):
    one_layer = spec_of(load(Path(__file__).with_name("cifar_1layer.py"), arg or ""), LandscapeSpec)
    branch, training = one_layer.branch, one_layer.training
    spec = dataclasses.replace(
        one_layer,
        title="CIFAR-10, three hidden layers, I = {I}",
        branch=dataclasses.replace(branch, settings={**branch.settings, "hidden": (8, 8, 8)}),
        training=dataclasses.replace(training, learning_rate=0.2 if one_layer.num_branches <= 100 else 0.02),
    )
    return experiment_config("landscape", spec)
