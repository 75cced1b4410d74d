# ---
# jupyter:
#   accelerator: TPU
#   colab:
#     name: 02_theorem1.ipynb
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
# # Theorem 1 on a branch of your own
#
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/dualgap-jax/dualgap_jax/blob/main/notebooks/02_theorem1.ipynb)
#
# Theorem 1 bounds the duality gap of a network that averages $I$ branches by $(2/I)\,\Delta$.  One value function, that of a
# *single* branch, gives the gap for every $I$.  Here the branch is $a \tanh(u \cdot x)$, written as two functions; everything is
# proven by interval branch and bound.

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
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from dualgap_jax import duality
from dualgap_jax.duality.branch_and_bound import BoundSpec
from dualgap_jax.duality.theorem import Effort, theorem1

# %% [markdown]
# ## The branch and the problem
#
# `init` draws parameters, `apply` gives `[batch, 1]`.  `radius` is that of the set W of weights; with `|a| < tau` no margin exceeds
# `tau`, which is Assumption 1.

# %%


def init(key, x):
    return {"a": jnp.ones(()), "u": jax.random.normal(key, x.shape[1:])}


def apply(params, x):
    return params["a"] * jnp.tanh(x @ params["u"])[:, None]


rng = np.random.default_rng(0)
n = 12 if SMOKE else 40
x = rng.standard_normal((n, 2)).astype(np.float32)
y = np.where(np.tanh(3 * x[:, 0]) + 0.5 * x[:, 1] > 0, 1, -1)
data = dg.data.from_arrays(x, y, task="binary")
problem = duality.branch_problem(dg.from_functions(init, apply), data, tau=1.0, radius=0.9, power=1.0)
print(f"{problem.size} parameters a branch, {n} examples")

# %% [markdown]
# ## Gap and bound
#
# The budget is the bound on the mean of $\|w_i\|$ (`power=1`).

# %%
counts = (1, 2, 5, 10, 100, 1000)
tolerance = 3e-2 if SMOKE else 3e-3
effort = Effort(bound=BoundSpec(tolerance, 20_000), dual=BoundSpec(tolerance / 10, 20_000))
budget = problem.grid(65)[20]
found = theorem1(problem, budget, counts, points=65, effort=effort)
for row in found.rows:
    low, high = max(row.gap_lower, 0.0), row.gap_upper
    print(
        f"I = {row.num_branches:>5,}: gap between {low:.2e} and {high:.2e}, bound (2/I) Delta at least"
        f" {row.bound * row.delta_lower:.2e} ({row.status}, {row.objective}): {'below' if row.holds else 'open'}"
    )

# %% [markdown]
# `certified`: every number on the way is proven.  The objective is the hinge without its maximum, which is the hinge itself where no
# margin exceeds tau (Assumption 1).  That is recognised for bias-free MLPs: this branch is one, and written so it gets the verdict.
# The upper bounds carry the tolerance of branch and bound: at $I = 1000$ it is larger than the bound of the theorem, so that row is open.

# %%
known = dg.mlp(hidden=(1,), out=1, activation="tanh", use_bias=False)
same = duality.branch_problem(known, data, tau=1.0, radius=0.9, power=1.0)
(row,) = theorem1(same, budget, 10, points=65, effort=effort).rows
print(f"I = 10: {row.verdict}, {row.status}, {row.objective}")

# %%
figure, axes = plt.subplots(figsize=(5, 3.2))
axes.loglog(counts, [row.bound * row.delta_lower for row in found.rows], "o-", label="(2/I) Delta, at least")
axes.loglog(counts, [row.gap_upper for row in found.rows], "s--", label="gap, at most")
axes.set(xlabel="number of branches I", ylabel="duality gap")
axes.legend()
figure.tight_layout()
