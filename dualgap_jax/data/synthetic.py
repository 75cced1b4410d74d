"""The synthetic ReLU data of Section 5.1: Gaussian points labelled by a random one-hidden-layer network."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from dualgap_jax import registry, seeds
from dualgap_jax.data.dataset import Dataset, validate
from dualgap_jax.sizes import positive

LABELS = ("sign", "class", "real")
_REAL = (int, float, np.number)
_MOST_SCALE = 1e30
_DRAWS_PER_EXAMPLE = 100  # synthetic_relu gives up after this many draws per example asked for


class Teacher(NamedTuple):
    """`f(x) = sum_i a_i max(0, w_i . x)` in float64: `a [width]`, `w [width, d]`."""

    a: np.ndarray
    w: np.ndarray


def relu_teacher(*, d: int = 10, teacher_width: int = 11, teacher_scale: float = 1.0, seed: int = 0) -> Teacher:
    """The one-hidden-layer ReLU network that labels `synthetic_relu` of the same arguments (Section 5.1).

    `w_ij ~ N(0, 1)` and `a_i ~ N(0, teacher_scale^2)`, independent.  The paper states no distribution.

    Raises:
      ValueError: for a size below 1, a scale that is not positive, finite and far within the range of float32, or a
        seed that `seeds.check` refuses.
    """
    d, teacher_width = positive(d, "d"), positive(teacher_width, "teacher_width")
    if not isinstance(teacher_scale, _REAL) or not 1 / _MOST_SCALE <= teacher_scale <= _MOST_SCALE:
        raise ValueError(
            f"teacher_scale must be positive and finite, from {1 / _MOST_SCALE:.0e} to {_MOST_SCALE:.0e}, so that"
            f" float32 holds the outputs; got {teacher_scale!r:.60}."
        )
    rng = seeds.generator(seed, 0)
    w = rng.standard_normal((teacher_width, d))
    return Teacher(a=teacher_scale * rng.standard_normal(teacher_width), w=w)


def teacher_outputs(teacher: Teacher, x: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " n"]:
    """`f(x)` for every row of `x`, in float64."""
    return np.maximum(x.astype(np.float64) @ teacher.w.T, 0.0) @ teacher.a


def teacher_std(teacher: Teacher) -> float:
    """The standard deviation of `f(x)` for `x ~ N(0, identity)`, in closed form.

    With u = w_i . x, v = w_j . x at angle t: `E[u+] = |w_i| / sqrt(2 pi)`,
    `E[u+ v+] = |w_i| |w_j| (sin t + (pi - t) cos t) / (2 pi)` (Cho and Saul 2009, arc-cosine kernel of degree 1).
    """
    norms = np.linalg.norm(teacher.w, axis=1)
    products = np.outer(norms, norms)
    cosine = np.clip(teacher.w @ teacher.w.T / products, -1.0, 1.0)
    angle = np.arccos(cosine)
    second = products * (np.sin(angle) + (np.pi - angle) * cosine) / (2 * np.pi)
    covariance = second - products / (2 * np.pi)
    return float(np.sqrt(teacher.a @ covariance @ teacher.a))


def synthetic_relu(
    *,
    n: int = 1000,
    d: int = 10,
    teacher_width: int = 11,
    teacher_scale: float = 1.0,
    seed: int = 0,
    labels: str = "sign",
    min_margin: float = 0.0,
) -> Dataset:
    """Gaussian points labelled by a random one-hidden-layer ReLU network (Section 5.1, Figure 1 and Table 1).

    `x ~ N(0, identity)`, rounded to float32 and not standardised; the teacher is `relu_teacher`, evaluated in float64.
    Teacher and points come from separate streams of `seed`: the teacher does not depend on `n` or `min_margin`, and
    the first rows of a longer data set are the shorter one.

    Args:
      n: number of examples.
      d: input dimension.
      teacher_width: hidden units of the teacher.
      teacher_scale: standard deviation of the teacher's output weights; `f` is proportional to it.
      seed: of teacher and points.
      labels: 'sign' for `y = sign f(x)` (binary), 'class' for the classes 1 and 0 of the same, for losses of two
        outputs, 'real' for `y = f(x)` (regression).
      min_margin: not with 'real', points with `|f(x)| <= min_margin * std(f)` are dropped and drawn again, std(f) being
        that of `teacher_std`.  At 0 this drops only points where f is exactly 0 (no unit active), which have no sign;
        so the teacher always separates the labels, and a multiple of it has hinge loss 0.

    Raises:
      ValueError: for an argument out of range, or when too few points of 100 n draws exceed the margin.
    """
    n = positive(n, "n")
    if labels not in LABELS:
        raise ValueError(registry.unknown("labels", labels, LABELS))
    if not isinstance(min_margin, _REAL) or not (math.isfinite(min_margin) and min_margin >= 0):
        raise ValueError(f"min_margin must be 0 or more and finite, got {min_margin!r}.")
    if labels == "real" and min_margin > 0:
        raise ValueError(f"min_margin={min_margin} needs labels='sign'; with labels='real' leave it at 0.")
    teacher = relu_teacher(d=d, teacher_width=teacher_width, teacher_scale=teacher_scale, seed=seed)
    threshold = -1.0 if labels == "real" else min_margin * teacher_std(teacher)
    rng = seeds.generator(seed, 1)
    points, outputs = [], []
    kept = drawn = 0
    while kept < n and drawn < _DRAWS_PER_EXAMPLE * n:
        x = rng.standard_normal((n, d)).astype(np.float32)
        f = teacher_outputs(teacher, x)
        keep = np.abs(f) > threshold
        points.append(x[keep])
        outputs.append(f[keep])
        kept += int(keep.sum())
        drawn += n
    if kept < n:
        raise ValueError(
            f"min_margin={min_margin} leaves only {kept} of {drawn} drawn points, {n} are needed:"
            " give a smaller min_margin, a wider teacher, or another seed."
        )
    x, f = np.concatenate(points)[:n], np.concatenate(outputs)[:n]
    y = (np.where(f > 0, 1.0, -1.0) if labels == "sign" else f).astype(np.float32)
    if labels == "class":
        y = (f > 0).astype(np.int32)
    info = {
        "source": "synthetic: x ~ N(0, 1), w_ij ~ N(0, 1), a_i ~ N(0, teacher_scale^2)",
        "num_examples": n,
        "d": d,
        "teacher_width": teacher_width,
        "teacher_scale": teacher_scale,
        "seed": seed,
        "labels": labels,
        "min_margin": min_margin,
        "teacher_std": teacher_std(teacher),
        "points_drawn": drawn,
        "positive_fraction": float((f > 0).mean()),
        "standardise": "none",
    }
    return validate(
        Dataset(
            name="synthetic_relu",
            x=x,
            y=y,
            mean=np.zeros(d, np.float32),
            std=np.ones(d, np.float32),
            num_outputs=2 if labels == "class" else 1,
            task={"sign": "binary", "class": "multiclass", "real": "regression"}[labels],
            info=info,
        )
    )
