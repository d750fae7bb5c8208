"""benchmarks/sweep.py: real short runs at several learning rates become one table; what stops it is a sentence.

bash tests/run.sh tests/test_sweep.py
"""

import subprocess
import sys

import pytest
import sweep
from helpers import ROOT


@pytest.mark.torchrun
def test_each_rate_is_trained_and_the_lowest_validation_loss_is_named():
    command = [sys.executable, ROOT / "benchmarks" / "sweep.py", "--quick"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    runs = ROOT / "benchmarks" / "work" / "sweep" / "runs"
    rows = [line.strip("| ").split(" | ") for line in (runs / "table.md").read_text().splitlines()[2:]]
    assert [row[0] for row in rows] == ["1e-3", "1e-2"]
    losses = {float(row[1]): row[0] for row in rows}
    assert len(losses) == 2 and all(float(row[2]) > 0 and row[3] == "0" for row in rows)
    best = min(losses)
    assert result.stdout.splitlines()[-1] == f"RESULT learning_rate={losses[best]} validation_loss={best:.4f}"
    assert not list(runs.glob("*/step_*")) and (runs / "learning_rate_1e-3" / "metrics.jsonl").exists()


def test_a_folder_in_use_and_missing_data_are_refused(tmp_path, monkeypatch):
    (tmp_path / "table.md").write_text("an earlier sweep")
    monkeypatch.setattr(sweep, "SWEEP_DIR", str(tmp_path))
    with pytest.raises(SystemExit, match=r"is not empty\. Move it away, or name another --sweep-dir"):
        sweep.main({})
    monkeypatch.setattr(sweep, "SWEEP_DIR", str(tmp_path / "new"))
    monkeypatch.setattr(sweep, "DATA_DIR", str(tmp_path / "none"))
    with pytest.raises(SystemExit, match="none holds no finished data"):
        sweep.main({})
