"""benchmarks/gpu.py: the plan against what the cards do; tried on two CPU ranks, a run that fails is a row.

Run it alone: bash tests/run.sh tests/test_gpu.py
"""

import re
import subprocess
import sys

import common
import gpu
import pytest
from helpers import ROOT

RUN = {
    "ranks": 2,
    "tokens_per_s": 30_000.0,
    "step_seconds": 0.75,
    "mfu": 0.6,
    "allocated_gib": 19.0,
    "curve": [2.0, 1.5],
}


def result_of(stdout):
    """Return the RESULT line of a benchmark as {name: text}."""
    line = stdout.splitlines()[-1]
    assert line.startswith("RESULT ")
    return dict(pair.split("=") for pair in line.split()[1:])


@pytest.mark.torchrun
def test_it_measures_what_it_plans_on_two_ranks():
    command = [sys.executable, ROOT / "benchmarks" / "gpu.py", "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    figures = result_of(done.stdout)
    assert figures["failed"] == "0", done.stdout
    for name in ("tokens_per_s", "mfu", "gather_gb_per_s", "reduce_gb_per_s", "save_stall_s"):
        assert float(figures[name]) >= 0, name
    assert re.search(r"^\| allocated on a card, GiB \| \d+\.\d+ \| \d+\.\d+ \|$", done.stdout, re.MULTILINE), (
        done.stdout
    )
    assert re.search(r"^At this speed 15,955 steps take \d+\.\d h\.$", done.stdout, re.MULTILINE)


@pytest.fixture
def measured(monkeypatch, capsys):
    """Return a function that runs main with the figures of each run replaced, and returns (stdout, RESULT)."""

    def run(links, ours):
        monkeypatch.setattr(gpu, "QUICK", True)
        monkeypatch.setattr(gpu.common, "in_child", lambda *_: None)
        monkeypatch.setattr(gpu, "links", links)
        monkeypatch.setattr(gpu, "ours", ours)
        gpu.main({})
        stdout = capsys.readouterr().out
        return stdout, result_of(stdout)

    return run


def test_a_run_that_fails_or_hangs_is_a_row_and_the_others_go_on(measured, monkeypatch):
    def slow(size):
        return common.run(sys.executable, "-c", "import time; time.sleep(60)", timeout=0.1)

    def full(size, chosen):
        if "save_every" in chosen:
            common.run(sys.executable, "-c", "raise SystemExit('CUDA out of memory')")
        return RUN

    stdout, result = measured(slow, full)
    assert "| links | failed: not finished after 300 s | | | | |" in stdout
    assert "| a save in mid-run | failed: memory ran out | | | | |" in stdout
    assert "| its own choices | 2 | 30,000 | 60.0% | 19.0 | unknown |" in stdout
    assert "| tokens/s | 19,000 | 30,000 |" in stdout and "15,955 steps take 3.3 h" in stdout
    assert result["failed"] == "2" and result["tokens_per_s"] == "30000.0" and result["gather_gb_per_s"] == "unknown"


def test_when_nothing_runs_all_is_unknown(measured):
    def broken(*_):
        raise SystemExit("no links")

    stdout, result = measured(broken, broken)
    assert stdout.count("| failed: see above |") == 3 and result["failed"] == "3" and result["mfu"] == "unknown"


def test_deterministic_runs_are_compared_and_peers_are_counted_per_rank(monkeypatch):
    rows = {
        "links": {},
        "its own choices": RUN,
        "a save in mid-run": RUN,
        "padded, checkpointing on": RUN | {"ranks": 1},
    }
    rows |= {"deterministic": RUN, "deterministic, again": RUN | {"curve": [2.0, 1.6]}}
    figures = gpu.summary(rows)
    assert figures["deterministic"] is False and figures["padded_ratio"] == 0.5 and figures["trl_ratio"] is None
    assert gpu.summary(rows | {"deterministic, again": RUN})["deterministic"] is True


@pytest.mark.parametrize(("link", "bound"), [(6, 0.48), (8, 0.52), (13, 0.58), (40, 0.62)])
def test_the_bound_by_count_is_that_of_the_measured_link(monkeypatch, link, bound):
    line = "RESULT roofline_ms=680 mfu_bound_6=0.48 mfu_bound_10=0.56 mfu_bound_16=0.6 mfu_bound_22=0.62 host_waits=1"
    monkeypatch.setattr(common, "run", lambda *_, **__: f"parts\n{line}\n")
    size = {"ranks": 2, "card": "NVIDIA GeForce RTX 4090"}
    assert gpu.bound_by_count(size, link) == pytest.approx(bound)
    assert gpu.bound_by_count(size | {"ranks": 1}, link) is None


def test_it_needs_a_card(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="--quick"):
        gpu.main({})
