"""Stochastic gradient descent from several initialisations, in memory or streamed over branches, with exact resume.

The loop runs in segments of `check_every` steps.  Whatever is random at step t is a function of (seed, solution, t), so
a resumed run repeats the uninterrupted one bit for bit.

In order: `spec` (what a config says), `batches` (the data and their order), `engine` (what the loop asks of whoever
takes the steps), `together` and `branch_step`, `placement`, `streamed` (the two engines), `plan` (estimates), `resume`,
`loop`, and `door` (`train`).
"""

from dualgap_jax.training.door import Solution, solution_key, train
from dualgap_jax.training.spec import LearningRateScaling, TrainingSpec, num_branches, scaled_learning_rate

__all__ = [
    "LearningRateScaling",
    "Solution",
    "TrainingSpec",
    "num_branches",
    "scaled_learning_rate",
    "solution_key",
    "train",
]
