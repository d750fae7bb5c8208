"""Whether a model reads: one that knows the passage, the same with one fault, and one that knows nothing.

Alone: bash tests/run.sh tests/test_reading_check.py
"""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from sft.evaluation import reading_check

ROOT = Path(__file__).resolve().parent.parent


def interleave(model):
    """Put the rotary halves of every query and key in the other layout, without telling the model."""
    for layer in model.model.layers:
        for part in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            rows, columns = part.weight.shape
            weight = part.weight.data.view(rows // 16, 2, 8, columns)
            part.weight.data = weight.transpose(1, 2).reshape(rows, columns)


def shuffle(model):
    torch.manual_seed(0)
    table = model.model.embed_tokens.weight
    table.data = table.data[torch.randperm(len(table))]


def poison(model):
    model.model.norm.weight.data[0] = math.nan


@pytest.mark.parametrize("fault", [None, interleave, shuffle, poison])
def test_only_the_whole_model_reads(reader_dir, fault):
    model = transformers.AutoModelForCausalLM.from_pretrained(reader_dir)
    if fault:
        fault(model)
    nats = reading_check.loss(model, transformers.AutoTokenizer.from_pretrained(reader_dir))
    line, reads = reading_check.verdict(nats, 400, expected=1.93)
    assert reads is (fault is None)
    assert f"{nats:.2f} nats per token" in line and "among 400 tokens: 5.99" in line and "1.93 at the end" in line
    assert ("CANNOT READ" in line) is (fault is not None)


def test_a_tokenizer_that_cannot_spell_the_passage_never_reads(reader_dir, tmp_path):
    folder = shutil.copytree(reader_dir, tmp_path / "base")
    state = json.loads((folder / "tokenizer.json").read_text())
    state["pre_tokenizer"] = {"type": "Whitespace"}
    state["model"]["vocab"] = {token: id_ for token, id_ in state["model"]["vocab"].items() if id_ < 9}
    state["model"]["merges"] = []
    (folder / "tokenizer.json").write_text(json.dumps(state))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert reading_check.loss(model, tokenizer) == math.inf


def test_the_command_exits_with_one_where_the_model_cannot_read(reader_dir, tmp_path, capsys):
    reading_check.main({"MODEL_DIR": str(reader_dir)})
    assert capsys.readouterr().out.endswith("; it reads\n")
    torch.manual_seed(0)
    blank = shutil.copytree(reader_dir, tmp_path / "blank")
    config = transformers.AutoConfig.from_pretrained(reader_dir)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(blank)
    command = [sys.executable, "-m", "sft.evaluation.reading_check", "--model-dir", str(blank)]
    bad = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=200)
    assert bad.returncode == 1 and "Likely causes: weights under wrong names" in bad.stderr, bad.stderr
    assert "CANNOT READ" in bad.stdout and "Traceback" not in bad.stderr


def test_a_folder_that_does_not_load_is_refused(reader_dir, tmp_path):
    folder = shutil.copytree(reader_dir, tmp_path / "model")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(SystemExit, match="its model cannot be run with its tokenizer"):
        reading_check.main({"MODEL_DIR": str(folder)})
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(SystemExit, match="can't be loaded as a model"):
        reading_check.main({"MODEL_DIR": str(folder)})
    with pytest.raises(SystemExit, match=r"config.json is missing"):
        reading_check.main({"MODEL_DIR": str(tmp_path / "nowhere")})
