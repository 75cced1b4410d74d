"""Figure 4, top row, one panel: one-hidden-layer network on MNIST (I = 1, 3, 5, 100; h = 8 per branch).

python scripts/run.py --config=configs/mnist_1layer.py:I=100

Ten-class hinge in the authors' form, pixels standardised one by one over the training set.  Regime: mean over
branches, PyTorch initialisation with biases, rate 1 times I, batches of 128.  The plateau schedule with the mean loss
of 250 steps and a patience of three: every run ends by itself, 'converged' (loss below 1e-5) or 'plateau' (the loss no
longer falls at a thousandth of the rate).  Expect, at I = 100, training loss below 1e-4 and a largest envelope distance
near 0.075 in loss, a low hill at the mean of the three solutions; at I = 1, 0.022 and 0.42.
"""

from dualgap_jax.config import component, experiment_config, parse_arg
from dualgap_jax.data import DATASETS
from dualgap_jax.experiments.landscape import LandscapeSpec, smoke
from dualgap_jax.losses import LOSSES
from dualgap_jax.networks import BRANCHES
from dualgap_jax.schedules import SCHEDULES
from dualgap_jax.training import TrainingSpec


def get_config(arg=None):
    args = parse_arg(arg, I=100, seed=0, smoke=False)
    spec = LandscapeSpec(
        title="MNIST, one hidden layer, I = {I}",
        num_branches=args.I,
        seed=args.seed,
        branch=component(BRANCHES, "mlp", hidden=(8,)),
        data=component(DATASETS, "mnist"),
        loss=component(LOSSES, "multi_margin"),
        training=TrainingSpec(
            batch_size=128,
            max_steps=100_000,
            learning_rate=1.0,
            check_every=250,
            schedule=component(SCHEDULES, "plateau", patience=3),
        ),
    )
    return experiment_config("landscape", smoke(spec, num_examples=256) if args.smoke else spec)
