"""benchmarks/sweep.py: real short runs at several learning rates become one table; what stops it is a sentence.

bash tests/run.sh tests/test_sweep.py
"""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def sweep(*flags):
    command = [sys.executable, ROOT / "benchmarks" / "sweep.py", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.torchrun
def test_each_rate_is_trained_and_the_lowest_validation_loss_is_named():
    result = sweep("--quick")
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    runs = ROOT / "benchmarks" / "work" / "sweep" / "runs"
    rows = [line.strip("| ").split(" | ") for line in (runs / "table.md").read_text().splitlines()[2:]]
    assert [row[0] for row in rows] == ["1e-3", "1e-2"]
    losses = {float(row[1]): row[0] for row in rows}
    assert len(losses) == 2 and all(float(row[2]) > 0 and row[3] == "0" for row in rows)
    best = min(losses)
    assert result.stdout.splitlines()[-1] == f"RESULT learning_rate={losses[best]} validation_loss={best:.4f}"
    assert not list(runs.glob("*/step_*")) and (runs / "learning_rate_1e-3" / "metrics.jsonl").exists()


def test_a_folder_in_use_and_missing_data_are_refused(tmp_path):
    (tmp_path / "table.md").write_text("an earlier sweep")
    result = sweep("--sweep-dir", tmp_path)
    assert (
        result.returncode == 1
        and result.stderr == f"{tmp_path} is not empty. Move it away, or name another --sweep-dir.\n"
    )
    result = sweep("--data-dir", tmp_path / "none", "--sweep-dir", tmp_path / "new")
    assert result.returncode == 1 and "holds no finished data" in result.stderr and "Traceback" not in result.stderr
