"""The lower convex hull of points in the plane."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int


def lower_hull(t: np.ndarray, z: np.ndarray) -> Int[np.ndarray, " k"]:
    """Indices of the vertices of the lower convex hull of the points (t, z), t strictly increasing (monotone chain).

    Raises:
      ValueError: for vectors of two lengths, t that does not increase, or a NaN.
    """
    t, z = np.asarray(t), np.asarray(z)
    if t.ndim != 1 or z.shape != t.shape or not (t[1:] > t[:-1]).all() or (z != z).any():
        raise ValueError(
            f"a lower hull needs t, strictly increasing, and z, two vectors of one length without a NaN; got shapes"
            f" {t.shape} and {z.shape}."
        )
    chain: list[int] = []
    ts, zs = t.tolist(), z.tolist()
    for c in range(len(ts)):
        while len(chain) >= 2:
            a, b = chain[-2], chain[-1]
            if (ts[b] - ts[a]) * (zs[c] - zs[a]) > (ts[c] - ts[a]) * (zs[b] - zs[a]):
                break
            chain.pop()
        chain.append(c)
    return np.array(chain, dtype=np.int64)
