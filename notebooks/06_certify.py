# ---
# jupyter:
#   accelerator: TPU
#   colab:
#     name: 06_certify.ipynb
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
# # How far from the optimum?
#
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/dualgap-jax/dualgap_jax/blob/main/notebooks/06_certify.ipynb)
#
# SGD has found a network.  How much better could *any* network of such branches do, of any width?  Weak duality answers with a proven
# number: for any dual vectors $\alpha_j$, one for each example, the regularised risk of every network is at least
# $-\frac1n\sum_j \ell_j^*(\alpha_j) + \min_w \varphi(w)$ with $\varphi(w) = \frac1n\sum_j \langle\alpha_j, f(w; x_j)\rangle + \lambda \|w\|^2$.
# So a global bound on *one* branch bounds all networks.

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
# DUALGAP_SMOKE=1 runs everything in seconds, smaller.
SMOKE = os.environ.get("DUALGAP_SMOKE") == "1"

# %%
import matplotlib.pyplot as plt
import numpy as np

from dualgap_jax import certify
from dualgap_jax.certify.trained import Network

# %% [markdown]
# ## A problem whose optimum can be proven
#
# Two classes in the plane, branches of one ReLU unit, squared loss, weight decay.  In the plane the best unit for given dual vectors is
# found exactly, by the arcs between the directions in which examples change sides.

# %%
rng = np.random.default_rng(0)
n = 12 if SMOKE else 30
x = rng.standard_normal((n, 2))
y = np.sign(np.sin(2 * x[:, 0]) + x[:, 1] + 0.3 * rng.standard_normal(n))
data = dg.data.from_arrays(x.astype(np.float32), y.astype(np.float32))
branch = dg.mlp(hidden=(1,), out=1, use_bias=False)
problem = certify.risk_problem(branch, data, dg.losses.squared(), penalty=0.01)
at_zero = float(problem.losses(np.zeros(problem.shape)).mean())
print(f"the zero network has risk {at_zero:.4f}")

# %% [markdown]
# ## A network that SGD trains, and its own certificate
#
# By its own dual vectors, the slopes of the loss at its outputs, the distance to the optimum is exactly the mean, over the branches, of
# how much worse each one is than the best possible branch.

# %%
branches, last = (8, 300) if SMOKE else (30, 20_000)
looks = sorted({0, *np.geomspace(1, last, 12 if SMOKE else 40).astype(int).tolist()})
start = 0.5 * rng.standard_normal((branches, problem.one.size))
path = list(Network(problem, branches).path(start, looks, rate=0.05, batch=n // 2))
trained = path[-1][1]
own = certify.distance(problem, trained)
print(own.as_text())
print(
    f"mean excess {own.excess.mean():.4f} + what scaling the dual vectors costs {own.fenchel:.4f} = gap {own.gap:.4f}"
)

# %% [markdown]
# ## The optimum from both sides
#
# A network's own dual vectors are pessimistic.  `optimum` looks for the best ones, and for the best measure of branches; in the plane
# both sides meet.  `verify_bound` proves the lower bound again with arithmetic of its own.

# %%
best = certify.optimum(
    problem, start=trained, spec=certify.OptimumSpec(units=12, rounds=3 if SMOKE else 20, starts=16, tolerance=1e-6)
)
checked = certify.verify_bound(problem, best.bound)
print(best.as_text())
print(f"proven again: {checked.holds}")
gap = certify.distance(problem, trained, alpha=best.alpha, estimate=False)
print(f"the trained network: {gap.as_text()}")

# %% [markdown]
# ## Which branches are bad, and when
#
# With the dual vectors of the optimum the excess of each branch can be followed through training: a line a branch, and their mean, which
# together with what the dual vectors lose against the network's own is the distance that is left.

# %%
along = certify.excess_along(problem, path, bound=best.bound)
figure, axes = plt.subplots(figsize=(5.2, 3.6), dpi=80)
axes.plot(along.steps + 1, np.maximum(along.excess, 1e-7) / at_zero, color="tab:gray", lw=0.6, alpha=0.6)
axes.plot(along.steps + 1, along.excess.mean(axis=1) / at_zero, lw=2, label="mean over branches")
axes.plot(along.steps + 1, along.gap / at_zero, "--", label="risk above the bound")
axes.set(xscale="log", yscale="log", xlabel="SGD step + 1", ylabel="excess, over the zero network's risk")
axes.legend()
assert np.allclose(along.gap, along.excess.mean(axis=1) + along.multiplier * along.slack + along.fenchel, atol=1e-9)

# %% [markdown]
# ## In higher dimension
#
# With more inputs the best unit cannot be enumerated; a relaxation in its first two moments bounds it, proven but looser.  What a search
# finds in the place of the proof is an estimate, and is called one.  On a finished run `dualgap certify WORKDIR` does all this for every
# network; [the documentation](https://github.com/dualgap-jax/dualgap_jax/blob/main/docs/certify.md) says what it covers and what not.

# %%
d = 6 if SMOKE else 20
x = rng.standard_normal((2 * n, d))
y = np.sign(np.maximum(x[:, 0], 0) - np.maximum(x[:, 1], 0) + 0.1 * rng.standard_normal(2 * n))
data = dg.data.from_arrays(x.astype(np.float32), y.astype(np.float32))
higher = certify.risk_problem(branch, data, dg.losses.logistic(), penalty=0.05)
found = certify.optimum(higher, spec=certify.OptimumSpec(units=16, rounds=2 if SMOKE else 6, starts=16))
print(found.as_text())
