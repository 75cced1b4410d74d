# ---
# jupyter:
#   accelerator: TPU
#   colab:
#     name: 03_theorem2.ipynb
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
# # Theorem 2: the global optimum of a deep linear network
#
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/dualgap-jax/dualgap_jax/blob/main/notebooks/03_theorem2.ipynb)
#
# For deep linear networks with squared loss and the regulariser of problem (4), Theorem 2 says that the duality gap is zero.  So the
# global optimum is known, with a certificate: the difference of a primal and a dual value, which does not use the formula it checks.
# The certificate is valid outside the theorem's conditions too.  This notebook solves a problem, turns $\gamma$, and holds gradient descent against the optimum.

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

from dualgap_jax import spectral

# %% [markdown]
# ## One problem
#
# Columns are examples: `x [d_0, n]`, `y [d_H, n]`.  `widths` are the hidden layers.

# %%
GAMMA = 1.0
rng = np.random.default_rng(0)
n = 60 if SMOKE else 500
x = rng.standard_normal((12, n))
y = rng.standard_normal((8, 12)) @ x / 4 + 0.3 * rng.standard_normal((8, n))
solution = spectral.solve(x, y, gamma=GAMMA, widths=(6, 6))
print(
    f"optimum {float(solution.primal):.6f}, relative gap {float(solution.relative_gap):.1e}, rank {int(solution.rank)}"
)
print("the theorem applies" if solution.theorem_applies else solution.reasons())

# %% [markdown]
# The proof again, in NumPy alone, with every rounding allowed for:

# %%
proof = spectral.verify(
    [(x, y)],
    gamma=GAMMA,
    widths=(6, 6),
    weights=solution.weights,
    coefficients=solution.dual_variable.coefficients,
)
print(f"proven: the optimum lies between {proof.lower:.9f} and {proof.upper:.9f}")

# %% [markdown]
# ## What $\gamma$ does
#
# It is compared with the singular values of what can be fitted: those above it survive, less $\gamma$.  The rank falls as $\gamma$ passes them.

# %%
gammas = np.geomspace(0.05, 60, 20 if SMOKE else 60)
path = spectral.regularisation_path(x, y, gammas=gammas, widths=(6, 6))
figure, axes = plt.subplots(figsize=(5, 3.2))
axes.semilogx(gammas, np.asarray(path.rank), "o-", markersize=3)
axes.set(xlabel="gamma", ylabel="rank of the optimum")
figure.tight_layout()
print(f"largest relative gap on the path: {np.max(np.asarray(path.relative_gap)):.1e}")

# %% [markdown]
# ## Gradient descent against the optimum
#
# Gradient descent on the weights knows nothing of the formula; it comes near from above and never below.

# %%
descent = spectral.solve(x, y, gamma=GAMMA, widths=(6, 6), method="gradient_descent")
above = (float(descent.primal) - float(solution.dual)) / abs(float(solution.dual))
print(f"gradient descent ends {above:.1e} above the certified lower bound, relative to it")
