"""How convex a two-dimensional loss surface is, in numbers (Figures 1 and 4, where the paper judges by eye).

A surface is a grid of losses `loss [ny, nx]` over the plane's coordinates `xs [nx]`, `ys [ny]`.  There are four
families of scores: (a) the distance to the lower convex envelope, the two-dimensional analogue of the duality gap of
Theorem 1; (b) the rate of midpoint-convexity violations; (c) the sign and size of the negative curvature, after the
maps of |lambda_min / lambda_max| in Li et al., "Visualizing the Loss Landscape of Neural Nets" (NeurIPS 2018), here for
the Hessian of the surface in the plane; (d) the loss barriers along the edges between solutions.  `DEFINITIONS` states
each of them.

Host code: NumPy and SciPy in float64.
"""

from dualgap_jax.convexity.envelope import lower_convex_envelope
from dualgap_jax.convexity.hull import lower_hull
from dualgap_jax.convexity.measures import Curvature, Midpoints, barrier, curvature, midpoint_violations
from dualgap_jax.convexity.scores import DEFINITIONS, Scores, scores

__all__ = [
    "DEFINITIONS",
    "Curvature",
    "Midpoints",
    "Scores",
    "barrier",
    "curvature",
    "lower_convex_envelope",
    "lower_hull",
    "midpoint_violations",
    "scores",
]
