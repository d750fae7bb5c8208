"""benchmarks/base_share.py: real exports with several shares of the base, really measured, become one table.

Run it alone: bash tests/run.sh tests/test_base_share.py
"""

import os
import subprocess
import sys

import base_share
import datasets
import pytest
from helpers import ROOT, copy_lm_eval, write_chat_data
from test_export_hf import make_checkpoint
from test_run_eval import write_own_task


def run(folder, *flags, **environment):
    """Run the script in `folder`, measuring on the CPU. Returns: what it printed."""
    environment |= {"DEVICE": "cpu", "BATCH_SIZE": "4", "CHECK_READING": "0", "PYTHONPATH": str(folder / "fewer_tasks")}
    command = [sys.executable, ROOT / "benchmarks" / "base_share.py", *flags]
    result = subprocess.run(command, cwd=folder, env=os.environ | environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return result.stdout


@pytest.mark.torchrun
def test_each_share_is_exported_and_measured_and_has_a_column(tmp_path):
    make_checkpoint(tmp_path, drift=1e-2)
    (tmp_path / "models" / "resized").rename(tmp_path / "models" / "moved")
    rows = {"input_ids": [[60, 5, 6, 7]] * 2, "assistant_masks": [[False, False, True, True]] * 2, "source": ["a"] * 2}
    datasets.DatasetDict({"validation": datasets.Dataset.from_dict(rows)}).save_to_disk(tmp_path / "data" / "sft_v1")
    copy_lm_eval(tmp_path / "fewer_tasks", ())
    write_own_task(tmp_path / "own_tasks")
    flags = ["--shares", "0", "0.5", "--average", "2", "--resized-model", "models/moved"]
    check = {"ASSISTANT_FLAGS": "--answers 1 --max-new-tokens 4"}
    printed = run(tmp_path, *flags, TASKS="own", INCLUDE_PATH="own_tasks", **check)
    output = tmp_path / "exports" / "base_share"
    lines = (output / "table.md").read_text().splitlines()
    assert lines[0] == "| | 0 | 0.5 |" and lines[2].startswith("| own acc | ")
    assert lines[3].startswith("| Held-out answers: a loss | ")  # of the built-in check
    assert "0.5 x the mean of checkpoints/sft_v1/step_000100, checkpoints/sft_v1/step_000050 + 0.5 x" in printed
    assert {path.name for path in (output / "eval-results").iterdir()} == {"share_0", "share_0_5"}
    assert printed.splitlines()[-1].startswith("RESULT shares=0,0.5 measures=6 ")


@pytest.mark.torchrun
def test_the_chat_pass_gives_each_way_to_read_an_answer_a_row(tmp_path):
    make_checkpoint(tmp_path)
    copy_lm_eval(tmp_path / "fewer_tasks", ("gsm8k",))
    write_chat_data(tmp_path)
    run(tmp_path, "--shares", "0.25", CHAT_TEMPLATE="1", TASKS="gsm8k", LIMIT="1")
    lines = (tmp_path / "exports" / "base_share" / "table.md").read_text().splitlines()
    names = [line.split(" | ")[0] for line in lines[2:]]
    assert sorted(names) == ["| gsm8k exact_match (flexible-extract)", "| gsm8k exact_match (strict-match)"]


def test_a_folder_in_use_and_a_share_that_is_no_number_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = {"OUTPUT_DIR": "out", "SHARES": ("half",)}
    with pytest.raises(SystemExit, match=r"SHARES: .*half.*\. Name numbers from 0 to 1, such as 0 0\.25"):
        base_share.main(args)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "table.md").write_text("an earlier table")
    with pytest.raises(SystemExit, match=r"is not empty\. Move it away, or name another --output-dir"):
        base_share.main(args | {"SHARES": ("0",)})
