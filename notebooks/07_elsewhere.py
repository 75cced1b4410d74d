# ---
# jupyter:
#   accelerator: TPU
#   colab:
#     name: 07_elsewhere.ipynb
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
# # The landscape of a network trained elsewhere
#
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/dualgap-jax/dualgap_jax/blob/main/notebooks/07_elsewhere.ipynb)
#
# Planes, surfaces and scores ask for three sets of parameters and a function, wherever they were trained.  Here they come from an
# npz file, as any framework can write one; then from nothing but a function `params -> loss`.

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
import numpy as np
from IPython.display import display

POINTS = 11 if SMOKE else 41

# %% [markdown]
# ## Three networks from a file
#
# This cell stands for the other framework: a small network in NumPy, trained from three seeds, one npz each.

# %%
rng = np.random.default_rng(0)
x = rng.standard_normal((200, 2)).astype(np.float32)
y = np.where(x[:, 0] * x[:, 1] > 0, 1, -1)


def train_elsewhere(seed, steps=300 if SMOKE else 3000, width=16, rate=0.5):
    rng = np.random.default_rng(seed)
    w, b = rng.standard_normal((2, width)), rng.standard_normal(width)
    a = rng.standard_normal(width) / np.sqrt(width)
    for _ in range(steps):
        hidden = np.tanh(x @ w + b)
        wrong = -y / (1 + np.exp(y * (hidden @ a))) / len(y)  # of the logistic loss
        back = wrong[:, None] * a * (1 - hidden**2)
        a, w, b = a - rate * hidden.T @ wrong, w - rate * x.T @ back, b - rate * back.sum(0)
    np.savez(f"elsewhere_{seed}.npz", w=w, b=b, a=a)


for seed in range(3):
    train_elsewhere(seed)

# %% [markdown]
# The network again as two functions, and the parameters as handles:

# %%


def load(seed):
    with np.load(f"elsewhere_{seed}.npz") as stored:
        return {name: jnp.asarray(stored[name], jnp.float32) for name in stored}


def apply(params, x):
    return (jnp.tanh(x @ params["w"] + params["b"]) @ params["a"])[:, None]


net = dg.from_functions(lambda key, x: load(0), apply)
networks = [dg.networks.InMemory(load(seed)) for seed in range(3)]
data, loss = dg.data.from_arrays(x, y, task="binary"), dg.losses.logistic()
for network in networks:
    found = dg.evaluate(net, loss, data, network)
    print(f"loss {found.loss:.4f}, accuracy {found.accuracy:.3f}")

# %%
plane = dg.plane(networks)
xs = np.linspace(-1, 1, POINTS)
surface = dg.surface(net, loss, data, plane, xs, xs)
scores = dg.scores(xs, xs, surface.loss)
print(
    f"largest distance to the convex envelope: {scores.envelope_max:.3f}; midpoint violations: {scores.midpoint_violation_rate:.3f}"
)
display(dg.plot.surface(surface, plane=plane, title="Trained elsewhere"))

# %% [markdown]
# ## Any function of parameters
#
# A loss that is no mean over examples, here one with a penalty, is a network whose output is the loss, on a data set of one row.

# %%


def objective(params):
    outputs = apply(params, jnp.asarray(x))[:, 0]
    return jnp.mean(jax.nn.softplus(-y * outputs)) + 1e-2 * sum(jnp.sum(p**2) for p in params.values())


whole = dg.from_functions(
    lambda key, x: load(0), lambda params, x: objective(params)[None, None] * jnp.ones((len(x), 1))
)
once = dg.data.from_arrays(np.zeros((1, 1)), np.zeros(1), task="regression")
penalised = dg.surface(whole, lambda outputs, labels: outputs[:, 0], once, plane, xs, xs)
middle = POINTS // 2
print(
    f"at the mean of the three: {surface.loss[middle, middle]:.4f}, with the penalty {penalised.loss[middle, middle]:.4f}"
)
