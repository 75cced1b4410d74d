"""Figure 4, middle row, one panel: one-hidden-layer network on CIFAR-10 (I = 1, 3, 5, 100; h = 8 per branch).

    python scripts/run.py --config=configs/cifar_1layer.py:I=3

The setting is that of mnist_1layer.py on CIFAR-10 with rate 0.5 times I.  Expect, at I = 3, training loss 0.22 and a
largest envelope distance near 0.47 in loss.
"""

import dataclasses
from pathlib import Path

from dualgap_jax.config import experiment_config, load, spec_of
from dualgap_jax.experiments.landscape import LandscapeSpec


def get_config(arg=None):
    mnist = spec_of(load(Path(__file__).with_name("mnist_1layer.py"), arg or ""), LandscapeSpec)
    spec = dataclasses.replace(
        mnist,
        title="CIFAR-10, one hidden layer, I = {I}",
        data=dataclasses.replace(mnist.data, name="cifar10"),
        training=dataclasses.replace(mnist.training, learning_rate=0.5),
    )
    return experiment_config("landscape", spec)
