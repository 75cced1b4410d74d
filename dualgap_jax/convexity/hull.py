"""The lower convex hull of points in the plane."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int


def lower_hull(t: np.ndarray, z: np.ndarray) -> Int[np.ndarray, " k"]:
    """Indices of the vertices of the lower convex hull of the points (t, z), t strictly increasing (monotone chain)."""
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
