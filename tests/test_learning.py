"""benchmarks/learning.py: what its RESULT line says of runs whose scores are known.

bash tests/run.sh tests/test_learning.py
"""

import math

import learning
import pytest

BEFORE = {"exact_match": 0.0, "held_out_loss": 2.0, "plain_text_loss": 3.0}


def run(scores, name, minutes, quality, change=1.0):
    """Return a run of four steps in `minutes`, whose exact match rises evenly to `quality`; adds to `scores`."""
    snapshots = {step: f"{name}-{step}" for step in (2, 4)}
    for step, folder in snapshots.items():
        match = quality * step / 4
        scores[folder] = {"exact_match": match, "held_out_loss": 2 - match, "plain_text_loss": 3 + match / 10}
    losses = [change * loss for loss in (2.0, 1.9, 1.8, 1.7)]
    return {"minutes": [minutes * step / 4 for step in range(1, 5)], "losses": losses, "snapshots": snapshots}


def test_the_ratio_is_the_time_to_the_mean_quality_of_trl_at_its_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(learning, "WORK", tmp_path)
    scores = {}
    runs = {
        "ours": [run(scores, "ours-1", 4.0, 0.8), run(scores, "ours-2", 4.0, 0.8)],
        "TRL": [run(scores, "default", 4.0, 0.2)],
        "TRL best": [run(scores, "best-1", 4.0, 0.3, 1.01), run(scores, "best-2", 4.0, 0.5, 0.98)],
    }
    figures = learning.summary(runs, scores, BEFORE)
    assert figures["minutes_to_trl_quality_ratio"] == pytest.approx(0.5, abs=0.01)  # to 0.4
    assert figures["minutes_to_trl_loss_ratio"] == pytest.approx(0.5, abs=0.01)
    assert figures["minutes_to_trl_default_quality_ratio"] == pytest.approx(0.25, abs=0.01)
    assert (figures["ours"], figures["trl"], figures["trl_default"]) == (0.8, 0.4, 0.2)
    assert figures["plain_text_loss_change"] == pytest.approx(0.08)
    assert (figures["loss_gap"], figures["largest_loss_gap"]) == (0.015, 0.02)
    assert "| TRL best | 4 | 0.400 | 0.300 0.500 | 1.600 | 3.040 |" in capsys.readouterr().out
    assert (tmp_path / "learning.png").stat().st_size > 10_000


def test_a_quality_that_ours_never_reaches_gives_no_ratio(tmp_path, monkeypatch):
    monkeypatch.setattr(learning, "WORK", tmp_path)
    scores = {}
    runs = {who: [run(scores, who, 4.0, match)] for who, match in (("ours", 0.2), ("TRL", 0.1), ("TRL best", 0.4))}
    assert math.isnan(learning.summary(runs, scores, BEFORE)["minutes_to_trl_quality_ratio"])
