"""Runs an experiment of the paper from a config file.

Examples:
  python scripts/run.py --list
  python scripts/run.py --config=configs/figure1.py
  python scripts/run.py --config=configs/mnist_1layer.py:I=100 --config.training.learning_rate=0.05
  python scripts/run.py --config=configs/figure4.py:row=cifar_1layer,I=1/3/5
  python scripts/run.py --certify=runs/mnist_1layer-12345678

The same command again resumes an unfinished run, or prints the results of a finished one.  Exit status: 0; 2 for
mistakes and full disks, with one message; 1 for a defect; 130 after Ctrl-C; 143 after SIGTERM.

Several devices: --config.mesh.branch=4 --config.mesh.data=2 (on CPU with --cpu_devices=8).  Several processes: the
same command in each, with --coordinator=HOST:PORT --num_processes=N --process_id=K, or --distributed on a cluster that
JAX knows (SLURM, TPU pods, Kubernetes, Open MPI).
"""

import os
import signal
import sys

if __name__ == "__main__":
    at_start = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number, handler in at_start.items():  # while the imports run, which take a second and may not be broken off
        if handler in (signal.default_int_handler, signal.SIG_DFL):
            signal.signal(number, lambda number, frame: os._exit(128 + number))
    from dualgap_jax import terminal

    terminal.open_streams()
    from dualgap_jax import cli

    for number, handler in at_start.items():
        signal.signal(number, handler)
    cli.main(sys.argv, __doc__)
