# ---
# jupyter:
#   accelerator: TPU
#   colab:
#     name: 04_flax.ipynb
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
# # A multi-branch layer inside your Flax model
#
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/dualgap-jax/dualgap_jax/blob/main/notebooks/04_flax.ipynb)
#
# `dualgap_jax.linen.MultiBranch` is the mean of $I$ copies of a branch as a layer: it drops into a larger model, trains with optax and
# checkpoints like any other.  Here a classifier with such a block is trained by a plain Flax loop from three seeds; then
# the loss is drawn over the plane through the three.

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
import optax
from flax import linen as nn
from IPython.display import display

from dualgap_jax.linen import MultiBranch

STEPS, POINTS = (30, 9) if SMOKE else (400, 31)

# %%


class Branch(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(8)(nn.tanh(nn.Dense(4)(x)))


class Model(nn.Module):
    num_branches: int

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(8)(x))
        x = x + MultiBranch(Branch(), num_branches=self.num_branches)(x)
        return nn.Dense(3)(x)


rng = np.random.default_rng(0)
x = jnp.asarray(rng.standard_normal((300, 5)), jnp.float32)
y = jnp.asarray(np.argmax(rng.standard_normal((5, 3)).T @ np.asarray(x).T, axis=0))
model = Model(num_branches=16)
params = model.init(jax.random.key(0), x)
print(jax.tree.map(jnp.shape, params["params"]["MultiBranch_0"]))

# %% [markdown]
# ## A plain training loop, three times

# %%
optimizer = optax.adam(1e-2)


def risk(params):
    return optax.softmax_cross_entropy_with_integer_labels(model.apply(params, x), y).mean()


@jax.jit
def step(params, state):
    loss, gradient = jax.value_and_grad(risk)(params)
    updates, state = optimizer.update(gradient, state, params)
    return optax.apply_updates(params, updates), state, loss


def trained(seed):
    params = model.init(jax.random.key(seed), x)
    state = optimizer.init(params)
    for _ in range(STEPS):
        params, state, loss = step(params, state)
    print(f"seed {seed}: loss {loss:.4f} after {STEPS} steps")
    return params


solutions = [trained(seed) for seed in range(3)]

# %% [markdown]
# ## The plane through them

# %%
net = dg.from_linen(model, switch=lambda train: {})  # training and evaluation are alike here
data = dg.data.from_arrays(x, y)
plane = dg.plane([dg.networks.InMemory(params["params"], {}) for params in solutions])
xs = np.linspace(-1, 1, POINTS)
loss = optax.softmax_cross_entropy_with_integer_labels
surface = dg.surface(net, loss, data, plane, xs, xs)
print(f"largest distance to the convex envelope: {dg.scores(xs, xs, surface.loss).envelope_max:.3f}")
display(dg.plot.surface(surface, plane=plane, title="A Flax model with a multi-branch block"))
