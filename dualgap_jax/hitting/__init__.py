"""Table 1: thousands of independent SGD runs of one-hidden-layer networks in one program; how often do they hit?

In order: `runs` (what a run is), `random` (its draws), `weights` (at the start, and their loss), `block` (the compiled
work), `study` (all runs, packed, resumed), `minimum` (the global minimum that a hit is measured against).
"""

from dualgap_jax.hitting.minimum import GroundTruth, ground_truth
from dualgap_jax.hitting.runs import STATUSES, Outcome, Runs, SgdSpec, Weights, diverged, make_runs
from dualgap_jax.hitting.study import train_runs
from dualgap_jax.hitting.weights import full_loss, initial_weights

__all__ = [
    "STATUSES",
    "GroundTruth",
    "Outcome",
    "Runs",
    "SgdSpec",
    "Weights",
    "diverged",
    "full_loss",
    "ground_truth",
    "initial_weights",
    "make_runs",
    "train_runs",
]
