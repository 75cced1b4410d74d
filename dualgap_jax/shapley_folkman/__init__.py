"""The Shapley-Folkman lemma in the plane, measured (Section 4 (a) and Figure 3).

For a compact set A the Minkowski average of n copies is `A_n = {(a_1 + ... + a_n) / n : a_j in A}`.  Its convex hull is
conv A for every n, and it approaches that hull.  The non-convexity measured here is the Hausdorff distance

    rho(n) = d_H(A_n, conv A) = max over x in conv A of dist(x, A_n).

The bound drawn beside it is the Shapley-Folkman theorem and Starr's refinement of it (R. M. Starr, "Quasi-equilibria in
markets with non-convex preferences", Econometrica 37 (1969), Appendix 2), divided by n, for n copies in dimension 2:

    rho(n) <= sqrt(min(n, 2)) / n * rad(A)    (circumradius: smallest disc around A),
    rho(n) <= sqrt(min(n, 2)) / n * r(A)      (inner radius: the largest, over x in conv A, of the least circumradius of
                                               a subset of A whose hull holds x).

Two kinds of sets, each with its own method; every result is a `Measured` that brackets the true number.

| kind | what A is | A_n | rho(n) |
|---|---|---|---|
| `LpBall` | `|x|^p + |y|^p <= radius^p` | boundary in closed form | closed form in n |
| `Pieces` | finite union of points, discs, segments, convex polygons | exact union of sums | branch and bound |

Host code: NumPy and SciPy in float64.  The work is set algebra on small arrays, k-d trees and Qhull, for which those
are the better tools.  Errors are proven up to float64 rounding.

In order: `measured` (what a set can be asked, and the bounds), `geometry`, `lp_ball`, `pieces`, `sets` (the table).
"""

from dualgap_jax.shapley_folkman.geometry import convex_hull, inner_radius, smallest_circle
from dualgap_jax.shapley_folkman.lp_ball import LpBall
from dualgap_jax.shapley_folkman.measured import Bounds, Measured, PlanarSet, Radii, SetError, Shape, bounds
from dualgap_jax.shapley_folkman.pieces import Piece, Pieces, disc, parse_piece, point, polygon, segment
from dualgap_jax.shapley_folkman.sets import SETS

__all__ = [
    "SETS",
    "Bounds",
    "LpBall",
    "Measured",
    "Piece",
    "Pieces",
    "PlanarSet",
    "Radii",
    "SetError",
    "Shape",
    "bounds",
    "convex_hull",
    "disc",
    "inner_radius",
    "parse_piece",
    "point",
    "polygon",
    "segment",
    "smallest_circle",
]
