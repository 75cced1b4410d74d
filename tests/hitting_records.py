"""Random records of the Table 1 experiments, as the figures read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dualgap_jax.experiments.hitting_rate import rank_correlation, row, trend
from dualgap_jax.files import save_json, save_npz


def random_rows(rng: np.random.Generator, runs: int = 20) -> list[dict[str, Any]]:
    return [
        row(width, int(rng.binomial(runs, rate)), runs)
        for width, rate in zip((12, 15, 21), (0.2, 0.5, 0.8), strict=True)
    ]


def write_hitting_rate(workdir: Path, rng: np.random.Generator, teachers: tuple[int, ...] = (2, 7)) -> Path:
    tables = {teacher: random_rows(rng) for teacher in teachers}
    rows = [{"teacher": teacher, **line} for teacher, table in tables.items() for line in table]
    correlations = [
        {"teacher": teacher, **rank_correlation((12, 15, 21), [r["rate"] for r in table])}
        for teacher, table in tables.items()
    ]
    record = {
        "title": "Title for $5",
        "setting": "batch 10",
        "tolerance": 1e-5,
        "rows": rows,
        "teachers": correlations,
        "trend": trend(correlations, rows, (12, 15, 21)),
    }
    save_json(workdir / "results" / "hitting_rate.json", record)
    hidden, teacher = (np.repeat([r[key] for r in rows], 20) for key in ("hidden", "teacher"))
    curves = np.exp(np.cumsum(-rng.exponential(1.5, (len(hidden), 11)), axis=1))
    curves[::3, 7:] = 0
    save_npz(
        workdir / "results" / "hitting_rate.npz",
        hidden=hidden,
        teacher=teacher,
        final_loss=curves[:, -1],
        look_steps=np.arange(11) * 100,
        losses=curves,
    )
    return workdir


def write_hitting_search(workdir: Path, rng: np.random.Generator) -> Path:
    def entry(setting: str, teacher: int) -> dict[str, Any]:
        value = float(-rng.exponential(20))
        return {
            "setting": setting,
            "teacher": teacher,
            "log_likelihood": value,
            "rows_inside": 1,
            "rows": random_rows(rng),
        }

    settings = [f"{program}/{rate}" for program in ("10/torch/constant", "5/he/cosine") for rate in (0.01, 0.02)]
    record = {
        "title": "Which setting?",
        "screen": [entry(setting, teacher) for setting in settings for teacher in (1, 2)],
        "settings": [{"setting": setting, "log_evidence": float(-rng.exponential(20))} for setting in settings],
        "chosen": entry(settings[0], 1),
        "held_out": [entry(settings[0], teacher) for teacher in (101, 102)],
        "textbook": [entry("10/torch/constant/0.1", 1)],
    }
    save_json(workdir / "results" / "hitting_search.json", record)
    return workdir
