# ---
# jupyter:
#   accelerator: TPU
#   colab:
#     name: 01_quickstart.ipynb
#     provenance: []
#     toc_visible: true
#   jupytext:
#     formats: ipynb,py:percent
#     notebook_metadata_filter: accelerator,colab
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Three solutions, one plane, and how convex it looks
#
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/dualgap-jax/dualgap_jax/blob/main/notebooks/01_quickstart.ipynb)
#
# *Deep Neural Networks with Multi-Branch Architectures Are Intrinsically Less Non-Convex* (AISTATS 2019) draws the loss over
# the plane through three SGD solutions, and sees it grow more convex with the number of branches $I$ (Figure 1).  This
# notebook draws that picture on the synthetic data and turns "more convex" into numbers.

# %% [markdown]
# The first cell installs the package where it is missing, as on Colab, for the chip that it finds, and says what it did.

# %%
import glob
import importlib.util
import os
import subprocess
import sys

RELEASE = ""  # a tag, such as "v0.2.0"; "" is the newest version

if importlib.util.find_spec("dualgap_jax") is None:
    tpu = glob.glob("/dev/vfio/[0-9]*") + glob.glob("/dev/accel[0-9]*")
    chip = "tpu" if tpu else "cuda" if os.path.exists("/proc/driver/nvidia/version") else "cpu"
    extras = "report" if chip == "cpu" else f"report,{chip}"
    url = "git+https://github.com/dualgap-jax/dualgap_jax" + (f"@{RELEASE}" if RELEASE else "")
    print(f"found {chip}; installing dualgap_jax[{extras}] from {url}")
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", f"dualgap_jax[{extras}] @ {url}"], check=True)

import jax

import dualgap_jax as dg

print(f"dualgap_jax {dg.__version__}, jax {jax.__version__} on {jax.devices()[0].device_kind}")

# %%
import matplotlib.pyplot as plt
import numpy as np

from dualgap_jax import convexity, data, evaluation, landscape, training
from dualgap_jax.config import Component

# DUALGAP_SMOKE=1 runs everything in seconds, with fewer steps and points.
SMOKE = os.environ.get("DUALGAP_SMOKE") == "1"
MAX_STEPS, POINTS = (200, 9) if SMOKE else (40_000, 51)

# %% [markdown]
# ## A network is a mean of branches
#
# A branch is a pair of pure functions; `multi_branch` returns the same type.  Every parameter leads with the branch axis.

# %%
dataset = data.synthetic_relu(seed=1)
print(f"{len(dataset.y)} points in R^{dataset.x.shape[1]}, {dataset.info['positive_fraction']:.0%} labelled +1")

net = dg.multi_branch(dg.networks.mlp(hidden=(1,), out=1), 30)
params, state = net.init(jax.random.key(0), dataset.x[:1])
print(jax.tree.map(np.shape, params))

# %% [markdown]
# ## Three solutions
#
# Plain SGD from three seeds in one compiled program, hinge loss with $\tau = 1$, until the loss is below $10^{-5}$.  With the
# mean over branches each branch's gradient carries $1/I$, so the learning rate is scaled by $I$.

# %%
loss = dg.losses.binary_hinge(tau=1.0)
spec = training.TrainingSpec(
    batch_size=100,
    max_steps=MAX_STEPS,
    learning_rate=0.1,
    schedule=Component("plateau", {"patience": 20}),
)


def solve(num_branches):
    net = dg.multi_branch(dg.networks.mlp(hidden=(1,), out=1), num_branches)
    return net, training.train(net, loss, dataset, **spec.arguments(num_branches))


net, solutions = solve(30)
for s in solutions:
    full = evaluation.evaluate(net, loss, dataset, s.network)
    print(f"{s.status} after {s.steps} steps: loss {full.loss:.2e}, accuracy {full.accuracy:.3f}")

# %% [markdown]
# ## The plane through them

# %%
xs = np.linspace(-1, 1, POINTS)


def surface_of(net, solutions):
    plane = landscape.plane_through([s.network for s in solutions], axes="authors")
    surface = landscape.evaluate(net, loss, dataset, plane, xs, xs)
    t, edges = landscape.edges(net, loss, dataset, plane)
    # The hinge of the zero network is 1.
    return plane, surface, convexity.scores(xs, xs, surface.loss, zero_loss=1.0, edge_t=t, edge_losses=edges)


plane, surface, scores = surface_of(net, solutions)
figure, axes = plt.subplots(figsize=(4.6, 3.8))
filled = axes.contourf(surface.xs, surface.ys, surface.loss, levels=20)
axes.plot(*plane.anchors.T, "wo", markeredgecolor="black")
axes.set(xlabel="along $w_0 - w_1$", ylabel="along $w_0 - w_2$", aspect="equal", title="loss, I = 30")
figure.colorbar(filled)
figure.tight_layout()

# %% [markdown]
# ## How convex?
#
# The distance of the surface to its lower convex envelope is the two-dimensional analogue of the duality gap; it is zero for
# a convex surface.  `convexity.DEFINITIONS` says what each score means.

# %%
for name in (
    "envelope_max",
    "envelope_max_per_zero_loss",
    "envelope_max_per_range",
    "midpoint_violation_rate",
    "barrier_max",
):
    print(f"{name:28s} {getattr(scores, name):.4f}   {convexity.DEFINITIONS[name]}")

# %% [markdown]
# ## Against the number of branches

# %%
counts = [5, 20] if SMOKE else [10, 30, 70, 300]
table = {count: surface_of(*solve(count))[2] for count in counts}
figure, axes = plt.subplots(figsize=(4.6, 3.4))
axes.loglog(counts, [table[c].envelope_max for c in counts], "o-", label="largest envelope distance")
axes.loglog(counts, [table[c].barrier_max for c in counts], "s--", label="largest barrier")
axes.set(xlabel="number of branches I", ylabel="loss", xticks=counts, xticklabels=counts)
axes.legend()
figure.tight_layout()

# %% [markdown]
# In this regime (mean over branches, PyTorch initialisation, rate scaled by $I$) both fall from $I = 10$ to 70, in units of loss;
# what single seeds do beyond says little, and over five seeds both go on falling to $I = 1000$ (`dualgap run figure1:seeds=5`).  The
# picture depends on the regime: `configs/regimes.py` maps it.
