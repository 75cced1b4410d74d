"""The authors' second program on CIFAR-10: I branches that are VGG-9 networks with batch norm; here its loss landscape.

    python scripts/run.py --config=configs/cifar_vgg9.py:I=4,width=8

As there: the mean over branches, cross-entropy, Nesterov momentum, pixels standardised by channel; the width of their
branches is 32.  Not as there: no augmentation, the rate (0.01 times I; theirs is an argument) and its schedule, that of
the other CIFAR-10 configs.  The paper shows no landscape of it: expect no number.  Convolutions are slow on a CPU, a
step of 128 images takes about two seconds at I = 4 and width 8 on two cores, so that a run to the end wants a GPU;
`:smoke` takes half a minute.
"""

import dataclasses

from dualgap_jax.config import component, experiment_config, parse_arg
from dualgap_jax.data import DATASETS
from dualgap_jax.experiments.landscape import LandscapeSpec, PlaneSpec, smoke
from dualgap_jax.losses import LOSSES
from dualgap_jax.networks import BRANCHES
from dualgap_jax.optimizers import OPTIMIZERS
from dualgap_jax.schedules import SCHEDULES
from dualgap_jax.training import TrainingSpec


def get_config(arg=None):
    args = parse_arg(arg, I=4, width=8, seed=0, smoke=False)
    spec = LandscapeSpec(
        title="CIFAR-10, VGG-9 branches, I = {I}",
        num_branches=args.I,
        seed=args.seed,
        branch=component(BRANCHES, "vgg9", width=args.width),
        data=component(DATASETS, "cifar10", standardise="channel"),
        loss=component(LOSSES, "logistic"),
        training=TrainingSpec(
            batch_size=128,
            max_steps=100_000,
            learning_rate=0.01,
            optimizer=component(OPTIMIZERS, "sgd", momentum=0.9, nesterov=True),
            check_every=400,
            schedule=component(SCHEDULES, "plateau", patience=3),
        ),
        plane=PlaneSpec(samples=2_000),
    )
    if args.smoke:
        spec = smoke(dataclasses.replace(spec, plane=PlaneSpec(samples=16)), num_examples=64)
        spec = dataclasses.replace(
            spec,
            branch=component(BRANCHES, "vgg9", width=min(args.width, 2)),
            training=dataclasses.replace(spec.training, batch_size=16, max_steps=4, check_every=2),
        )
    return experiment_config("landscape", spec)
