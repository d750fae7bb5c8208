"""From end to end: prepare, resize, train until the answers are known by heart, export; then what an export must be."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from safetensors.torch import load_file

import checkpoints

ROOT = Path(__file__).resolve().parent.parent
ANSWERS = {
    "Who are you?": "I am Genesis.",
    "What is the capital of France?": "<think>\nFrance: Paris.\n</think>\n\nIt is Paris.",
    "Say yes.": "yes",
    "Count.": "one two three",
}


def call(work, script, *flags, ok=True):
    """Run a script of the suite in the folder `work` and return what it printed."""
    launcher = [sys.executable]
    if script == "sft_v1.py":
        rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
        launcher += ["-m", "torch.distributed.run", "--nproc-per-node", "2", *rendezvous]
    command = [*launcher, str(ROOT / script), *map(str, flags)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, cwd=work, env=env, timeout=600)
    assert (result.returncode == 0) is ok, result.stdout + result.stderr
    return result.stdout if ok else result.stderr


@pytest.fixture(scope="module", params=["tied", "untied"])
def work(request, tmp_path_factory, bpe_tokenizer_dir, spm_tokenizer_dir):
    """The five scripts' folders under their default names, for a tiny Llama trained on ANSWERS by two processes."""
    folder, tied = tmp_path_factory.mktemp("work"), request.param == "tied"
    config = transformers.LlamaConfig(
        vocab_size=49_152, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "models" / "base")
    for path in (bpe_tokenizer_dir if tied else spm_tokenizer_dir).iterdir():
        shutil.copyfile(path, folder / "models" / "base" / path.name)
    rows = [{"prompt": question, "response": answer} for question, answer in ANSWERS.items()]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 3))
    source = {"name": "answers", "path": "rows.jsonl", "schema": "prompt/response", "examples": "all"}
    (folder / "mixture.json").write_text(json.dumps([source]))
    call(folder, "prepare_data.py", "--mixture", "mixture.json", "--max-seq-len", 128)
    call(folder, "resize_vocab.py")
    flags = ["--sequences-per-step", 8, "--max-steps", 100, "--learning-rate", 1e-2, "--min-learning-rate", 1e-3]
    flags += ["--warmup-steps", 5, "--save-every", 50, "--validate-every", 0, "--tokens-per-micro-batch", 256]
    call(folder, "sft_v1.py", *flags, "--device", "cpu")
    (folder / "stdout").write_text(call(folder, "export_hf.py"))
    return folder


def stored(work):
    """Return the newest checkpoint's weights by name, float32."""
    checkpoint = checkpoints.newest_whole(work / "checkpoints" / "sft_v1")
    kept = dcp.FileSystemReader(str(checkpoint)).read_metadata().state_dict_metadata
    state = {name: torch.empty(entry.size) for name, entry in kept.items() if name.startswith("model.")}
    dcp.load(state, checkpoint_id=str(checkpoint))
    return {name.removeprefix("model."): tensor for name, tensor in state.items()}


def test_every_tensor_is_the_checkpoints_and_nothing_else_is_there(work):
    expected, found = stored(work), load_file(work / "exports" / "sft_v1" / "model.safetensors")
    base = load_file(work / "checkpoints" / "base" / "model.safetensors")
    assert expected.keys() == found.keys() == base.keys()
    assert all(torch.equal(found[name], tensor.to(torch.bfloat16)) for name, tensor in expected.items())
    size = (work / "exports" / "sft_v1" / "model.safetensors").stat().st_size
    parameters = sum(tensor.numel() for tensor in expected.values())
    assert 2 * parameters < size < 2 * parameters + 10_000
    assert "verified: every tensor and the logits of three prompts equal" in (work / "stdout").read_text()


def test_a_fresh_process_answers_by_heart_and_stops_by_itself(work):
    code = (
        "import json, sys, transformers\n"
        "chat = transformers.pipeline('text-generation', model='exports/sft_v1')\n"
        "for q in json.loads(sys.argv[1]):\n"
        "    out = chat([{'role': 'user', 'content': q}], max_new_tokens=60, do_sample=False)\n"
        "    print(json.dumps(out[0]['generated_text'][-1]['content']))\n"
    )
    command = [sys.executable, "-c", code, json.dumps(list(ANSWERS))]
    result = subprocess.run(command, capture_output=True, text=True, cwd=work)
    assert [json.loads(line) for line in result.stdout.splitlines()] == list(ANSWERS.values()), result.stderr
    stdout = (work / "stdout").read_text()
    assert "Q: Who are you?\nA: I am Genesis.\n   (ended by itself)" in stdout
    assert stdout.count("ended by itself") == 2


def test_it_loads_with_stops_padding_and_template_in_every_place_readers_look(work):
    export, prepared = work / "exports" / "sft_v1", work / "data" / "sft_v1" / "tokenizer"
    ours, theirs = (transformers.AutoTokenizer.from_pretrained(folder) for folder in (export, prepared))
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert ours.apply_chat_template(messages, tokenize=False) == theirs.apply_chat_template(messages, tokenize=False)
    template = (export / "chat_template.jinja").read_text()
    assert json.loads((export / "tokenizer_config.json").read_text())["chat_template"] == template
    assert (export / "tokenizer.json").read_bytes() == (prepared / "tokenizer.json").read_bytes()
    generation = transformers.GenerationConfig.from_pretrained(export)
    assert generation.eos_token_id == [49_153, 2] and ours.eos_token == "<|im_end|>"
    assert generation.pad_token_id == ours.pad_token_id and ours.pad_token_id not in generation.eos_token_id
    config = transformers.AutoConfig.from_pretrained(export)
    assert config.vocab_size == len(ours) == 49_156 and config.dtype == torch.bfloat16
    card = (export / "README.md").read_text()
    assert "| answers | 12 | 0 |" in card and "LEARNING_RATE: 0.01" in card and "step_000100" in card


def test_float32_in_several_files_of_an_earlier_checkpoint(work):
    flags = ["--checkpoint", "step_000050", "--output-dir", "early", "--dtype", "float32", "--max-shard-gib", 0.001]
    call(work, "export_hf.py", *flags, "--max-new-tokens", 5)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(work / "early", output_loading_info=True)
    assert not any(info.values()) and model.dtype == torch.float32
    assert len(list((work / "early").glob("*.safetensors"))) > 1
    index = json.loads((work / "early" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(p.numel() for p in model.parameters()) * 4


def test_what_cannot_be_exported_is_a_sentence(work, tmp_path):
    error = call(work, "export_hf.py", ok=False)
    assert "exports/sft_v1 is not empty. Move it away" in error
    error = call(work, "export_hf.py", "--checkpoint-dir", tmp_path, ok=False)
    assert "holds no whole checkpoint. Run sft_v1.py first" in error
    error = call(work, "export_hf.py", "--checkpoint", "step_000077", "--output-dir", tmp_path / "a", ok=False)
    assert "step_000077: no such checkpoint folder" in error
    error = call(work, "export_hf.py", "--base-model", "models/base", "--output-dir", tmp_path / "a", ok=False)
    assert "models/base is not the base that" in error
    damaged = shutil.copytree(work / "checkpoints" / "sft_v1" / "step_000050", tmp_path / "run" / "step_000050")
    shard = next(damaged.glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1])
    flags = ["--checkpoint-dir", tmp_path / "run", "--checkpoint", "step_000050", "--output-dir", tmp_path / "a"]
    error = call(work, "export_hf.py", *flags, ok=False)
    assert "is not a whole checkpoint: its file" in error
    assert not (tmp_path / "a").exists()
