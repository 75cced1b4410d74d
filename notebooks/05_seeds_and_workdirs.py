# ---
# jupyter:
#   accelerator: TPU
#   colab:
#     name: 05_seeds_and_workdirs.ipynb
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
# # Many seeds at once, and reading a work folder
#
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/dualgap-jax/dualgap_jax/blob/main/notebooks/05_seeds_and_workdirs.ipynb)
#
# `train` takes any number of solutions in one compiled program, each from its own seed.  A run of a config keeps everything it found in a
# work folder of JSON and npz files, which need nothing of this package to be read.

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
import json
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import optax

from dualgap_jax import cli, experiments
from dualgap_jax.config import load, override

SEEDS, STEPS = (4, 100) if SMOKE else (32, 2000)

# %% [markdown]
# ## Many seeds in one program

# %%
data, loss = dg.data.synthetic_relu(seed=1, n=300), dg.losses.binary_hinge()
ends = {}
for count in (1, 3, 10):
    net = dg.multi_branch(dg.mlp(hidden=(1,), out=1), count)
    found = dg.train(net, loss, data, optax.sgd(0.1 * count), batch_size=100, max_steps=STEPS, num_solutions=SEEDS)
    ends[count] = np.sort([dg.evaluate(net, loss, data, s.network).loss for s in found])
    print(
        f"I = {count:>2}: median loss {np.median(ends[count]):.4f}, from {ends[count][0]:.4f} to {ends[count][-1]:.4f}"
    )

figure, axes = plt.subplots(figsize=(5, 3.2))
for count, values in ends.items():
    axes.step(values, np.arange(1, SEEDS + 1) / SEEDS, where="post", label=f"I = {count}")
axes.set(xlabel="training loss at the end", ylabel="share of seeds")
axes.legend()
figure.tight_layout()

# %% [markdown]
# ## A run, and what it leaves behind
#
# As `dualgap run synthetic_relu:I=5` does, smaller.  The same call again reads the finished run.

# %%
folder = Path(tempfile.mkdtemp()) / "run"
config = load(cli.located("synthetic_relu:I=5,smoke" if SMOKE else "synthetic_relu:I=5"))
config = override(config, {"training.max_steps": "200" if SMOKE else "4000"})
report, workdir, _ = experiments.run(config, workdir=folder)
print(report.text())
print(*sorted(str(path.relative_to(folder)) for path in folder.glob("*/*.*")), sep="\n")

# %%
record = json.loads((folder / "results" / "landscape.json").read_text())
card = json.loads((folder / "run.json").read_text())
print({name: round(record["scores"][name], 4) for name in ("envelope_max", "barrier_max", "loss_range")})
print(f"{card['status']} after {card['seconds']:.0f} s with jax {card['packages']['jax']}")
with np.load(folder / "results" / "landscape.npz") as stored:
    print({name: stored[name].shape for name in stored})
losses = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
figure, axes = plt.subplots(figsize=(5, 3.2))
for k in range(3):
    rows = [row for row in losses if row["solution"] == k]
    axes.semilogy([row["step"] for row in rows], [max(row["loss"], 1e-6) for row in rows], label=f"solution {k}")
axes.set(xlabel="step", ylabel="mean loss of a segment")
axes.legend()
figure.tight_layout()
