"""export_hf.py from end to end: prepare, resize, train until the answers are known by heart, export; and its refusals.

Run it alone: bash tests/run.sh tests/test_export_hf.py
"""

import contextlib
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from helpers import (
    ROOT,
    Attack,
    args_of,
    bytes_for_a_tensor,
    edit_json,
    full_disk,
    poison,
    read_weights,
    run_python,
    run_torchrun,
)
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers

import chat
import export_hf
import resize_vocab
from sft import hf_folder, system
from sft.evaluation import model_card
from sft.training import checkpoints

ANSWERS = {
    "Who are you?": "I am Genesis.",
    "What is the capital of France?": "<think>\nFrance: Paris.\n</think>\n\nIt is Paris.",
    "Say yes.": "yes",
    "Count.": "one two three",
}


@pytest.fixture(scope="module")
def train(tmp_path_factory, bpe_tokenizer_dir, spm_tokenizer_dir):
    """Return a function that makes the five scripts' folders under their default names, once for "tied" and "untied".

    A tiny Llama is trained on ANSWERS by two processes.
    """
    folders = {}

    def run(kind):
        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp(kind)
            build(folders[kind], kind == "tied", bpe_tokenizer_dir if kind == "tied" else spm_tokenizer_dir)
        return folders[kind]

    return run


def build(folder, tied, tokenizer_dir):
    """Write a base with random weights into `folder`, then run the scripts up to the export."""
    size = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json")).get_vocab_size()
    config = transformers.LlamaConfig(
        vocab_size=size, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "models" / "base")
    for path in tokenizer_dir.iterdir():
        shutil.copyfile(path, folder / "models" / "base" / path.name)
    rows = [{"prompt": question, "response": answer} for question, answer in ANSWERS.items()]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 3))
    source = {"name": "answers", "path": "rows.jsonl", "schema": "prompt/response", "examples": "all"}
    (folder / "mixture.json").write_text(json.dumps([source]))
    flags = ["--mixture", "mixture.json", "--max-seq-len", 128]
    flags += ["--decontaminate-against", "", "--deduplicate", "off"]
    run_python(folder, ROOT / "prepare_data.py", *flags)
    with contextlib.chdir(folder):
        resize_vocab.main(args_of(resize_vocab))
    flags = ["--sequences-per-step", 8, "--max-steps", 100, "--learning-rate", 1e-2, "--min-learning-rate", 1e-3]
    flags += ["--warmup-steps", 5, "--save-every", 50, "--validate-every", 0, "--tokens-per-micro-batch", 256]
    flags += ["--device", "cpu", "--compute-dtype", "float32"]  # on a CPU four times as fast as bfloat16
    run_torchrun(folder, 2, ROOT / "sft_v1.py", *flags)
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()) as stdout:
        export_hf.main(args_of(export_hf))
    (folder / "stdout").write_text(stdout.getvalue())


@pytest.fixture(params=["tied", "untied"])
def work(request, train):
    return train(request.param)


def stored(checkpoint):
    """Return the checkpoint's weights by name, float32."""
    kept = dcp.FileSystemReader(str(checkpoint)).read_metadata().state_dict_metadata
    state = {name: torch.empty(entry.size) for name, entry in kept.items() if name.startswith("model.")}
    dcp.load(state, checkpoint_id=str(checkpoint))
    return {name.removeprefix("model."): tensor for name, tensor in state.items()}


@pytest.mark.torchrun
def test_every_tensor_is_the_checkpoints_and_nothing_else_is_there(work):
    checkpoint = work / "checkpoints" / "sft_v1" / "step_000100"
    expected, exported = stored(checkpoint), load_file(work / "exports" / "sft_v1" / "model.safetensors")
    base = load_file(work / "models" / "resized" / "model.safetensors")
    assert expected.keys() == exported.keys() == base.keys()
    assert all(torch.equal(exported[name], tensor.to(torch.bfloat16)) for name, tensor in expected.items())
    size = (work / "exports" / "sft_v1" / "model.safetensors").stat().st_size
    parameters = sum(tensor.numel() for tensor in expected.values())
    assert 2 * parameters < size < 2 * parameters + 10_000
    assert "verified: every tensor and the logits of three prompts equal" in (work / "stdout").read_text()


@pytest.mark.torchrun
def test_a_fresh_process_answers_by_heart_and_stops_by_itself(train):
    code = (
        "import json, sys, transformers\n"
        "for folder in sys.argv[2:]:\n"
        "    chat = transformers.pipeline('text-generation', model=folder)\n"
        "    for q in json.loads(sys.argv[1]):\n"
        "        out = chat([{'role': 'user', 'content': q}], max_new_tokens=60, do_sample=False)\n"
        "        print(json.dumps(out[0]['generated_text'][-1]['content']))\n"
    )
    works = [train("tied"), train("untied")]
    folders = [str(work / "exports" / "sft_v1") for work in works]
    command = [sys.executable, "-c", code, json.dumps(list(ANSWERS)), *folders]
    result = subprocess.run(command, capture_output=True, text=True, cwd=works[0])
    assert [json.loads(line) for line in result.stdout.splitlines()] == list(ANSWERS.values()) * 2, result.stderr
    for work in works:
        stdout = (work / "stdout").read_text()
        assert "Q: Who are you?\nA: I am Genesis.\n   (ended by itself)" in stdout
        assert stdout.count("ended by itself") == 2


@pytest.mark.torchrun
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
    from_sentencepiece = json.loads((export / "tokenizer.json").read_text())["pre_tokenizer"]["type"] == "Metaspace"
    assert (export / "tokenizer.model").is_file() is from_sentencepiece
    config = transformers.AutoConfig.from_pretrained(export)
    assert config.vocab_size == len(ours) == 49_156 and config.dtype == torch.bfloat16
    card = (export / "README.md").read_text()
    assert "| answers | 12 | 0 |" in card and "LEARNING_RATE: 0.01" in card and "step_000100" in card


@pytest.mark.torchrun
def test_float32_in_several_files_of_an_earlier_checkpoint(work, monkeypatch):
    monkeypatch.chdir(work)
    monkeypatch.setattr(export_hf, "MAX_SHARD_BYTES", 10**6)
    args = {"CHECKPOINT": "step_000050", "EXPORT_DIR": "early", "DTYPE": "float32", "MAX_NEW_TOKENS": 5}
    export_hf.main(args_of(export_hf, **args))
    model, info = transformers.AutoModelForCausalLM.from_pretrained(work / "early", output_loading_info=True)
    assert not any(info.values()) and model.dtype == torch.float32
    assert len(list((work / "early").glob("*.safetensors"))) > 1
    index = json.loads((work / "early" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(p.numel() for p in model.parameters()) * 4


@pytest.mark.torchrun
def test_the_chat_streams_answers_with_template_and_stop(work, monkeypatch, capsys):
    monkeypatch.chdir(work)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Who are you?\nCount.\n\nCount.\n"))
    chat.main(args_of(chat, TEMPERATURE=0.0))
    stdout = capsys.readouterr().out
    answers = [line.removeprefix("You: Model: ") for line in stdout.splitlines() if "Model: " in line]
    assert answers[0] == "I am Genesis." and answers[-1] == "one two three", stdout
    assert len(answers) == 3 and "(a new conversation)" in stdout


@pytest.mark.torchrun
def test_the_card_shows_data_licence_recipe_and_curve(work):
    folder = work / "exports" / "sft_v1"
    card = (folder / "README.md").read_text()
    assert "| answers | rows.jsonl | of your own file: add it |" in card
    assert "![Loss by optimizer step](loss.png)" in card and "python chat.py --export-dir" in card
    assert (folder / "loss.png").read_bytes() == (work / "checkpoints" / "sft_v1" / "loss.png").read_bytes()
    stdout = (work / "stdout").read_text()
    assert "CANNOT READ" in stdout and "WARNING: exports/sft_v1 is what was" in stdout


# ==== A checkpoint written in this process: older readers, refusals ====


def make_checkpoint(folder, tied=True, harm=None, steps=(50, 100), drift=0.0, **shape):
    """Write a tiny base, resize it, and save two checkpoints of weights near it under `folder`, without training.

    drift: share by which the weights grow per step; 0: all checkpoints are the same.
    """
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=tied, bos_token_id=1, eos_token_id=0, **shape,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "models" / "base")
    backend = Tokenizer(models.WordLevel({f"w{index}": index for index in range(60)}, unk_token="w2"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(folder / "models" / "base" / "tokenizer.json"))
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    backend.add_tokens(["<think>", "</think>"])
    template = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    names = {"bos_token": "w1", "eos_token": "<|im_end|>", "pad_token": "w2"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **names)
    tokenizer.save_pretrained(folder / "data" / "sft_v1" / "tokenizer")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        resize_vocab.main(args_of(resize_vocab))
    resized = folder / "models" / "resized"
    model = transformers.AutoModelForCausalLM.from_pretrained(resized, dtype=torch.float32)
    tensors = {f"model.{name}": part.detach() * 1.001 for name, part in model.named_parameters()}
    tensors |= {f"optimizer.exp_avg.{name}": torch.zeros_like(part) for name, part in model.named_parameters()}
    if harm:
        harm(tensors)
    fingerprints = {"data": ""} | hf_folder.fingerprint(resized)
    recipe = "SEQUENCES_PER_STEP EPOCHS MAX_STEPS LEARNING_RATE MIN_LEARNING_RATE WARMUP_STEPS ADAM_BETA1 ADAM_BETA2"
    recipe += " WEIGHT_DECAY MAX_GRAD_NORM COMPUTE_DTYPE SEED"
    settings = dict.fromkeys(recipe.split(), 1)
    settings |= {"DATA_DIR": "data/sft_v1", "RESIZED_MODEL": "models/resized", "CHECKPOINT_DIR": "checkpoints/sft_v1"}
    state = {
        "fingerprints": fingerprints,
        "settings": settings,
        "versions": {},
        "world_size": 1,
        "history": [],
        "total_steps": 100,
    }
    for step in steps:
        numbers = {"step": step, "updates": step, "validation_loss": step / 50}
        moved = {name: tensor * (1 + drift * step) for name, tensor in tensors.items()}
        checkpoints.save(folder / "checkpoints" / "sft_v1", step, moved, state | numbers)
    return folder


@pytest.fixture
def export(tmp_path, monkeypatch):
    """Return a function that exports in this process, in `tmp_path`, and returns the output folder."""
    monkeypatch.chdir(tmp_path)

    def run(**changes):
        args = args_of(export_hf, MAX_NEW_TOKENS=2) | changes
        export_hf.main(args)
        return tmp_path / args["EXPORT_DIR"]

    return run


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(export_hf, "MAX_SHARD_BYTES", 3_000)


def refused(export, **changes):
    """Return the sentence with which an export is refused."""
    with pytest.raises(SystemExit) as refusal:
        export(**changes)
    return str(refusal.value)


ROPES = [{}, {"factor": 2.0, "rope_type": "linear"}]


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("tied", [True, False])
def test_older_readers_find_theta_scaling_dtype_and_a_tokenizer_class_they_know(
    tmp_path, export, small_shards, tied, rope
):
    rope = {"rope_theta": 500_000.0, "rope_type": "default"} | rope
    make_checkpoint(tmp_path, tied, rope_parameters=rope)
    output = export(DTYPE="float32")
    config = json.loads((output / "config.json").read_text())
    assert config["rope_theta"] == 500_000 and config["torch_dtype"] == config["dtype"] == "float32"
    expected = None if rope["rope_type"] == "default" else {"factor": 2.0, "rope_type": "linear"}
    assert config.get("rope_scaling") == expected
    assert json.loads((output / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    ours, base = (transformers.AutoConfig.from_pretrained(path) for path in (output, tmp_path / "models" / "resized"))
    assert ours.rope_parameters == base.rope_parameters
    index = json.loads((output / "model.safetensors.index.json").read_text())["weight_map"]
    assert index == {name: path.name for path in output.glob("*.safetensors") for name in load_file(path)}
    assert ("lm_head.weight" in index) is not tied


def test_the_card_of_an_earlier_checkpoint_tells_its_own_losses(tmp_path, export):
    run = make_checkpoint(tmp_path) / "checkpoints" / "sft_v1"
    lines = [{"step": 0, "validation_loss": 7}, {"step": 50, "loss": 5}, {"step": 50, "validation_loss": 6}]
    lines += [{"step": 51, "loss": None}, {"step": 100, "loss": 1}, {"step": 100, "validation_loss": 2}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 101, "lo')
    early = (export(CHECKPOINT="best", EXPORT_DIR="early") / "README.md").read_text()
    assert (
        "checkpoint `step_000050`" in early
        and "last training loss: 5.0000" in early
        and "7.0000 at first, 6.0000 at last" in early
    )
    path = "checkpoints/sft_v1/step_000100"  # as the shell completes it
    last = (export(CHECKPOINT=path, EXPORT_DIR="last") / "README.md").read_text()
    assert "last training loss: 1.0000" in last and "7.0000 at first, 2.0000 at last" in last


RESIZED = "models/resized"
REFUSALS = [
    (lambda folder: shutil.rmtree(folder / RESIZED), "has no model.safetensors. Name the folder"),
    (lambda folder: (folder / RESIZED / "chat_template.jinja").unlink(), "then, None now"),
    (lambda folder: (folder / RESIZED / "generation_config.json").unlink(), "generation_config.json is missing"),
    (
        lambda folder: edit_json(folder / RESIZED / "generation_config.json", eos_token_id=0),
        "generation_config.json eos_token_id: [61, 0] then, 0 now",
    ),
    (
        lambda folder: edit_json(folder / RESIZED / "tokenizer_config.json", pad_token="<|im_end|>"),
        "was trained from: tokenizer_config.json: ",
    ),
    (
        lambda folder: edit_json(folder / RESIZED / "config.json", num_hidden_layers=2),
        "was trained from: config.json num_hidden_layers: 1 then, 2 now. Name the folder",
    ),
    (lambda folder: (folder / RESIZED / "tokenizer.json").write_text("{}"), "was trained from: tokenizer.json: "),
    (lambda folder: shutil.rmtree(folder / "checkpoints" / "sft_v1"), "holds no whole checkpoint. Run sft_v1.py"),
]
RESIZED_LATER = [  # what the tensors and the logits of an export alone would not show
    (
        lambda folder: edit_json(folder / "config.json", rope_parameters={"rope_theta": 5e5, "rope_type": "default"}),
        "config.json rope_parameters.rope_theta: 10000.0 then, 500000.0 now. Name the folder",
    ),
    (lambda folder: edit_json(folder / "config.json", rms_norm_eps=1e-3), "rms_norm_eps: 1e-06 then, 0.001 now. Name"),
    (lambda folder: (folder / "chat_template.jinja").write_text("another"), "from: chat_template.jinja: "),
]
BAD_WEIGHTS = [
    (lambda state: state["model.model.norm.weight"][0].fill_(torch.inf), "norm.weight is not finite in torch.bfloat16"),
    (lambda state: state.pop("model.model.norm.weight"), "in 1 tensors: model.norm.weight ['-'] there, [16] here"),
    (lambda state: state.update({"model.x": torch.ones(2)}), "in 1 tensors: x [2] there, ['-'] here"),
]


@pytest.mark.parametrize(("harm", "sentence"), REFUSALS)
def test_what_does_not_belong_to_the_checkpoint_is_refused(tmp_path, export, harm, sentence):
    harm(make_checkpoint(tmp_path))
    assert sentence in refused(export) and not list((tmp_path / "exports").glob("*"))


def test_a_base_with_another_config_or_template_is_refused_and_verifies_nothing(tmp_path, export):
    make_checkpoint(tmp_path)
    export()
    for number, (harm, sentence) in enumerate(RESIZED_LATER):
        again = shutil.copytree(tmp_path / RESIZED, tmp_path / f"resized{number}")
        harm(again)
        for changes in ({"EXPORT_DIR": "x"}, {"VERIFY_ONLY": "exports/sft_v1"}):
            message = refused(export, RESIZED_MODEL=again.name, **changes)
            assert f"{again.name} is not the base that checkpoints/sft_v1/step_000100 was trained" in message
            assert sentence in message and "another" not in message and len(message) < 300
    assert not Path("x").exists()


@pytest.mark.parametrize(("harm", "sentence"), BAD_WEIGHTS)
def test_weights_that_no_model_should_have_are_refused(tmp_path, export, harm, sentence):
    make_checkpoint(tmp_path, harm=harm)
    assert sentence in refused(export) and not list((tmp_path / "exports").glob("*"))


@pytest.mark.parametrize("harm", [{"rope_theta": 1.0}, {"rms_norm_eps": 0.1}])
def test_a_configuration_that_computes_something_else_is_seen_in_the_logits(tmp_path, export, monkeypatch, harm):
    make_checkpoint(tmp_path)

    def write_wrong_configs(base, output, dtype_name, write=export_hf.write_configs):
        write(base, output, dtype_name)
        edit_json(output / "config.json", rope_parameters=None, **harm)

    monkeypatch.setattr(export_hf, "write_configs", write_wrong_configs)
    monkeypatch.setattr(export_hf, "PROMPTS", ("w3 w4 w5 w6 w7 w8",))
    with pytest.raises(SystemExit, match=r"logits of .* differ from the checkpoint's"):
        export()


def test_an_export_publishes_only_its_own_files_readable_by_all_and_prints_no_control_characters(
    tmp_path, export, monkeypatch, capsys
):
    resized = make_checkpoint(tmp_path) / RESIZED
    (tmp_path / "private").write_text("precious")
    for name in ("NOTICE", "pytorch_model.bin", "special_tokens_map.json.bak"):
        (resized / name).symlink_to(tmp_path / "private")
    monkeypatch.setattr(hf_folder, "answer", lambda *args: ("\x1b[2J", True))
    folder = export()
    assert "A: \\x1b[2J\n" in capsys.readouterr().out
    assert not {"NOTICE", "pytorch_model.bin", "special_tokens_map.json.bak"} & {path.name for path in folder.iterdir()}
    modes = {path.stat().st_mode & 0o777 for path in [*folder.iterdir(), *resized.glob("*.safetensors")]}
    assert modes == {(tmp_path / "private").stat().st_mode & 0o777}
    (resized / "chat_template.jinja").rename(tmp_path / "template")
    (resized / "chat_template.jinja").symlink_to(tmp_path / "template")
    assert "resized/chat_template.jinja is a link, and an export publishes no file" in refused(export, EXPORT_DIR="x")


def test_a_checkpoint_runs_no_code_in_an_export(tmp_path, export):
    checkpoint = make_checkpoint(tmp_path) / "checkpoints" / "sft_v1" / "step_000100"
    poison(checkpoint, bytes_for_a_tensor("model.model.norm.weight"))
    assert "differ in 1 tensors: model.norm.weight ['-'] there, [16] here" in refused(export)
    poison(checkpoint, lambda content: content[:-1] + pickle.dumps(Attack())[2:])  # and then the true metadata
    message = refused(export)
    assert "step_000100: its .metadata cannot be read (it names posix.system, which no DCP metadata needs)" in message
    assert not Path("broken-into").exists() and not list((tmp_path / "exports").glob("*"))


def rewrite_state(checkpoint, change):
    """Write the checkpoint's state.json as `change(dict)` leaves it, and its manifest to match."""
    path = checkpoint / "state.json"
    state = json.loads(path.read_text())
    change(state)
    path.write_text(json.dumps(state))
    edit_json(checkpoint / "manifest.json", **{"state.json": [path.stat().st_size, system.sha256(path)]})


STATES = [  # a change, the names that the refusal has
    (lambda state: state["settings"].pop("SEED"), "settings SEED"),
    (lambda state: state["settings"].update(DATA_DIR=1, RESIZED_MODEL=None), "settings DATA_DIR, settings RESIZED_"),
    (lambda state: state.update(settings=[]), "settings"),
    (lambda state: state.update(fingerprints=None, versions=None), "versions, fingerprints"),
    (lambda state: state["fingerprints"].pop("data"), "fingerprints data"),
    (lambda state: state.pop("updates"), "updates"),
    (lambda state: state.update(step="50", world_size=None), "step, world_size"),
]


@pytest.mark.parametrize(("change", "names"), STATES)
def test_a_state_of_another_form_is_a_sentence(tmp_path, export, change, names):
    checkpoint = make_checkpoint(tmp_path) / "checkpoints" / "sft_v1" / "step_000100"
    rewrite_state(checkpoint, change)
    message = refused(export)
    assert f"step_000100/state.json has no readable {names}" in message
    assert "another version of this suite wrote it, or it was edited. Export with that version, or choose" in message


def test_a_checkpoint_of_another_version_is_called_that(tmp_path, export):
    checkpoint = make_checkpoint(tmp_path) / "checkpoints" / "sft_v1" / "step_000100"
    rewrite_state(checkpoint, lambda state: state.update(fingerprints={"data": "a", "tokenizer": "b", "base": "c"}))
    message = refused(export)
    assert "step_000100: another version of this suite wrote it. Export with that version, or choose" in message
    assert " then, " not in message


def test_a_full_disk_is_a_sentence_and_stays_as_full_as_it_was(tmp_path, export):
    make_checkpoint(tmp_path)
    with full_disk(3_000):
        assert "exports/sft_v1 cannot be written" in refused(export)
    assert not list((tmp_path / "exports").iterdir())


def test_what_cannot_be_exported_is_a_sentence(tmp_path, export):
    run = make_checkpoint(tmp_path) / "checkpoints" / "sft_v1"
    (export() / "thesis.txt").write_text("precious")
    error = run_python(tmp_path, ROOT / "export_hf.py", ok=False)  # as a process of its own
    assert "exports/sft_v1 is not empty. Move it away, or name another --export-dir" in error
    assert (tmp_path / "exports" / "sft_v1" / "thesis.txt").read_text() == "precious"
    shard = next((run / "step_000050").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1])
    for changes, sentence in (
        ({"CHECKPOINT": "step_000050"}, "is not a whole checkpoint: its file"),
        ({"CHECKPOINT": "step_000077"}, "step_000077: no such checkpoint folder"),
        (
            {"CHECKPOINT": "best", "CHECKPOINT_DIR": "data"},
            "data holds no whole checkpoint of a step that was validated",
        ),
        ({"RESIZED_MODEL": "models/base"}, "models/base is not the base that"),
        ({"DTYPE": "float16"}, "DTYPE is 'float16'; it must be one of bfloat16, float32"),
        ({"MAX_NEW_TOKENS": 0}, "MAX_NEW_TOKENS is 0; it must be at least 1"),
    ):
        assert sentence in refused(export, EXPORT_DIR="a", **changes) and not list(tmp_path.glob("a*"))


def test_an_export_is_verified_again_and_every_change_is_seen(tmp_path, export, small_shards, capsys):
    make_checkpoint(tmp_path)
    folder = export(DTYPE="float32")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    export(VERIFY_ONLY="exports/sft_v1", DTYPE="bfloat16")
    assert "verified: every tensor" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before

    def flip(name):
        path = folder / name
        path.write_bytes(before[name][:-1] + bytes([before[name][-1] ^ 1]))

    shards = sorted(name for name in before if name.endswith(".safetensors"))
    harms = [(lambda: flip(shards[-1]), f"{shards[-1]}: ")]
    harms += [(lambda: (folder / shards[0]).unlink(), f"has no {shards[0]}")]
    harms += [(lambda: edit_json(folder / "tokenizer_config.json", chat_template="x"), "chat_template: ")]
    harms += [(lambda: (folder / "chat_template.jinja").write_text("x"), "from models/resized: chat_template.jinja: ")]
    stops = "generation_config.json eos_token_id: [61, 0] then, [0] now"
    harms += [(lambda: edit_json(folder / "generation_config.json", eos_token_id=[0]), stops)]
    harms += [(lambda: edit_json(folder / "config.json", vocab_size=63), "config.json vocab_size: 64 then, 63 now")]
    harms += [(lambda: edit_json(folder / "config.json", dtype="float16"), "it is not an export of this script")]
    window = "config.json max_position_embeddings: 2048 then, 4096 now"
    harms += [(lambda: edit_json(folder / "config.json", max_position_embeddings=4096), window)]
    spaced = json.dumps(json.loads(before["tokenizer.json"]), indent=1)
    harms += [
        (lambda: (folder / "tokenizer.json").write_text(spaced), "is not an export from models/resized: tokenizer.j")
    ]
    for harm, sentence in harms:
        harm()
        assert sentence in refused(export, VERIFY_ONLY="exports/sft_v1")
        for name, content in before.items():
            (folder / name).write_bytes(content)
    assert "exports/nowhere/config.json is missing" in refused(export, VERIFY_ONLY="exports/nowhere")


EDITED = [  # file, its change, what the refusal names
    ("config.json", {"rope_theta": 1.0}, "config.json rope_theta: 10000.0 then, 1.0 now"),
    ("config.json", {"sliding_window": None}, "config.json sliding_window: None then, null now"),
    ("config.json", {"torch_dtype": "float16"}, 'config.json torch_dtype: "bfloat16" then, "float16" now'),
    ("config.json", {"auto_map": {"AutoModel": "other/code--x.X"}}, "config.json auto_map: "),
    ("config.json", {"quantization_config": {}}, "config.json quantization_config: None then, {} now"),
    ("config.json", {"\x1b[2J": 1}, "config.json \\x1b[2J: None then, 1 now"),
    ("tokenizer_config.json", {"add_bos_token": True}, "tokenizer_config.json add_bos_token: "),
    ("tokenizer_config.json", {"tokenizer_class": "T5Tokenizer"}, 'Fast" then, "T5Tokenizer" now'),
    ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["x.X", None]}}, "tokenizer_config.json auto_map: "),
    ("tokenizer_config.json", {"split_special_tokens": True}, "split_special_tokens: None then, true now"),
    ("tokenizer_config.json", {"added_tokens_decoder": {"0": {"content": "x"}}}, "config.json added_tokens_decoder: "),
    ("generation_config.json", {"suppress_tokens": [61]}, "suppress_tokens: None then, [61] now. Run export_hf.py"),
    ("generation_config.json", {"max_new_tokens": 1}, "generation_config.json max_new_tokens: None then, 1 now"),
    ("generation_config.json", {"forced_eos_token_id": 0}, "generation_config.json forced_eos_token_id: None then"),
]


def test_an_edited_export_is_not_verified(tmp_path, export):
    """Whatever a reader of the files would do otherwise, also where this transformers' logits do not show it."""
    make_checkpoint(tmp_path)
    folder = export()
    for name, change, sentence in EDITED:
        content = (folder / name).read_bytes()
        edit_json(folder / name, **change)
        message = refused(export, VERIFY_ONLY="exports/sft_v1")
        assert "exports/sft_v1 is not an export from models/resized: " in message and sentence in message
        assert len(message) < 300
        (folder / name).write_bytes(content)
    rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
    dotted = {f"rope_parameters.{name}": value for name, value in rope.items()}
    content = (folder / "config.json").read_bytes()
    edit_json(folder / "config.json", rope_parameters=None, **dotted)
    assert "config.json rope_parameters: " in refused(export, VERIFY_ONLY="exports/sft_v1")
    (folder / "config.json").write_text(json.dumps(json.loads(content)))  # in another form: the same
    (folder / "LICENSE").write_text("yours")
    export(VERIFY_ONLY="exports/sft_v1")
    shutil.copyfile(folder / "model.safetensors", folder / "adapter_model.safetensors")
    sentence = "exports/sft_v1 holds adapter_model.safetensors, which is no part of the export. Move it away"
    assert sentence in refused(export, VERIFY_ONLY="exports/sft_v1")


# ==== Means ====


@pytest.mark.parametrize("tied", [True, False])
def test_a_mean_with_a_share_of_the_base_is_the_one_computed_in_float64(tmp_path, export, small_shards, capsys, tied):
    run = make_checkpoint(tmp_path, tied, steps=(25, 50, 75, 100), drift=1e-3) / "checkpoints" / "sft_v1"
    base = read_weights(tmp_path / RESIZED)
    kept = {step: stored(run / checkpoints.checkpoint_name(step)) for step in (50, 75, 100)}

    def expected(name, steps, share):
        mean = sum(kept[step][name].double() for step in steps) / len(steps)
        return (1 - share) * mean + share * base[name].double()

    for number, share, dtype in ((3, 0.25, "float32"), (2, 0.0, "float32"), (1, 0.75, "float32"), (2, 0.5, "bfloat16")):
        folder = export(AVERAGE=number, BASE_SHARE=share, DTYPE=dtype, EXPORT_DIR=f"mean{number}{share}{dtype}")
        exported = read_weights(folder)
        tolerance = {"float32": 1e-6, "bfloat16": 2**-8}[dtype]
        for name, tensor in exported.items():
            truth = expected(name, (100, 75, 50)[:number], share)
            assert torch.allclose(tensor.double(), truth, rtol=tolerance, atol=1e-8), name
        assert "verified: every tensor equals this mean" in capsys.readouterr().out
        export(VERIFY_ONLY=folder.name)  # it says itself how it was made
        stdout = capsys.readouterr().out
        names = ", ".join(f"checkpoints/sft_v1/step_{step:06d}" for step in (100, 75, 50)[:number])
        assert names in stdout and (f"+ {share:g} x models/resized -> mean" in stdout) is (share > 0)
    assert exported.keys() == base.keys()
    training = json.loads((folder / model_card.TRAINING).read_text())
    assert training["averaged"] == ["step_000100", "step_000075"] and training["base_share"] == 0.5


def test_an_export_is_verified_against_the_checkpoint_it_names_however_far_training_has_gone_since(tmp_path, export):
    run = make_checkpoint(tmp_path, drift=1e-3) / "checkpoints" / "sft_v1"
    early = export(CHECKPOINT="step_000050", EXPORT_DIR="early")
    export(VERIFY_ONLY="early")
    edit_json(early / model_card.TRAINING, averaged=["step_000100"])
    assert "differs from the checkpoint" in refused(export, VERIFY_ONLY="early")
    edit_json(early / model_card.TRAINING, averaged=["step_000050"])
    shutil.rmtree(run / "step_000050")
    assert "sft_v1/step_000050: no such checkpoint folder" in refused(export, VERIFY_ONLY="early")


def test_the_whole_share_is_the_base_itself(tmp_path, export):
    make_checkpoint(tmp_path)
    exported, base = read_weights(export(BASE_SHARE=1.0)), read_weights(tmp_path / RESIZED)
    assert all(torch.equal(exported[name], tensor) for name, tensor in base.items())


def test_a_wrong_mean_and_one_changed_bit_of_a_mean_are_seen(tmp_path, export, monkeypatch):
    make_checkpoint(tmp_path, drift=1e-3)
    folder = export(AVERAGE=2, BASE_SHARE=0.5, DTYPE="float32")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert "differs from the checkpoint" in refused(export, VERIFY_ONLY="exports/sft_v1")
    (folder / "model.safetensors").write_bytes(content[:-4] + bytes([content[-4] ^ 1]) + content[-3:])  # the lowest
    assert "differs from the checkpoint" in refused(export, VERIFY_ONLY="exports/sft_v1")
    (folder / "model.safetensors").write_bytes(content)
    edit_json(folder / model_card.TRAINING, base_share=0.25)
    assert "differs from the checkpoint" in refused(export, VERIFY_ONLY="exports/sft_v1")
    for damage in ({"base_share": 2}, {"base_share": "0.5"}, {"averaged": []}, {"averaged": None}, {"averaged": [1]}):
        edit_json(folder / model_card.TRAINING, **{"averaged": ["step_000100"], "base_share": 0.5} | damage)
        message = "training.json does not say what was averaged. Run export_hf.py again"
        assert message in refused(export, VERIFY_ONLY="exports/sft_v1")

    def slightly_wrong(source, names, dtype, read=export_hf.read_weights):
        return {name: tensor * (1 + 1e-5) for name, tensor in read(source, names, dtype).items()}

    monkeypatch.setattr(export_hf, "read_weights", slightly_wrong)  # both sides of the comparison bit by bit
    message = refused(export, AVERAGE=2, BASE_SHARE=0.5, DTYPE="float32", EXPORT_DIR="wrong")
    assert "is not 0.5 x the mean of checkpoints/sft_v1/step_000100, " in message and "in float64" in message
    assert not Path("wrong").exists()


def test_a_mean_of_too_few_damaged_or_foreign_checkpoints_is_refused(tmp_path, export):
    run = make_checkpoint(tmp_path) / "checkpoints" / "sft_v1"
    few = "sft_v1 holds {} checkpoints up to step_{}, too few for a mean of {}. Lower --average"
    for changes, sentence in (
        ({"AVERAGE": 3}, few.format(2, "000100", 3)),
        ({"AVERAGE": 2, "CHECKPOINT": "step_000050"}, few.format(1, "000050", 2)),
        ({"AVERAGE": 0}, "AVERAGE is 0; it must be at least 1"),
        ({"BASE_SHARE": -0.1}, "BASE_SHARE is -0.1; it must be at least 0"),
        ({"BASE_SHARE": 1.1}, "BASE_SHARE is 1.1; it must be at most 1, which is the base alone"),
        ({"BASE_SHARE": float("nan")}, "BASE_SHARE is nan; it must be at least 0"),
    ):
        assert sentence in refused(export, EXPORT_DIR="a", **changes) and not list(tmp_path.glob("a*"))
    fingerprints = json.loads((run / "step_000050" / "state.json").read_text())["fingerprints"]
    rewrite_state(run / "step_000050", lambda state: state["fingerprints"].update(data="other"))
    message = refused(export, AVERAGE=2)
    assert "step_000050 and checkpoints/sft_v1/step_000100 are of different runs: data: " in message
    rewrite_state(run / "step_000050", lambda state: state.update(fingerprints=fingerprints))
    next((run / "step_000050").glob("*.distcp")).unlink()
    assert "step_000050 is not a whole checkpoint: its file" in refused(export, AVERAGE=2)
    export(AVERAGE=1)


def test_the_card_is_written_again_with_the_evaluation_of_these_weights_only(tmp_path, export):
    make_checkpoint(tmp_path)
    folder, results = export(), tmp_path / "eval-results"
    training = json.loads((folder / model_card.TRAINING).read_text())
    assert training["dtype"] == "bfloat16" and training["state"]["step"] == 100
    assert training["parameters"] == sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values())
    results.mkdir()
    (results / "comparison.md").write_text("# What changed\n\n| Task | After |\n|---|---|\n| piqa | 0.5 |\n")
    files = {"comparison.md": system.sha256(results / "comparison.md")}
    before, after = (system.weight_digests(path) for path in (tmp_path / "models" / "base", folder))
    other = {"model.safetensors": "0" * 64}
    for sides, shown in (((before, other), False), ((other, after), False), ((before, after), True)):
        parts = [{"title": "lm_eval", "weights": dict(zip(("before", "after"), sides, strict=True))}]
        (results / "comparison.json").write_text(json.dumps({"parts": parts, "files_sha256": files}))
        model_card.write(folder, "eval-results")
        assert ("| piqa | 0.5 |" in (folder / "README.md").read_text()) is shown


def test_a_dry_run_refuses_a_base_whose_export_would_fail(tmp_path, monkeypatch):
    make_checkpoint(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = {path.name: path.read_bytes() for path in Path(RESIZED).iterdir()}
    export_hf.dry_run(RESIZED)
    edit_json(Path(RESIZED) / "tokenizer_config.json", bos_token="<|im_start|>")  # as in SmolLM
    export_hf.dry_run(RESIZED)
    twice = "{{ bos_token }}{{ bos_token }}"
    harms = [(lambda: (Path(RESIZED) / "chat_template.jinja").write_text(twice), "begins with two BOS tokens")]
    harms += [(lambda: edit_json(Path(RESIZED) / "generation_config.json", eos_token_id=0), "generation stops at [0]")]
    harms += [
        (
            lambda: edit_json(Path(RESIZED) / "generation_config.json", temperature=0.5),
            "transformers refuses its configuration",
        )
    ]
    harms += [(lambda: edit_json(Path(RESIZED) / "generation_config.json", pad_token_id=61), "pads with 61")]
    harms += [
        (lambda: edit_json(Path(RESIZED) / "tokenizer_config.json", pad_token="<|im_end|>"), "a token other than")
    ]
    harms += [(lambda: edit_json(Path(RESIZED) / "config.json", num_hidden_layers=2), "disagree about 9 tensors")]
    harms += [(lambda: (Path(RESIZED) / "chat_template.jinja").unlink(), "has no chat_template.jinja")]
    for harm, sentence in harms:
        harm()
        with pytest.raises(SystemExit) as refusal:
            export_hf.dry_run(RESIZED)
        assert sentence in str(refusal.value) and tempfile.gettempdir() + "/tmp" not in str(refusal.value)
        for name, content in before.items():
            (Path(RESIZED) / name).write_bytes(content)


def test_writing_a_mean_needs_the_memory_of_one_shard_and_two_readings(tmp_path):
    shapes = {f"w{index}": torch.Size((1024, 2048)) for index in range(64)}  # 8 MiB each in float32, 512 in all
    state = {f"model.{name}": torch.zeros(shape) for name, shape in shapes.items()}
    dcp.save(state, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    (tmp_path / "base").mkdir()
    weights = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    hf_folder.save_weights(weights, tmp_path / "base" / "model.safetensors")
    del state, weights
    code = (
        "import pathlib, resource, sys, torch, export_hf\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "export_hf.READ_BYTES = 2**25\n"
        "shapes = {f'w{index}': torch.Size((1024, 2048)) for index in range(64)}\n"
        "def write(shapes, name):\n"
        "    pathlib.Path(name).mkdir()\n"
        "    source = export_hf.Source(['checkpoint'] * 3, 'base', 0.5, shapes)\n"
        "    export_hf.write_weights(source, torch.float32, 2**26, pathlib.Path(name))\n"
        "write({'w0': shapes['w0']}, 'first')\n"
        "before = peak()\n"
        "write(shapes, 'all')\n"
        "print(peak() - before)\n"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert result.returncode == 0, result.stderr
    assert len(list((tmp_path / "all").glob("*.safetensors"))) == 8
    assert float(result.stdout) < 192, result.stdout  # MiB: a shard of 64, two readings of 32, and what they leave
