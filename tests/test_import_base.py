"""From a pretraining checkpoint of another make to a base folder with the same logits; and what is refused."""

import json
import os
import pickle
import shutil
import subprocess
import sys
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

ROOT = Path(__file__).resolve().parent.parent
SHAPE = {"VOCAB_SIZE": 400, "HIDDEN_SIZE": 64, "LAYERS": 2, "HEADS": 4, "KV_HEADS": 2, "INTERMEDIATE_SIZE": 128}
SHAPE |= {"ROPE_THETA": 10_000.0, "RMS_NORM_EPS": 1e-6}


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

    def run(checkpoint, **constants):
        constants = SHAPE | {"TOKENIZER": str(reader_dir / "tokenizer.json")} | constants
        for name, value in (constants | {"CHECKPOINT": str(checkpoint)}).items():
            monkeypatch.setattr(import_base, name, value)
        import_base.main({name: getattr(import_base, name) for name in dir(import_base) if name.isupper()})
        return tmp_path / import_base.OUTPUT_DIR

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
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    launcher += ["--rdzv-endpoint", "localhost:0"]
    call(folder, *launcher, str(ROOT / "tests" / "meta_model.py"), kind, "weights.pt", "step_040000")


def call(folder, *command):
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=folder, env=env)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_a_checkpoint_of_fsdp2_with_its_state_at_the_top(imported, weights, tmp_path, capsys):
    train("fsdp2", weights, tmp_path)
    same_logits(imported("step_040000"), weights)
    assert "as neighbours: neighbours, permuted to halves" in capsys.readouterr().out


def test_a_checkpoint_of_fsdp1_goes_through_every_step_to_an_export(weights, reader_dir, tmp_path):
    train("fsdp1", weights, tmp_path)
    flags = [f"--{name.lower().replace('_', '-')}={value}" for name, value in SHAPE.items()]
    flags += ["--checkpoint", "step_040000", "--tokenizer", str(reader_dir / "tokenizer.json")]
    told = call(tmp_path, str(ROOT / "import_base.py"), *flags)
    assert "; it reads" in told and "1.93 at the end of pretraining" in told and "in float32, tied; 64 other" in told
    same_logits(tmp_path / "models" / "base", weights)
    rows = [json.dumps({"prompt": f"Who is {name}?", "response": "Anna."}) + "\n" for name in "abcdefgh"]
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    source = {"name": "rows", "path": "rows.jsonl", "schema": "prompt/response", "examples": "all"}
    (tmp_path / "mixture.json").write_text(json.dumps([source]))
    call(tmp_path, str(ROOT / "prepare_data.py"), "--mixture", "mixture.json", "--decontaminate-against", "")
    call(tmp_path, str(ROOT / "resize_vocab.py"))
    flags = ["--device", "cpu", "--max-steps", "2", "--warmup-steps", "1", "--sequences-per-step", "4"]
    launcher = ["-m", "torch.distributed.run", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    call(tmp_path, *launcher, str(ROOT / "sft_v1.py"), *flags, "--validate-every", "0")
    told = call(tmp_path, str(ROOT / "export_hf.py"), "--max-new-tokens", "3")
    assert "verified: every tensor" in told and "; it reads" in told and "CANNOT" not in told


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


def train_sentencepiece(folder, **options):
    text = [line for line in helpers.PASSAGE.read_text().splitlines() if line] + ["def f(x):", "    return x"] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_prefix=str(folder / "tokenizer"), minloglevel=2, **options
    )
    return folder / "tokenizer.model"


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "allow_whitespace_only_pieces": True,
        },
        {
            "add_dummy_prefix": False,
            "bos_id": 3,
            "eos_id": 1,
            "unk_id": 0,
            "pad_id": 2,
            "byte_fallback": False,
            "vocab_size": 200,
        },
        {"split_digits": True, "user_defined_symbols": ["[INST]"]},
    ],
)
def test_a_sentencepiece_model_converts_to_the_same_ids(tmp_path, kind, options):
    path = train_sentencepiece(tmp_path, **({"vocab_size": 380, "model_type": kind, "byte_fallback": True} | options))
    tokenizer, names = sentencepiece_tokenizer.convert(path, True, helpers.PASSAGE.read_text())
    original = sentencepiece.SentencePieceProcessor(model_file=str(path))
    text = "Anna said that it rained."
    assert tokenizer.encode(text).ids == [original.bos_id(), *original.encode(text)]
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.token_to_id(names["eos_token"]) == original.eos_id()
    assert tokenizer.get_vocab_size() == original.get_piece_size()


def test_a_checkpoint_with_its_sentencepiece_model(imported, tmp_path):
    path = train_sentencepiece(tmp_path, vocab_size=380, model_type="bpe", byte_fallback=True)
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


class Attack:
    def __reduce__(self):
        return os.system, ("touch broken-into",)


def refused(imported, checkpoint, **constants):
    with pytest.raises(SystemExit) as refusal:
        imported(checkpoint, **constants)
    assert not Path("models").exists() or not list(Path("models").iterdir())
    return str(refusal.value)


def test_a_checkpoint_cannot_run_code(imported, weights, tmp_path):
    dcp.save({"model": weights}, checkpoint_id=tmp_path / "step", no_dist=True)
    honest = (tmp_path / "step" / ".metadata").read_bytes()
    for content in (pickle.dumps(Attack()), pickle.dumps({"x": [Attack()]}), honest[:-1] + pickle.dumps(Attack())[2:]):
        (tmp_path / "step" / ".metadata").write_bytes(content)
        assert "names posix.system, which no DCP metadata needs" in refused(imported, "step")
    for name in ("builtins.eval", "torch.load", "torch.Size.__reduce__"):
        module, _, member = name.partition(".")
        (tmp_path / "step" / ".metadata").write_bytes(f"c{module}\n{member}\n.".encode())
        assert f"it names {name}, which" in refused(imported, "step")
    torch.save(weights | {"x": Attack()}, tmp_path / "w.pt")
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
        "shape: layers.1.attention.wq.weight [4, 4] torch.float32 there, [64, 64] here",
    ):
        assert line in message


def test_a_model_that_cannot_read_is_refused_and_what_was_there_stays(imported, weights, reader_dir, tmp_path):
    torch.manual_seed(0)
    torch.save({name: torch.randn_like(part) for name, part in weights.items()}, tmp_path / "random.pt")
    assert "this model cannot read; nothing was written. Likely causes" in refused(imported, "random.pt")
    broken = weights | {"norm.weight": weights["norm.weight"] * torch.inf}
    torch.save(broken, tmp_path / "broken.pt")
    assert "model.norm.weight is not finite" in refused(imported, "broken.pt")
    torch.save(weights, tmp_path / "w.pt")
    tokenizer = shutil.copytree(reader_dir, tmp_path / "tokenizer")
    assert "400 tokens, VOCAB_SIZE is 399: it is another model" in refused(imported, "w.pt", VOCAB_SIZE=399)
    assert "HEADS times an even number" in refused(imported, "w.pt", HEADS=5)
    (tokenizer / "tokenizer_config.json").unlink()
    path = str(tokenizer / "tokenizer.json")
    sentence = "has no eos_token '<|endoftext|>'. Name its own with --bos-token"
    assert sentence in refused(imported, "w.pt", TOKENIZER=path, EOS_TOKEN="<|endoftext|>")
    (tokenizer / "tokenizer_config.json").write_text('{"eos_token": 2}')
    assert "the eos_token of its tokenizer_config.json is no text" in refused(imported, "w.pt", TOKENIZER=path)
    assert "is no SentencePiece model" in refused(imported, "w.pt", TOKENIZER="w.pt")
    (tmp_path / "models" / "base").mkdir(parents=True)
    (tmp_path / "models" / "base" / "thesis.txt").write_text("precious")
    with pytest.raises(SystemExit, match=r"models/base is not empty"):
        imported("w.pt", EOS_TOKEN="</s>")
    assert (tmp_path / "models" / "base" / "thesis.txt").read_text() == "precious"
