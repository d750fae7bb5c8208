"""The Modelfile of an export: its template, run by Go's own text/template, writes what the chat template writes.

Run it alone: bash tests/run.sh tests/test_ollama.py
"""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import transformers

from sft import ollama
from sft.data import chatml

DATA = Path(__file__).parent / "data"
CONVERSATIONS = json.loads((DATA / "chat_template.json").read_text(encoding="utf-8"))["conversations"].values()


def conversations():
    """Return the recorded conversations and more, each turn without white space at its ends: Ollama cannot trim."""
    hostile = [{"role": "user", "content": '{{ .System }} <b> & "quoted" """ {% x %}'}]
    tool = [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}]
    chosen = [conversation["messages"] for conversation in CONVERSATIONS] + [hostile, tool]
    return [[turn | {"content": turn["content"].strip()} for turn in messages] for messages in chosen]


def model_folder(folder, tokenizer_dir):
    """Write a model's config and the extended tokenizer into `folder`. Returns: (the tokenizer, if it adds a BOS)."""
    tokenizer, adds_bos = chatml.extend_tokenizer(tokenizer_dir, True, True)
    tokenizer.save_pretrained(folder)
    transformers.LlamaConfig(max_position_embeddings=1234).save_pretrained(folder)
    return tokenizer, adds_bos


@pytest.mark.skipif(not shutil.which("go"), reason="runs Ollama's template language: apt-get install golang-go")
@pytest.mark.parametrize("which", ["small", "spm"])
def test_go_renders_the_template_of_the_modelfile_as_transformers_renders_ours(which, request, tmp_path):
    tokenizer, adds_bos = model_folder(tmp_path, request.getfixturevalue(f"{which}_tokenizer_dir"))
    template = re.search(r'^TEMPLATE """(.*?)"""$', ollama.modelfile(tmp_path), re.S | re.M)[1]
    asked = json.dumps({"template": template, "conversations": conversations()})
    environment = os.environ | {"GOCACHE": str(tmp_path / "cache"), "GO111MODULE": "off"}
    command = ["go", "run", str(DATA / "render.go")]
    answer = subprocess.run(command, input=asked, capture_output=True, text=True, env=environment, check=True)
    rendered = json.loads(answer.stdout)
    assert len(rendered) == len(conversations()) == 18
    for messages, text in zip(conversations(), rendered, strict=True):
        ours = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert (tokenizer.bos_token if adds_bos else "") + text == ours  # the BOS is the GGUF file's


def test_the_modelfile_stops_at_the_end_of_a_turn_and_has_the_context_of_the_config(small_tokenizer_dir, tmp_path):
    model_folder(tmp_path, small_tokenizer_dir)
    lines = ollama.modelfile(tmp_path).splitlines()
    assert [line for line in lines if line.startswith("FROM ")] == ["FROM model.gguf"]
    parameters = [line for line in lines if line.startswith("PARAMETER ")]
    assert parameters == ['PARAMETER stop "<|im_end|>"', "PARAMETER num_ctx 1234"]
