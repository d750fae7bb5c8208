"""resize_vocab.py: new rows are means, old bits stay, and what does not belong together is refused."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer

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


def run(base, tokenizer, output):
    command = [sys.executable, ROOT / "resize_vocab.py", "--base-model", base, "--tokenizer", tokenizer]
    return subprocess.run([*map(str, command), "--output-dir", str(output)], capture_output=True, text=True)


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


def harm_tokenizer(change):
    """Return a function that edits the tokenizer.json of a copy of the prepared folder."""

    def harm(base, prepared):
        state = json.loads((prepared / "tokenizer.json").read_text())
        change(state)
        (prepared / "tokenizer.json").write_text(json.dumps(state))

    return harm


def swap(state):
    """Exchange the ids of two ordinary tokens."""
    vocab = state["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]


REFUSALS = [
    (lambda base, prepared: shutil.rmtree(base), "config.json is missing"),
    (lambda base, prepared: (base / "tokenizer.json").unlink(), "no readable tokenizer.json"),
    (lambda base, prepared: (prepared / "tokenizer.json").write_text("{"), "no readable tokenizer.json"),
    (lambda base, prepared: (base / "config.json").write_text("[]"), "holds a list, not an object"),
    (
        lambda base, prepared: (base / "model.safetensors").rename(base / "pytorch_model.bin"),
        "has no model.safetensors, but pytorch_model.bin. Only safetensors are read",
    ),
    (lambda base, prepared: (base / "model.safetensors").write_bytes(b"x" * 99), "is no readable safetensors file"),
    (
        lambda base, prepared: save_file({"wte.weight": torch.zeros(2)}, base / "model.safetensors"),
        "has no tensor model.embed_tokens.weight",
    ),
    (harm_tokenizer(swap), "is no extension of the base's tokenizer: token"),
    (
        harm_tokenizer(lambda state: state.update(normalizer={"type": "NFKC"})),
        "is no extension of the base's tokenizer: its normalizer differs",
    ),
]


@pytest.mark.parametrize(("harm", "sentence"), REFUSALS)
def test_what_does_not_belong_together_is_refused(tmp_path, bpe_tokenizer_dir, prepared, harm, sentence):
    base = write_base(tmp_path / "base", bpe_tokenizer_dir)
    tokenizer = shutil.copytree(prepared, tmp_path / "tokenizer")
    harm(base, tokenizer)
    result = run(base, tokenizer, tmp_path / "out")
    assert result.returncode == 1 and sentence in result.stderr, result.stderr
    assert "Traceback" not in result.stderr and not (tmp_path / "out").exists()


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
