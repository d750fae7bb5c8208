"""resize_vocab.py: new rows are means, old bits stay, and what does not belong together is refused.

Run it alone: bash tests/run.sh tests/test_resize_vocab.py
"""

import json
import shutil

import pytest
import torch
import transformers
from helpers import ROOT, args_of, edit_json, full_disk, run_python
from helpers import read_weights as weights
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, models

import resize_vocab
from sft import system

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
    """A data folder with the base's tokenizer and the four tokens appended, as prepare_data.py saves it."""
    backend = Tokenizer.from_file(str(bpe_tokenizer_dir / "tokenizer.json"))
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in list(MARKERS)[:2]])
    backend.add_tokens([AddedToken(token, normalized=False) for token in list(MARKERS)[2:]])
    names = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, chat_template="{{ messages }}", **names)
    data = tmp_path_factory.mktemp("prepared")
    tokenizer.save_pretrained(data / "tokenizer")
    return data


def run(base, data, output):
    """Resize in this process."""
    names = {"BASE_MODEL": str(base), "DATA_DIR": str(data), "RESIZED_MODEL": str(output)}
    resize_vocab.main(args_of(resize_vocab, **names))


def refused(base, data, output):
    """Return the sentence with which the folders are refused."""
    with pytest.raises(SystemExit) as refusal:
        run(base, data, output)
    return str(refusal.value)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard", ["1GB", "300KB"])
def test_new_rows_are_the_mean_and_everything_else_keeps_its_bits(
    tmp_path, bpe_tokenizer_dir, prepared, capsys, tied, shard
):
    base = write_base(tmp_path / "base", bpe_tokenizer_dir, tied, max_shard_size=shard)
    run(base, prepared, tmp_path / "out")
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
    for path in (prepared / "tokenizer").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    record = json.loads((tmp_path / "out" / "resize.json").read_text())
    assert record["new_ids"] == MARKERS and record["base_rows"] == 49_152 and record["averaged_rows"] == 49_152
    stdout = capsys.readouterr().out
    assert "49,152 -> 49,156 rows" in stdout and "verified" in stdout


def test_it_records_which_weights_it_was_made_from_and_which_it_wrote(tmp_path, bpe_tokenizer_dir, prepared):
    base = write_base(tmp_path / "base", bpe_tokenizer_dir, max_shard_size="300KB")
    (tmp_path / "cache").mkdir()
    for number, path in enumerate(sorted(base.glob("*.safetensors"))):  # as the hub's cache has them
        path.symlink_to(path.rename(tmp_path / "cache" / f"{number}"))
    run(base, prepared, tmp_path / "out")
    digests = json.loads((tmp_path / "out" / "resize.json").read_text())["weights_sha256"]
    assert digests == {"base": system.weight_digests(base), "resized": system.weight_digests(tmp_path / "out")}
    assert len(digests["base"]) > 1 and all(len(digest) == 64 for digest in digests["base"].values())


def test_new_ids_inside_padding_are_set_and_padding_takes_no_part_in_the_mean(
    tmp_path, bpe_tokenizer_dir, prepared, capsys
):
    base = write_base(tmp_path / "base", bpe_tokenizer_dir, rows=49_280)
    run(base, prepared, tmp_path / "out")
    assert "124 rows beyond the last token" in capsys.readouterr().out
    before, after = (weights(folder)["model.embed_tokens.weight"] for folder in (base, tmp_path / "out"))
    assert before.shape == after.shape
    assert torch.equal(after[49_154], before[:49_152].float().mean(0).to(torch.bfloat16))
    assert torch.equal(after[49_156:], before[49_156:]) and torch.equal(after[:49_152], before[:49_152])


def test_a_tied_model_saved_with_a_copy_of_its_head_loses_the_copy(tmp_path, bpe_tokenizer_dir, prepared):
    base = write_base(tmp_path / "base", bpe_tokenizer_dir)
    tensors = weights(base)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    run(base, prepared, tmp_path / "out")
    assert "lm_head.weight" not in weights(tmp_path / "out")


def test_a_base_that_has_the_tokens_already_stays_as_it_is(tmp_path, bpe_tokenizer_dir, prepared):
    base = write_base(tmp_path / "base", bpe_tokenizer_dir, rows=49_156)
    shutil.copyfile(prepared / "tokenizer" / "tokenizer.json", base / "tokenizer.json")
    run(base, prepared, tmp_path / "out")
    before, after = weights(base), weights(tmp_path / "out")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads((tmp_path / "out" / "resize.json").read_text())["new_ids"] == {}


def test_nothing_but_a_tokenizer_is_copied_from_its_folder_and_its_bos_counts(tmp_path, bpe_tokenizer_dir, prepared):
    base = write_base(tmp_path / "base", bpe_tokenizer_dir)
    tokenizer = shutil.copytree(prepared, tmp_path / "data") / "tokenizer"
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(base / name, tokenizer / name)
    (tokenizer / "older").mkdir()
    names = json.loads((tokenizer / "tokenizer_config.json").read_text()) | {"bos_token": {"content": "<|im_start|>"}}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(names))
    run(base, tmp_path / "data", tmp_path / "out")
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "out" / name).read_text())["bos_token_id"] == 49_152
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 49_156


def edit_weights(base, **changes):
    """Replace tensors of the model, `__` standing for a dot; None removes one, a function gets all of them."""
    tensors = weights(base)
    for name, change in changes.items():
        tensors[name.replace("__", ".")] = change(tensors) if callable(change) else change
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, base / "model.safetensors", metadata={"format": "pt"})


def edit_tokenizer(folder, change):
    state = json.loads((folder / "tokenizer.json").read_text())
    change(state)
    (folder / "tokenizer.json").write_text(json.dumps(state))


def swap(state):
    """Exchange the ids of two ordinary tokens."""
    vocab = state["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]


def write_index(base, **entries):
    """Write an index that names one file for every tensor, with further `entries`."""
    index = {"weight_map": dict.fromkeys(weights(base), "model.safetensors") | entries}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))


REFUSALS = [
    (lambda base, tokenizer: shutil.rmtree(base), "config.json is missing"),
    (lambda base, tokenizer: (base / "tokenizer.json").unlink(), "no readable tokenizer.json"),
    (lambda base, tokenizer: (tokenizer / "tokenizer.json").write_text("{"), "no readable tokenizer.json"),
    (lambda base, tokenizer: (tokenizer / "tokenizer_config.json").unlink(), "tokenizer_config.json is missing"),
    (lambda base, tokenizer: (base / "config.json").write_text("[]"), "holds a list, not an object"),
    (
        lambda base, tokenizer: edit_json(base / "config.json", model_type="x"),
        "has no config.json that transformers can read",
    ),
    (
        lambda base, tokenizer: edit_json(base / "config.json", vocab_size=9),
        "49152 rows, but config.json says vocab_size 9",
    ),
    (lambda base, tokenizer: edit_json(base / "config.json", tie_word_embeddings=False), "there is no tensor lm_head"),
    (
        lambda base, tokenizer: edit_json(base / "config.json", num_hidden_layers=3),
        "does not load strictly: {'missing keys",
    ),
    (lambda base, tokenizer: edit_json(base / "config.json", hidden_size=32), "can't be loaded as a model"),
    (
        lambda base, tokenizer: (base / "model.safetensors").rename(base / "pytorch_model.bin"),
        "has pytorch_model.bin, but no model.safetensors. Only safetensors are read",
    ),
    (lambda base, tokenizer: (base / "model.safetensors").unlink(), "has no model.safetensors. Name the folder"),
    (lambda base, tokenizer: (base / "model.safetensors").write_bytes(b"x" * 99), "is not a readable safetensors file"),
    (lambda base, tokenizer: write_index(base, extra="../a"), "has no map from tensors to files of that folder"),
    (lambda base, tokenizer: write_index(base, extra=3), "has no map from tensors to files of that folder"),
    (lambda base, tokenizer: write_index(base, extra="model.safetensors"), "disagree about the tensor extra"),
    (lambda base, tokenizer: edit_weights(base, model__embed_tokens__weight=None), "has no tensor model.embed_tokens"),
    (lambda base, tokenizer: edit_weights(base, model__norm__weight=None), "does not load strictly: {'missing keys'"),
    (
        lambda base, tokenizer: edit_weights(base, model__wte=torch.ones(2)),
        "does not load strictly: {'unexpected keys'",
    ),
    (
        lambda base, tokenizer: edit_weights(base, model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4)),
        "rotary_emb.inv_freq is not a parameter of its model",
    ),
    (
        lambda base, tokenizer: edit_weights(base, lm_head__weight=lambda old: old["model.embed_tokens.weight"] + 1),
        "says tied embeddings, but lm_head.weight differs",
    ),
    (lambda base, tokenizer: edit_tokenizer(tokenizer, swap), "doesn't extend the base's tokenizer: token"),
    (
        lambda base, tokenizer: edit_tokenizer(tokenizer, lambda state: state.update(normalizer={"type": "NFKC"})),
        "doesn't extend the base's tokenizer: its normalizer differs",
    ),
    (
        lambda base, tokenizer: edit_tokenizer(tokenizer, lambda state: state["model"]["merges"].pop()),
        "doesn't extend the base's tokenizer: its model differs",
    ),
    (
        lambda base, tokenizer: edit_json(tokenizer / "tokenizer_config.json", eos_token="<|endoftext|>"),
        "ends turns with '<|endoftext|>', not <|im_end|>",
    ),
    (
        lambda base, tokenizer: edit_json(tokenizer / "tokenizer_config.json", pad_token="<|im_end|>"),
        "it must be a token other than <|im_end|>",
    ),
]


@pytest.mark.parametrize(("harm", "sentence"), REFUSALS)
def test_what_does_not_belong_together_is_refused(tmp_path, bpe_tokenizer_dir, prepared, harm, sentence):
    base = write_base(tmp_path / "base", bpe_tokenizer_dir)
    data = shutil.copytree(prepared, tmp_path / "data")
    harm(base, data / "tokenizer")
    assert sentence in refused(base, data, tmp_path / "out") and not list(tmp_path.glob("out*"))


def test_a_vocabulary_with_holes_gives_no_token_the_row_of_another():
    base = Tokenizer(models.WordLevel({"a": 0, "b": 2, "c": 3}, unk_token="a"))
    extended = Tokenizer.from_str(base.to_str())
    extended.add_tokens(["new", "other"])
    with pytest.raises(SystemExit, match="the new token 'new' has the id 3 of 'c'"):
        resize_vocab.check_extension(base, extended, "folder")


def test_a_full_disk_is_a_sentence_and_stays_as_full_as_it_was(tmp_path, bpe_tokenizer_dir, prepared):
    base = write_base(tmp_path / "base", bpe_tokenizer_dir)
    with full_disk(100_000):
        assert "out cannot be written" in refused(base, prepared, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_model_with_fewer_rows_than_its_tokenizer_is_refused(tmp_path, bpe_tokenizer_dir, prepared):
    base = write_base(tmp_path / "base", bpe_tokenizer_dir, rows=49_000)
    assert "has the id 49151, its model only 49000 rows" in refused(base, prepared, tmp_path / "out")


def test_a_folder_that_holds_something_is_left_alone(tmp_path, bpe_tokenizer_dir, prepared):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    base = write_base(tmp_path / "base", bpe_tokenizer_dir)
    flags = ["--base-model", base, "--data-dir", prepared, "--resized-model", tmp_path / "out"]
    error = run_python(tmp_path, ROOT / "resize_vocab.py", *flags, ok=False)  # as a process of its own
    assert "out is not empty. Move it away, or name another --resized-model" in error
    assert (tmp_path / "out" / "thesis.txt").read_text() == "precious"
