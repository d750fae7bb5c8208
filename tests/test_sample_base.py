"""sample_base.py: documents drawn from the model's own distribution, the same ones after a kill, and refusals.

Run it alone: bash tests/run.sh tests/test_sample_base.py
"""

import json
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from helpers import args_of, edit_json, prepare_args
from scipy import stats
from transformers import AutoModelForCausalLM

import prepare_data
import sample_base
from sft import hf_folder, system

SMALL = {"DOCUMENTS": 10, "BATCH_SIZE": 4, "MAX_TOKENS": 12, "DEVICE": "cpu"}


@pytest.fixture
def sample(reader_dir, tmp_path):
    """Return a function that runs the script with some settings changed, into tmp_path/NAME; it returns the file."""

    def run(name="out.jsonl", **changes):
        output = tmp_path / name
        sample_base.main(
            args_of(sample_base, **{"BASE_MODEL": str(reader_dir), "OUTPUT": str(output)} | SMALL | changes)
        )
        return output

    return run


def documents_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_stopped_at_any_byte_ends_with_the_bytes_of_one_that_was_not(sample, tmp_path, monkeypatch, capsys):
    whole = sample("whole.jsonl").read_bytes()
    assert [line["document"] for line in documents_of(tmp_path / "whole.jsonl")] == list(range(10))
    assert "whole.jsonl: 10 documents" in capsys.readouterr().out
    original, calls = sample_base.Base.sample, []

    def stopped(base, numbers, seed):
        calls.append(numbers)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(base, numbers, seed)

    monkeypatch.setattr(sample_base.Base, "sample", stopped)
    with pytest.raises(SystemExit, match=r"Stopped\. The same command continues"):
        sample()
    assert not (tmp_path / "out.jsonl").exists()
    parts = tmp_path / "out.jsonl.unfinished" / "documents.jsonl"
    written = parts.read_bytes()
    assert written == b"".join(whole.splitlines(keepends=True)[:8])
    for size in (len(written), len(written) - 1, len(written) - 2, len(written) // 2, 1, 0):
        parts.write_bytes(written[:size])
        calls[:] = [None] * 3  # nothing stops it any more
        state = shutil.copytree(tmp_path / "out.jsonl.unfinished", tmp_path / "state")
        assert sample().read_bytes() == whole, size
        kept = len(written[:size].splitlines()) - (size < len(written) - 1 and size > 0)
        assert len(calls) - 3 == 3 - kept // 4, size  # what was there is not sampled again
        assert not (tmp_path / "out.jsonl.unfinished").exists()
        (tmp_path / "out.jsonl").unlink()
        state.rename(tmp_path / "out.jsonl.unfinished")


def test_a_documents_text_depends_on_its_number_and_the_seed_not_on_its_batch(sample):
    documents = documents_of(sample())
    assert documents_of(sample("alone.jsonl", BATCH_SIZE=1)) == documents
    assert documents_of(sample("fewer.jsonl", DOCUMENTS=3)) == documents[:3]
    texts = {document["text"] for document in documents}
    assert len(texts) == 10
    assert not texts & {document["text"] for document in documents_of(sample("other.jsonl", SEED=43))}


def test_the_first_tokens_have_the_models_own_distribution_whatever_the_folder_says_about_sampling(
    sample, reader_dir, tmp_path
):
    base = shutil.copytree(reader_dir, tmp_path / "base")
    narrowed = {"do_sample": True, "temperature": 0.1, "top_k": 2, "begin_suppress_tokens": list(range(3, 200))}
    edit_json(base / "generation_config.json", **narrowed)
    number = 4000
    documents = documents_of(sample(BASE_MODEL=str(base), DOCUMENTS=number, BATCH_SIZE=1000, MAX_TOKENS=1))
    tokenizer = hf_folder.load_tokenizer(base)
    start, stops = sample_base.document_bounds(tokenizer, base, "")
    assert start == tokenizer.token_to_id("</s>") and stops == [start]  # its tokenizer adds no BOS
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(base)(input_ids=torch.tensor([[start]])).logits[0, -1]
    logits[[tokenizer.token_to_id(token) for token in ("<unk>", "<s>")]] = -torch.inf  # are no text
    expected = Counter()
    for token_id, probability in enumerate(logits.double().softmax(0).tolist()):
        text = "" if token_id == start else tokenizer.decode([token_id]).rstrip("\ufffd")
        expected[text] += probability
    found = Counter(document["text"] for document in documents)
    common = [text for text, probability in expected.items() if probability * number >= 5]
    assert len(common) > 5
    counts = [found[text] for text in common]
    chances = [expected[text] * number for text in common]
    counts, chances = [*counts, number - sum(counts)], [*chances, number - sum(chances)]
    assert stats.chisquare(counts, chances).pvalue > 1e-4
    assert {line["tokens"] for line in documents if line["ended"]} <= {0}


def test_noise_draws_from_the_softmax_and_never_chooses_what_is_suppressed():
    logits = torch.tensor([2.0, 1.0, 0.0, -3.0, -torch.inf])
    noise = sample_base.Noise(0, range(20_000))
    drawn = noise(None, logits.expand(20_000, 5)).argmax(dim=1)
    counts = np.bincount(drawn, minlength=5)
    assert counts[4] == 0 and stats.chisquare(counts[:4], 20_000 * logits[:4].double().softmax(0).numpy()).pvalue > 1e-4


def test_prepare_data_reads_the_documents_as_plain_text(sample, reader_dir, tmp_path):
    sample("replay.jsonl", DOCUMENTS=40)
    mixture = [{"name": "replay", "path": "replay.jsonl", "schema": "text", "examples": "all"}]
    (tmp_path / "mixture.json").write_text(json.dumps(mixture))
    args = {
        "BASE_MODEL": str(reader_dir),
        "MIXTURE": str(tmp_path / "mixture.json"),
        "DATA_DIR": str(tmp_path / "data"),
    }
    prepare_data.main(prepare_args(**args))
    (line,) = json.loads((tmp_path / "data" / "report.json").read_text())["sources"]
    assert line["kept"] > 30 and line["trainable_tokens"] == line["tokens"] - line["sequences"]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"MAX_TOKENS": 5000}, r"MAX_TOKENS is 5000; the base's context is \d+\. Lower it\."),
        ({"START_TOKEN": "<|nothing|>"}, r"its tokenizer has no token '<\|nothing\|>' to begin a document with"),
        ({"BASE_MODEL": "nowhere"}, r"nowhere is not a folder\. Name the base's folder with --base-model\."),
        ({"DOCUMENTS": 0}, "DOCUMENTS is 0; it must be at least 1"),
        ({"DTYPE": "int8"}, "DTYPE is 'int8'; it must be one of auto, bfloat16, float32"),
    ],
)
def test_what_cannot_be_sampled_is_a_sentence_and_leaves_nothing(sample, tmp_path, changes, sentence):
    with pytest.raises(SystemExit, match=sentence):
        sample(**changes)
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_that_names_its_tokens_as_nothing_has_no_token_to_begin_with(sample, reader_dir, tmp_path):
    base = shutil.copytree(reader_dir, tmp_path / "base")
    edit_json(base / "tokenizer_config.json", bos_token="", eos_token="")
    with pytest.raises(SystemExit, match=r"its tokenizer has no token '' to begin a document with.*--start-token"):
        sample(BASE_MODEL=str(base))


def test_an_existing_file_a_second_run_and_another_runs_documents_are_refused(sample, tmp_path, monkeypatch):
    (tmp_path / "out.jsonl").write_text("precious")
    with pytest.raises(SystemExit, match=r"out\.jsonl is already there\. Move it away, or name another --output\."):
        sample()
    assert (tmp_path / "out.jsonl").read_text() == "precious"

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sample_base, "publish", killed)
        with pytest.raises(SystemExit, match="Stopped"):
            sample("new.jsonl")
    with pytest.raises(
        SystemExit, match=r"new.jsonl.unfinished holds documents of another run \(SEED: 42 then, 7 now\)"
    ):
        sample("new.jsonl", SEED=7)
    with (
        system.lock(tmp_path / "new.jsonl.unfinished", "--output"),
        pytest.raises(SystemExit, match="is in use by anoth"),
    ):
        sample("new.jsonl")
    assert len(documents_of(sample("new.jsonl", DOCUMENTS=11, BATCH_SIZE=8))) == 11  # these may change
