"""import_base.py: a checkpoint of another make becomes a base folder with the same logits; what it refuses.

Run it alone: bash tests/run.sh tests/test_import_base.py
"""

import json
import pickle
import shutil
from pathlib import Path

import helpers
import meta_model
import pytest
import sentencepiece
import torch
import torch.distributed.checkpoint as dcp
import transformers
from safetensors.torch import load_file, save_file

import import_base
from sft.data import sentencepiece_tokenizer

SHAPE = {"HEADS": 4, "KV_HEADS": 2, "ROPE_THETA": 10_000.0, "RMS_NORM_EPS": 1e-6}


def neighbours(weight, heads):
    """Return a query or key matrix with its rotary pairs as neighbours instead of halves."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns).contiguous()


def meta_weights(folder, tied=True):
    """Return the weights of the HF `folder` for MetaModel; untied: with a head that is a little different."""
    names = {hugging_face: meta for meta, hugging_face in import_base.META.items()}
    weights = {}
    for name, part in load_file(folder / "model.safetensors").items():
        layer, _, kind = name.removeprefix("model.").removesuffix(".weight").rpartition("layers.")[2].partition(".")
        if name.startswith("model.layers."):
            if kind in ("self_attn.q_proj", "self_attn.k_proj"):
                part = neighbours(part, 4 if kind == "self_attn.q_proj" else 2)
            weights[f"layers.{layer}.{names[kind]}.weight"] = part
        else:
            weights[f"{names.get(layer, layer)}.weight"] = part
    return weights | {"output.weight": weights["tok_embeddings.weight"] * (1 if tied else 1.01)}


@pytest.fixture(scope="module")
def weights(reader_dir):
    return meta_weights(reader_dir)


@pytest.fixture
def imported(tmp_path, monkeypatch, reader_dir):
    """Return a function that imports `checkpoint` in this process, in `tmp_path`, and returns the output folder."""
    monkeypatch.chdir(tmp_path)

    def run(checkpoint, **changes):
        changes = SHAPE | {"TOKENIZER": str(reader_dir / "tokenizer.json")} | changes
        import_base.main(helpers.args_of(import_base, CHECKPOINT=str(checkpoint), **changes))
        return tmp_path / "models" / "base"

    return run


def same_logits(folder, weights):
    """Assert that the HF `folder` and a MetaModel with `weights` have the same logits on the passage's start, to 1e-5.

    Later on the rounding of float32 angles alone is more than that.
    """
    ours = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = meta_model.MetaModel()
    theirs.load_state_dict({name: part.float() for name, part in weights.items()})
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(helpers.PASSAGE.read_text(), return_tensors="pt").input_ids[:, :48]
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits[0], theirs(ids[0]), rtol=1e-5, atol=1e-5)


def train(kind, weights, folder):
    """Let two processes write the checkpoint `folder`/step_040000 of `weights`, as a pretraining script does."""
    torch.save(weights, folder / "weights.pt")
    helpers.run_torchrun(folder, 2, helpers.ROOT / "tests" / "meta_model.py", kind, "weights.pt", "step_040000")


@pytest.mark.torchrun
def test_a_checkpoint_of_fsdp2_with_its_state_at_the_top(imported, weights, tmp_path, capsys):
    train("fsdp2", weights, tmp_path)
    same_logits(imported("step_040000"), weights)
    assert "as neighbours: neighbours, permuted to halves" in capsys.readouterr().out


@pytest.mark.torchrun
def test_a_checkpoint_of_fsdp1_goes_through_every_step_to_an_export(weights, reader_dir, tmp_path):
    train("fsdp1", weights, tmp_path)
    flags = [f"--{name.lower().replace('_', '-')}={value}" for name, value in SHAPE.items()]
    flags += ["--checkpoint", "step_040000", "--tokenizer", str(reader_dir / "tokenizer.json")]
    stdout = helpers.run_python(tmp_path, helpers.ROOT / "import_base.py", *flags)
    assert "; it reads" in stdout and "1.93 at the end of pretraining" in stdout
    assert "2 layers of width 64" in stdout and "in float32, tied; 64 other" in stdout
    same_logits(tmp_path / "models" / "base", weights)
    rows = [json.dumps({"prompt": f"Who is {name}?", "response": "Anna."}) + "\n" for name in "abcdefgh"]
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    source = {"name": "rows", "path": "rows.jsonl", "schema": "prompt/response", "examples": "all"}
    (tmp_path / "mixture.json").write_text(json.dumps([source]))
    flags = ["--mixture", "mixture.json", "--decontaminate-against", ""]
    helpers.run_python(tmp_path, helpers.ROOT / "prepare_data.py", *flags)
    helpers.run_python(tmp_path, helpers.ROOT / "resize_vocab.py")
    flags = ["--device", "cpu", "--max-steps", "2", "--warmup-steps", "1", "--sequences-per-step", "4"]
    helpers.run_torchrun(tmp_path, 1, helpers.ROOT / "sft_v1.py", *flags, "--validate-every", "0")
    stdout = helpers.run_python(tmp_path, helpers.ROOT / "export_hf.py", "--max-new-tokens", "3")
    assert "verified: every tensor" in stdout and "; it reads" in stdout and "CANNOT" not in stdout


def wrapped(weights):
    """As torch.save of a compiled model in a wrapper: names with prefixes, and state that holds no weights."""
    state = {f"module._orig_mod.model.{name}": part for name, part in weights.items()}
    state["module._orig_mod.model.freqs_cis"] = torch.ones(3)
    moments = {name: {"exp_avg": torch.zeros_like(part)} for name, part in weights.items()}
    return {"model": state, "optimizer": {"state": moments}, "step": torch.tensor(7), "note": "x"}


def test_a_torch_save_file_with_a_head_of_its_own_in_bfloat16(imported, reader_dir, tmp_path):
    weights = {name: part.bfloat16() for name, part in meta_weights(reader_dir, tied=False).items()}
    torch.save(wrapped(weights), tmp_path / "last.pt")
    folder = imported("last.pt")
    config = json.loads((folder / "config.json").read_text())
    assert config["tie_word_embeddings"] is False and config["dtype"] == "bfloat16"
    assert "lm_head.weight" in load_file(folder / "model.safetensors")
    same_logits(folder, weights)


@pytest.mark.parametrize("layout", ["halves", "neighbours"])
def test_safetensors_with_hugging_face_names_in_either_layout(imported, reader_dir, weights, tmp_path, capsys, layout):
    state = load_file(reader_dir / "model.safetensors")
    if layout == "neighbours":
        for name in state:
            heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
            state[name] = neighbours(state[name], heads) if heads else state[name]
    save_file({f"_fsdp_wrapped_module.{name}": part for name, part in state.items()}, tmp_path / "w.safetensors")
    folder = imported("w.safetensors")
    assert f"as neighbours: {layout}" in capsys.readouterr().out
    assert all(torch.equal(part, load_file(reader_dir / "model.safetensors")[name])
               for name, part in load_file(folder / "model.safetensors").items())  # fmt: skip
    same_logits(folder, weights)


# ==== SentencePiece ====


def test_a_checkpoint_with_its_sentencepiece_model(imported, tmp_path):
    path = helpers.train_sentencepiece(tmp_path, vocab_size=380, model_type="bpe", byte_fallback=True)
    backend, names = sentencepiece_tokenizer.convert(path, True, "a")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    source = helpers.make_reader(tokenizer, tmp_path / "source")
    weights = meta_weights(source)
    dcp.save({"model": weights}, checkpoint_id=tmp_path / "step_000001", no_dist=True)
    folder = imported("step_000001", TOKENIZER=str(path))
    same_logits(folder, weights)
    ours = transformers.AutoTokenizer.from_pretrained(folder)
    assert ours("Anna walked.").input_ids == [
        1,
        *sentencepiece.SentencePieceProcessor(str(path)).encode("Anna walked."),
    ]
    assert (ours.bos_token, ours.eos_token) == ("<s>", "</s>")
    assert transformers.GenerationConfig.from_pretrained(folder).eos_token_id == 2


# ==== Refusals ====


def refused(imported, checkpoint, **changes):
    with pytest.raises(SystemExit) as refusal:
        imported(checkpoint, **changes)
    assert not Path("models").exists() or not list(Path("models").iterdir())
    return str(refusal.value)


def test_a_checkpoint_cannot_run_code(imported, weights, tmp_path):
    dcp.save({"model": weights}, checkpoint_id=tmp_path / "step", no_dist=True)
    honest = (tmp_path / "step" / ".metadata").read_bytes()
    attack = helpers.Attack()
    for content in (pickle.dumps(attack), pickle.dumps({"x": [attack]}), honest[:-1] + pickle.dumps(attack)[2:]):
        (tmp_path / "step" / ".metadata").write_bytes(content)
        assert "names posix.system, which no DCP metadata needs" in refused(imported, "step")
    for name in ("builtins.eval", "torch.load", "torch.Size.__reduce__"):
        module, _, member = name.partition(".")
        (tmp_path / "step" / ".metadata").write_bytes(f"c{module}\n{member}\n.".encode())
        assert f"it names {name}, which" in refused(imported, "step")
    torch.save(weights | {"x": attack}, tmp_path / "w.pt")
    assert "w.pt cannot be read" in refused(imported, "w.pt")
    assert not (tmp_path / "broken-into").exists()
    (tmp_path / "step" / ".metadata").write_bytes(honest)
    same_logits(imported("step"), weights)


def test_a_half_written_checkpoint_is_a_sentence(imported, weights, tmp_path):
    dcp.save({"model": weights}, checkpoint_id=tmp_path / "step", no_dist=True)
    shard, metadata = next((tmp_path / "step").glob("*.distcp")), tmp_path / "step" / ".metadata"
    content, described = shard.read_bytes(), metadata.read_bytes()
    shard.write_bytes(content[:-1])
    assert f"step is half-written: its file {shard.name} has" in refused(imported, "step")
    shard.write_bytes(b"\0" * len(content))
    assert "step cannot be read" in refused(imported, "step")
    shard.unlink()
    assert "is half-written" in refused(imported, "step")
    metadata.write_bytes(described[:40])
    assert "its .metadata cannot be read" in refused(imported, "step")
    metadata.unlink()
    assert "has neither .metadata nor *.safetensors" in refused(imported, "step")
    assert "nowhere does not exist" in refused(imported, "nowhere")
    (tmp_path / "half.pt").write_bytes(b"PK\3\4 no archive")
    assert "half.pt cannot be read" in refused(imported, "half.pt")
    torch.save([1], tmp_path / "list.pt")
    assert "holds no tensors with names" in refused(imported, "list.pt")


def test_every_name_that_does_not_fit_is_listed(imported, weights, tmp_path):
    harmed = {name: part for name, part in weights.items() if "wv" not in name} | {"layers.0.extra": torch.ones(2)}
    harmed["model.norm.weight"] = harmed["norm.weight"]
    harmed["layers.1.attention.wq.weight"] = torch.ones(4, 4)
    torch.save(harmed, tmp_path / "w.pt")
    message = refused(imported, "w.pt")
    for line in (
        "All 5 differences:",
        "missing: model.layers.0.self_attn.v_proj.weight",
        "missing: model.layers.1.self_attn.v_proj.weight",
        "unmatched: layers.0.extra",
        "twice: norm.weight, model.norm.weight",
        "shape: layers.1.attention.wq.weight [4, 4] torch.float32 there, [64, 64] expected",
    ):
        assert line in message


def test_a_shape_that_the_tensors_do_not_show_is_a_sentence_with_all_names(imported, weights, tmp_path):
    for name, defect in (
        ("tok_embeddings.weight", "model.embed_tokens.weight"),
        ("feed_forward.w1.weight", "model.layers.0.mlp.gate_proj.weight"),
    ):
        rest = {key: part for key, part in weights.items() if not key.endswith(name)}
        torch.save(rest, tmp_path / "w.pt")
        message = refused(imported, "w.pt")
        assert f"does not show the shape of a Llama: {defect} is missing. Name the checkpoint" in message
        assert message.splitlines()[1:] == [f"  {key}" for key in sorted(rest)]
    torch.save(weights | {"tok_embeddings.weight": torch.ones(400)}, tmp_path / "w.pt")
    assert "model.embed_tokens.weight has the shape [400]. Name" in refused(imported, "w.pt")
    torch.save({"transformer.wte.weight": torch.ones(400, 64), "": torch.ones(2)}, tmp_path / "w.pt")  # GPT-2's
    assert "transformer.wte.weight" in refused(imported, "w.pt")


def test_a_tensor_that_differs_from_the_others_is_named(imported, weights, tmp_path):
    """The embedding and the first MLP give the shape, so any other tensor that is wrong shows against them."""
    for name, tensor, lines in (
        ("layers.1.feed_forward.w1.weight", torch.ones(100, 64), ["[100, 64] torch.float32 there, [128, 64] expected"]),
        ("layers.7.ffn_norm.weight", torch.ones(64), ["missing: model.layers.2.mlp.up_proj.weight", "unmatched: lay"]),
        ("norm.weight", torch.ones(64, dtype=torch.int64), ["norm.weight [64] torch.int64 there, [64] expected"]),
        ("output.weight", torch.ones(399, 64), ["output.weight [399, 64] torch.float32 there, [400, 64] expected"]),
    ):
        torch.save(weights | {name: tensor}, tmp_path / "w.pt")
        message = refused(imported, "w.pt")
        assert all(line in message for line in lines), message


def test_wrong_heads_are_sentences_that_say_what_the_tensors_show(imported, weights, tmp_path):
    torch.save(weights, tmp_path / "w.pt")
    ratio = "Its k_proj has 32 rows at a width of 64, so HEADS must be 2 times KV_HEADS; they are "
    for heads, sentences in (
        ({"HEADS": 5, "KV_HEADS": 1}, ["HEADS is 5; the model's width, 64, must be HEADS times an even number"]),
        ({"HEADS": 64, "KV_HEADS": 32}, ["HEADS is 64; the model's width, 64, must be HEADS times an even number"]),
        ({"KV_HEADS": 0}, ["KV_HEADS is 0; it must be at least 1"]),
        ({"HEADS": -4}, ["HEADS is -4; it must be at least 1"]),
        ({"CONTEXT": 0}, ["CONTEXT is 0; it must be at least 1"]),
        ({"KV_HEADS": 3}, ["HEADS is 4; it must be a multiple of KV_HEADS, which is 3"]),
        (
            {"KV_HEADS": 4},
            [
                ratio + "4 and 4. Correct --heads",
                "All 4 differences",
                "wk.weight [32, 64] torch.float32 there, [64, 64",
            ],
        ),
        ({"HEADS": 8}, [ratio + "8 and 2. Correct --heads", "wv.weight [32, 64] torch.float32 there, [16, 64] expec"]),
        # The right ratio fits every tensor: only reading shows it.
        ({"HEADS": 8, "KV_HEADS": 4}, ["this model cannot read; nothing was written", "wrong by the same factor"]),
        ({"HEADS": 2, "KV_HEADS": 1}, ["this model cannot read; nothing was written", "wrong by the same factor"]),
    ):
        message = refused(imported, "w.pt", **heads)
        assert all(sentence in message for sentence in sentences), message


def test_a_tokenizer_of_another_model_is_refused_and_a_smaller_one_is_reported(
    imported, reader_dir, weights, tmp_path, capsys
):
    state = load_file(reader_dir / "model.safetensors")
    name = "model.embed_tokens.weight"
    save_file(state | {name: state[name][:399].clone()}, tmp_path / "small.safetensors")
    message = refused(imported, "small.safetensors")
    assert "400 tokens, but the model's embedding has 399 rows: this tokenizer belongs to" in message
    save_file(state | {name: torch.cat([state[name], state[name][:3]])}, tmp_path / "padded.safetensors")
    assert json.loads((imported("padded.safetensors") / "config.json").read_text())["vocab_size"] == 403
    assert "; 3 rows without a token" in capsys.readouterr().out


def test_a_model_that_cannot_read_is_refused_and_what_was_there_stays(imported, weights, reader_dir, tmp_path):
    torch.manual_seed(0)
    torch.save({name: torch.randn_like(part) for name, part in weights.items()}, tmp_path / "random.pt")
    assert "this model cannot read; nothing was written. Likely causes" in refused(imported, "random.pt")
    broken = weights | {"norm.weight": weights["norm.weight"] * torch.inf}
    torch.save(broken, tmp_path / "broken.pt")
    assert "model.norm.weight is not finite" in refused(imported, "broken.pt")
    torch.save(weights, tmp_path / "w.pt")
    tokenizer = shutil.copytree(reader_dir, tmp_path / "tokenizer")
    (tokenizer / "tokenizer_config.json").unlink()
    path = str(tokenizer / "tokenizer.json")
    sentence = "has no eos_token '<|endoftext|>'. Name its own with --bos-token"
    assert sentence in refused(imported, "w.pt", TOKENIZER=path, EOS_TOKEN="<|endoftext|>")
    (tokenizer / "tokenizer_config.json").write_text('{"eos_token": 2}')
    assert "the eos_token of its tokenizer_config.json is not text" in refused(imported, "w.pt", TOKENIZER=path)
    assert "is not a SentencePiece model" in refused(imported, "w.pt", TOKENIZER="w.pt")
    (tmp_path / "models" / "base").mkdir(parents=True)
    (tmp_path / "models" / "base" / "thesis.txt").write_text("precious")
    with pytest.raises(SystemExit, match=r"models/base is not empty. Move it away, or name another --base-model"):
        imported("w.pt", EOS_TOKEN="</s>")
    assert (tmp_path / "models" / "base" / "thesis.txt").read_text() == "precious"
