"""benchmarks/sweep.py: real short runs at several learning rates become one table; what stops it is a sentence.

bash tests/run.sh tests/test_sweep.py
"""

import json
import os
import subprocess
import sys

import pytest
import sweep
from helpers import (
    ROOT,
    copy_lm_eval,
    tiny_config,
    write_base,
    write_chat_data,
    write_conversations,
    write_data,
    write_tokenizer,
)


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


@pytest.mark.torchrun
def test_each_run_ends_with_the_chat_pass(tmp_path):
    from transformers import GenerationConfig

    tokenizer = write_conversations(tmp_path / "conversations", write_tokenizer(tmp_path / "tokenizer"))
    write_data(tmp_path / "data", tokenizer=tokenizer)
    base = write_base(tmp_path / "resized", tiny_config(max_position_embeddings=2048))
    tokenizer.save_pretrained(base)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    GenerationConfig(**ends).save_pretrained(base)
    copy_lm_eval(tmp_path / "fewer_tasks", ("ifeval", "gsm8k"))
    write_chat_data(tmp_path)
    command = [sys.executable, ROOT / "benchmarks" / "sweep.py", "--data-dir", "data", "--resized-model", "resized"]
    command += ["--sweep-dir", "sweep", "--learning-rates", "1.5e-3", "--slice", "0.4", "--limit", "2"]
    environment = os.environ | {
        "PYTHONPATH": str(tmp_path / "fewer_tasks"),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "hf"),
        "NLTK_DATA": str(tmp_path / "nltk_data"),
        "DEVICE": "cpu,cpu",
        "BATCH_SIZE": "2",
    }
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    log = (tmp_path / "sweep/learning_rate_1.5e-3.log").read_text()
    assert result.returncode == 0, log[-2000:] + result.stderr[-2000:]
    row = (tmp_path / "sweep/table.md").read_text().splitlines()[2].strip("| ").split(" | ")
    scores = {}
    for task, key in (("ifeval", "prompt_level_strict_acc,none"), ("gsm8k", "exact_match,flexible-extract")):
        (path,) = (tmp_path / "sweep/eval-results/learning_rate_1_5e-3-chat").glob(f"{task}/*/results_*.json")
        results = json.loads(path.read_text())
        assert results["config"]["limit"] == 2 and results["chat_template_sha"]
        scores[task] = f"{results['results'][task][key]:.4f}"
    assert row[4:] == list(scores.values()), log[-2000:]
    last = f"RESULT learning_rate=1.5e-3 validation_loss={row[1]} ifeval={scores['ifeval']} gsm8k={scores['gsm8k']}"
    assert result.stdout.splitlines()[-1] == last
    assert not list(tmp_path.glob("sweep/*/step_*")) and not list(tmp_path.glob("sweep/*/export"))


def test_a_folder_in_use_and_missing_data_are_refused(tmp_path, monkeypatch):
    (tmp_path / "table.md").write_text("an earlier sweep")
    monkeypatch.setattr(sweep, "SWEEP_DIR", str(tmp_path))
    with pytest.raises(SystemExit, match=r"is not empty\. Move it away, or name another --sweep-dir"):
        sweep.main({})
    monkeypatch.setattr(sweep, "SWEEP_DIR", str(tmp_path / "new"))
    monkeypatch.setattr(sweep, "DATA_DIR", str(tmp_path / "none"))
    with pytest.raises(SystemExit, match="none holds no finished data"):
        sweep.main({})
