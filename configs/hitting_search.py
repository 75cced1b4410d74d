"""Which learning rate, batch, initialisation and schedule give the paper's Table 1? A search and its check.

    python scripts/run.py --config=configs/hitting_search.py
    python scripts/run.py --config=configs/hitting_search.py:screen_seeds=25,teachers=10,held_out=20

The paper states none of them, nor the teacher.  25 settings are screened on 4 teachers; the best 3 pairs of a setting
and a teacher are run in full; the best of these is run on 8 teachers that the search did not see.  Part after part is
kept, so the same command goes on after an interruption.

The rates were chosen after a look, not counted in the budget, at 512 runs of batch 10 with constant rates of 0.005 to
0.05 on the same 4 teachers.  Batch 100 is left out for its cost; 32 stands for larger batches.

Expect batch 10, PyTorch's init and a cosine schedule from rate 0.02 on teacher 2, with 4 of the 10 printed rates
inside the intervals, hardly ahead of a constant rate of 0.01 on teacher 1 (log likelihoods -42.4 and -43.0).  On the
held-out teachers the same setting hits far more often, and at a constant rate of 0.1 nearly every run hits: the level
of the table depends on teacher and rate, its rise with width much less.  A quarter of an hour of two CPU cores.
"""

import dataclasses

from dualgap_jax.config import experiment_config, numbered, parse_arg
from dualgap_jax.experiments.hitting_search import HittingSearchSpec


def get_config(arg=None):
    args = parse_arg(
        arg, screen_seeds=8, teachers=4, refined=3, seeds=100, held_out=8, held_out_seeds=20, steps=100_000, smoke=False
    )
    spec = HittingSearchSpec()
    table = dataclasses.replace(spec.table, seeds=args.seeds, sgd=dataclasses.replace(spec.table.sgd, steps=args.steps))
    spec = dataclasses.replace(
        spec,
        teachers=numbered("teachers", args.teachers, first=1),
        screen_seeds=args.screen_seeds,
        refined=args.refined,
        held_out=numbered("held_out", args.held_out, first=101),
        held_out_seeds=args.held_out_seeds,
        table=table,
    )
    if args.smoke:
        sgd = dataclasses.replace(table.sgd, steps=40, check_every=20, lanes=16)
        spec = dataclasses.replace(
            spec,
            programs=("5/torch/constant", "5/he/cosine"),
            learning_rates=(0.01, 0.02),
            teachers=(1, 2),
            screen_widths=(12,),
            screen_seeds=2,
            refined=1,
            held_out=(101,),
            held_out_seeds=2,
            textbook=("5/torch/constant/0.1",),
            table=dataclasses.replace(
                table, widths=(12,), seeds=2, data=dataclasses.replace(table.data, settings={"n": 40}), sgd=sgd
            ),
        )
    return experiment_config("hitting_search", spec)
