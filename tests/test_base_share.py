"""benchmarks/base_share.py: real exports with several shares of the base, really measured, become one table.

Run it alone: bash tests/run.sh tests/test_base_share.py
"""

import os
import subprocess
import sys

import base_share
import pytest
from helpers import ROOT, copy_lm_eval
from test_export_hf import make_checkpoint
from test_run_eval import write_own_task


@pytest.mark.torchrun
def test_each_share_is_exported_and_measured_and_has_a_column(tmp_path):
    make_checkpoint(tmp_path, drift=1e-2)
    copy_lm_eval(tmp_path / "fewer_tasks", ())
    write_own_task(tmp_path / "own_tasks")
    chosen = {"TASKS": "own", "INCLUDE_PATH": "own_tasks", "DEVICE": "cpu", "BATCH_SIZE": "4", "DATA_DIR": ""}
    environment = os.environ | chosen | {"CHECK_READING": "0", "PYTHONPATH": str(tmp_path / "fewer_tasks")}
    command = [sys.executable, ROOT / "benchmarks" / "base_share.py", "--shares", "0", "0.5", "--average", "2"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    output = tmp_path / "exports" / "base_share"
    lines = (output / "table.md").read_text().splitlines()
    assert lines[0] == "| | 0 | 0.5 |" and lines[2].startswith("| own acc | ")
    assert "0.5 x the mean of checkpoints/sft_v1/step_000100, checkpoints/sft_v1/step_000050 + 0.5 x" in result.stdout
    assert {path.name for path in (output / "eval-results").iterdir()} == {"share_0", "share_0_5"}
    assert result.stdout.splitlines()[-1].startswith("RESULT shares=0,0.5 measures=1 ")


def test_a_folder_in_use_and_a_share_that_is_no_number_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = {"OUTPUT_DIR": "out", "SHARES": ("half",)}
    with pytest.raises(SystemExit, match=r"SHARES: .*half.*\. Name numbers from 0 to 1, such as 0 0\.25"):
        base_share.main(args)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "table.md").write_text("an earlier table")
    with pytest.raises(SystemExit, match=r"is not empty\. Move it away, or name another --output-dir"):
        base_share.main(args | {"SHARES": ("0",)})
