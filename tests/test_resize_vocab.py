"""resize_vocab.py: new rows are means, old bits stay, and what does not belong together is refused."""

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, models

import resize_vocab
from sft import hf_folder

ROOT = Path(__file__).resolve().parent.parent
MARKERS = {"<|im_start|>": 49_152, "<|im_end|>": 49_153, "<think>": 49_154, "</think>": 49_155}


def write_base(folder, tokenizer_dir, tied=True, rows=49_152, **save):
    """Write a tiny random bfloat16 Llama with the tokenizer of `tokenizer_dir`; return the folder."""
    config = transformers.LlamaConfig(
        vocab_size=rows, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=tied, eos_token_id=0, bos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, **save)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer_dir / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def prepared(bpe_tokenizer_dir, tmp_path_factory):
    """The base's tokenizer with the four tokens appended, as prepare_data.py saves it."""
    backend = Tokenizer.from_file(str(bpe_tokenizer_dir / "tokenizer.json"))
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in list(MARKERS)[:2]])
    backend.add_tokens([AddedToken(token, normalized=False) for token in list(MARKERS)[2:]])
    names = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, chat_template="{{ messages }}", **names)
    tokenizer.save_pretrained(folder := tmp_path_factory.mktemp("prepared"))
    return folder


def run(base, tokenizer, output, **options):
    command = [sys.executable, ROOT / "resize_vocab.py", "--base-model", base, "--tokenizer", tokenizer]
    return subprocess.run([*map(str, command), "--output-dir", str(output)], capture_output=True, text=True, **options)


def weights(folder):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard", ["1GB", "300KB"])
def test_new_rows_are_the_mean_and_everything_else_keeps_its_bits(tmp_path, bpe_tokenizer_dir, prepared, tied, shard):
    base = write_base(tmp_path / "base", bpe_tokenizer_dir, tied, max_shard_size=shard)
    result = run(base, prepared, tmp_path / "out")
    assert result.returncode == 0, result.stderr
    before, after = weights(base), weights(tmp_path / "out")
    assert before.keys() == after.keys() and ("lm_head.weight" in after) is not tied
    for name, tensor in before.items():
        assert torch.equal(after[name][: len(tensor)], tensor), name
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            assert len(after[name]) == 49_156 and after[name].dtype == torch.bfloat16
            mean = tensor.float().mean(0).to(torch.bfloat16)
            assert all(torch.equal(row, mean) for row in after[name][49_152:])
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    rows = len(model.get_input_embeddings().weight)
    assert rows == len(model.get_output_embeddings().weight) == model.config.vocab_size == len(tokenizer) == 49_156
    assert model.config.eos_token_id == 49_153 and model.generation_config.eos_token_id == [49_153, 0]
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id != 49_153
    for path in prepared.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    facts = json.loads((tmp_path / "out" / "resize.json").read_text())
    assert facts["new_ids"] == MARKERS and facts["base_rows"] == 49_152 and facts["averaged_rows"] == 49_152
    assert "49,152 -> 49,156 rows" in result.stdout and "verified" in result.stdout


def test_new_ids_inside_padding_are_set_and_padding_takes_no_part_in_the_mean(tmp_path, bpe_tokenizer_dir, prepared):
    base = write_base(tmp_path / "base", bpe_tokenizer_dir, rows=49_280)
    result = run(base, prepared, tmp_path / "out")
    assert result.returncode == 0 and "124 rows beyond the last token" in result.stdout, result.stderr
    before, after = (weights(folder)["model.embed_tokens.weight"] for folder in (base, tmp_path / "out"))
    assert before.shape == after.shape
    assert torch.equal(after[49_154], before[:49_152].float().mean(0).to(torch.bfloat16))
    assert torch.equal(after[49_156:], before[49_156:]) and torch.equal(after[:49_152], before[:49_152])


def test_a_tied_model_saved_with_a_copy_of_its_head_loses_the_copy(tmp_path, bpe_tokenizer_dir, prepared):
    base = write_base(tmp_path / "base", bpe_tokenizer_dir)
    tensors = weights(base)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    assert run(base, prepared, tmp_path / "out").returncode == 0
    assert "lm_head.weight" not in weights(tmp_path / "out")


def test_a_base_that_has_the_tokens_already_stays_as_it_is(tmp_path, bpe_tokenizer_dir, prepared):
    base = write_base(tmp_path / "base", bpe_tokenizer_dir, rows=49_156)
    shutil.copyfile(prepared / "tokenizer.json", base / "tokenizer.json")
    assert (result := run(base, prepared, tmp_path / "out")).returncode == 0, result.stderr
    before, after = weights(base), weights(tmp_path / "out")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads((tmp_path / "out" / "resize.json").read_text())["new_ids"] == {}


def test_nothing_but_a_tokenizer_is_copied_from_its_folder_and_its_bos_counts(tmp_path, bpe_tokenizer_dir, prepared):
    base = write_base(tmp_path / "base", bpe_tokenizer_dir)
    tokenizer = shutil.copytree(prepared, tmp_path / "tokenizer")
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(base / name, tokenizer / name)
    (tokenizer / "older").mkdir()
    names = json.loads((tokenizer / "tokenizer_config.json").read_text()) | {"bos_token": {"content": "<|im_start|>"}}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(names))
    assert (result := run(base, tokenizer, tmp_path / "out")).returncode == 0, result.stderr
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "out" / name).read_text())["bos_token_id"] == 49_152
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 49_156


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(base, **changes):
    """Replace tensors of the model, `__` standing for a dot; None removes one, a function gets all of them."""
    tensors = weights(base)
    for name, change in changes.items():
        tensors[name.replace("__", ".")] = change(tensors) if callable(change) else change
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, base / "model.safetensors", metadata={"format": "pt"})


def edit_tokenizer(prepared, change):
    state = json.loads((prepared / "tokenizer.json").read_text())
    change(state)
    (prepared / "tokenizer.json").write_text(json.dumps(state))


def swap(state):
    """Exchange the ids of two ordinary tokens."""
    vocab = state["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]


def write_index(base, **places):
    edit = {"weight_map": dict.fromkeys(weights(base), "model.safetensors") | places}
    (base / "model.safetensors.index.json").write_text(json.dumps(edit))


REFUSALS = [
    (lambda base, prepared: shutil.rmtree(base), "config.json is missing"),
    (lambda base, prepared: (base / "tokenizer.json").unlink(), "no readable tokenizer.json"),
    (lambda base, prepared: (prepared / "tokenizer.json").write_text("{"), "no readable tokenizer.json"),
    (lambda base, prepared: (prepared / "tokenizer_config.json").unlink(), "tokenizer_config.json is missing"),
    (lambda base, prepared: (base / "config.json").write_text("[]"), "holds a list, not an object"),
    (lambda base, prepared: edit_json(base / "config.json", model_type="x"), "describes no model that transformers"),
    (
        lambda base, prepared: edit_json(base / "config.json", vocab_size=9),
        "49152 rows, but config.json says vocab_size 9",
    ),
    (lambda base, prepared: edit_json(base / "config.json", tie_word_embeddings=False), "there is no tensor lm_head"),
    (lambda base, prepared: edit_json(base / "config.json", num_hidden_layers=3), "does not load strictly: {'missing"),
    (lambda base, prepared: edit_json(base / "config.json", hidden_size=32), "does not load with transformers"),
    (
        lambda base, prepared: (base / "model.safetensors").rename(base / "pytorch_model.bin"),
        "has pytorch_model.bin, but no model.safetensors. Only safetensors are read",
    ),
    (lambda base, prepared: (base / "model.safetensors").unlink(), "has no model.safetensors. Name the folder"),
    (lambda base, prepared: (base / "model.safetensors").write_bytes(b"x" * 99), "is no readable safetensors file"),
    (lambda base, prepared: write_index(base, extra="../a"), "holds no map from tensors to files of that folder"),
    (lambda base, prepared: write_index(base, extra="model.safetensors"), "disagree about the tensor extra"),
    (lambda base, prepared: edit_weights(base, model__embed_tokens__weight=None), "has no tensor model.embed_tokens"),
    (lambda base, prepared: edit_weights(base, model__norm__weight=None), "does not load strictly: {'missing_keys'"),
    (lambda base, prepared: edit_weights(base, model__wte=torch.ones(2)), "does not load strictly: {'unexpected_keys'"),
    (
        lambda base, prepared: edit_weights(base, model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4)),
        "rotary_emb.inv_freq is no parameter of its model",
    ),
    (
        lambda base, prepared: edit_weights(base, lm_head__weight=lambda old: old["model.embed_tokens.weight"] + 1),
        "says tied embeddings, but lm_head.weight differs",
    ),
    (lambda base, prepared: edit_tokenizer(prepared, swap), "is no extension of the base's tokenizer: token"),
    (
        lambda base, prepared: edit_tokenizer(prepared, lambda state: state.update(normalizer={"type": "NFKC"})),
        "is no extension of the base's tokenizer: its normalizer differs",
    ),
    (
        lambda base, prepared: edit_tokenizer(prepared, lambda state: state["model"]["merges"].pop()),
        "is no extension of the base's tokenizer: its model differs",
    ),
    (
        lambda base, prepared: edit_json(prepared / "tokenizer_config.json", eos_token="<|endoftext|>"),
        "ends turns with '<|endoftext|>', not <|im_end|>",
    ),
    (
        lambda base, prepared: edit_json(prepared / "tokenizer_config.json", pad_token="<|im_end|>"),
        "it must be a token other than <|im_end|>",
    ),
]


@pytest.mark.parametrize(("harm", "sentence"), REFUSALS)
def test_what_does_not_belong_together_is_refused(tmp_path, bpe_tokenizer_dir, prepared, monkeypatch, harm, sentence):
    base = write_base(tmp_path / "base", bpe_tokenizer_dir)
    tokenizer = shutil.copytree(prepared, tmp_path / "tokenizer")
    harm(base, tokenizer)
    for name, folder in (("BASE_MODEL", base), ("TOKENIZER", tokenizer), ("OUTPUT_DIR", tmp_path / "out")):
        monkeypatch.setattr(resize_vocab, name, str(folder))
    with pytest.raises(SystemExit) as refusal:
        resize_vocab.main({})
    assert sentence in str(refusal.value) and not list(tmp_path.glob("out*"))


def test_a_vocabulary_with_holes_gives_no_token_the_row_of_another():
    base = Tokenizer(models.WordLevel({"a": 0, "b": 2, "c": 3}, unk_token="a"))
    extended = Tokenizer.from_str(base.to_str())
    extended.add_tokens(["new", "other"])
    with pytest.raises(SystemExit, match="the new token 'new' has the id 3 of 'c'"):
        resize_vocab.check_extension(base, extended, "folder")


def test_bits_are_compared_not_values():
    one = torch.tensor([0.0, float("nan")])
    assert hf_folder.same_bits(one, one.clone()) and not hf_folder.same_bits(one, -one)
    assert not hf_folder.same_bits(one, one[:1]) and not hf_folder.same_bits(one, one.bfloat16())


def test_a_full_disk_is_a_sentence_and_stays_as_full_as_it_was(tmp_path, bpe_tokenizer_dir, prepared):
    base = write_base(tmp_path / "base", bpe_tokenizer_dir)
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))  # noqa: E731
    result = run(base, prepared, tmp_path / "out", preexec_fn=limit)
    assert result.returncode == 1 and "out cannot be written" in result.stderr and "Traceback" not in result.stderr
    assert not list(tmp_path.glob("out*"))


def test_a_model_with_fewer_rows_than_its_tokenizer_is_refused(tmp_path, bpe_tokenizer_dir, prepared):
    base = write_base(tmp_path / "base", bpe_tokenizer_dir, rows=49_000)
    result = run(base, prepared, tmp_path / "out")
    assert result.returncode == 1 and "has the id 49151, its model only 49000 rows" in result.stderr


def test_a_folder_that_holds_something_is_left_alone(tmp_path, bpe_tokenizer_dir, prepared):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    result = run(write_base(tmp_path / "base", bpe_tokenizer_dir), prepared, tmp_path / "out")
    assert result.returncode == 1 and "out is not empty" in result.stderr
    assert (tmp_path / "out" / "thesis.txt").read_text() == "precious"
