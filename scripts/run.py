"""Runs an experiment of the paper from a config file.

  python scripts/run.py --config=configs/NAME.py:KEY=VALUE,... [--workdir=DIR] [--config.a.b=v]
  python scripts/run.py --list

Examples:
  python scripts/run.py --config=configs/figure1.py
  python scripts/run.py --config=configs/mnist_1layer.py:I=100 --config.training.learning_rate=0.05
  python scripts/run.py --config=configs/figure4.py:row=cifar_1layer,I=1/3/5

The same command again resumes an unfinished run, or prints the results of a finished one.

Several devices: --config.mesh.branch=4 --config.mesh.data=2 (on CPU with --cpu_devices=8).  Several processes: the
same command in each, with --coordinator=HOST:PORT --num_processes=N --process_id=K, or --distributed on a cluster that
JAX knows (SLURM, TPU pods, Kubernetes, Open MPI).
"""

from __future__ import annotations

import sys

from absl import app, flags, logging
from ml_collections import config_flags

from dualgap_jax import cli

_CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder to work in; by default runs/NAME-HASH of the configuration.")
_LIST = flags.DEFINE_bool("list", False, "Print the registered experiments and the config files, and exit.")
_EXTEND = flags.DEFINE_multi_string(
    "extend", [], "Module with `extend(tables) -> tables` that adds entries of your own; may be repeated."
)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0 of a distributed run.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Number of processes of a distributed run.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Join a distributed run as the cluster says.")
_CPU_DEVICES = flags.DEFINE_integer("cpu_devices", None, "Number of virtual devices on CPU, to try a mesh.")


def main(argv: list[str]) -> None:
    del argv
    logging.set_verbosity(logging.WARNING)
    cli.join(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value, _DISTRIBUTED.value, _CPU_DEVICES.value)
    tables = cli.extended(_EXTEND.value)
    if _LIST.value:
        print(cli.listing(tables))
        return
    filename = config_flags.get_config_filename(flags.FLAGS["config"]) if _CONFIG.value is not None else None
    cli.run(_CONFIG.value, filename, _WORKDIR.value, tables, sys.argv)


if __name__ == "__main__":
    with cli.errors_in_one_line():
        cli.check_arguments(sys.argv[1:])
        app.run(main)
