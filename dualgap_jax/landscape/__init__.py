"""Loss surfaces over a plane in parameter space (Section 5.1, Figures 1 and 4).

A plane is `w(a, b) = origin + a u + b v`.  The first linear map of a network is linear in its parameters, so its
pre-activations are affine in (a, b): three matrix products serve the whole grid, and each further point costs only the
small layers above.  A network that names no stem is evaluated in full at every point.

Branches meet only in the sum of their outputs.  So a network of `multi_branch` is taken block by block: a block of
branches goes through all points, adds to the outputs kept for each point and sample, and is dropped.  The solutions
may therefore lie on disk, three networks of any size, and are read once for the whole grid; the values are those of
solutions in memory, bit for bit, because one program does both.

Branches and hidden units may change places without changing what a network computes: `align` takes solutions through
such permutations as near to one another as they come, so that a plane through them shows one valley.

What planes do not show: `hessian` (the curvature in all directions at one network), `trajectory` (the path of training
in the plane of its main directions), `curve` (a low way from one solution to another).  `save_vts` and `save_vtp` hand
surfaces and paths to ParaView.
"""

from dualgap_jax.landscape.alignment import Alignment, align, exchangeable
from dualgap_jax.landscape.controls import Controls, controls
from dualgap_jax.landscape.curves import Curve, curve
from dualgap_jax.landscape.planes import AXES, Block, Plane, at, plane_through, random_plane
from dualgap_jax.landscape.points import ACCUMULATOR_BYTES, ROUTES, evaluate_points
from dualgap_jax.landscape.products import DegeneratePlaneError
from dualgap_jax.landscape.spectrum import Spectrum, hessian
from dualgap_jax.landscape.statistics import STATES, has_statistics
from dualgap_jax.landscape.surfaces import Surface, Survey, edges, evaluate, survey
from dualgap_jax.landscape.trajectories import Trajectory, trajectory
from dualgap_jax.landscape.vtk import save_vtp, save_vts

__all__ = [
    "ACCUMULATOR_BYTES",
    "AXES",
    "ROUTES",
    "STATES",
    "Alignment",
    "Block",
    "Controls",
    "Curve",
    "DegeneratePlaneError",
    "Plane",
    "Spectrum",
    "Surface",
    "Survey",
    "Trajectory",
    "align",
    "at",
    "controls",
    "curve",
    "edges",
    "evaluate",
    "evaluate_points",
    "exchangeable",
    "has_statistics",
    "hessian",
    "plane_through",
    "random_plane",
    "save_vtp",
    "save_vts",
    "survey",
    "trajectory",
]
