"""assistant_check.py on two tiny models: one that knows nothing, and one that learnt its answers and to end them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sft.data import chatml
from sft.evaluation import assistant_check

REPO = Path(__file__).parents[1]
CONVERSATIONS = [
    ("a", [("user", "Who are you?"), ("assistant", "I am Genesis.")]),
    ("a", [("system", "Be brief."), ("user", "Say yes"), ("assistant", "yes"), ("user", "No?"), ("assistant", "no")]),
    ("b", [("user", "1 + 1"), ("assistant", "<think>\none and one\n</think>\n\ntwo")]),
    ("b", [("user", "2 + 2"), ("assistant", "four")]),
]


def write_tokenizer(folder):
    """A byte-level tokenizer without chat markers, as a base has it; returns the folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(["the cat sat on the mat"], trainer)
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)
    return folder


def write_data(folder, base, train_on_special_tokens=True):
    """A folder as prepare_data.py writes it, of CONVERSATIONS, with the tokenizer in `base` extended; returns that."""
    import datasets

    tokenizer, adds_bos = chatml.extend_tokenizer(base, train_on_special_tokens, False)
    tokenizer.save_pretrained(folder / "tokenizer")
    encoder = chatml.Encoder(tokenizer, adds_bos, train_on_special_tokens, False)
    laid = [chatml.concatenate([], turns) for turns in encoder.encode([turns for _, turns in CONVERSATIONS])]
    columns = {"input_ids": [ids.tolist() for ids, _ in laid], "assistant_masks": [mask.tolist() for _, mask in laid]}
    split = datasets.Dataset.from_dict(columns | {"source": [source for source, _ in CONVERSATIONS]})
    datasets.DatasetDict({"train": split, "validation": split}).save_to_disk(folder)
    return tokenizer


def write_model(folder, tokenizer, seed, rows=None, context=512):
    """A tiny Llama; with `rows` (of the data) it is trained until it knows them by heart."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    names = {"bos_token_id": 0, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=context, **names, **shape))
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    for _ in range(60 if rows else 0):
        for row in rows:
            ids, mask = torch.tensor(row["input_ids"]), torch.tensor(row["assistant_masks"])
            model(input_ids=ids[None], labels=ids.where(mask, -100)[None]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.generation_config = GenerationConfig(**names)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    import datasets

    root = tmp_path_factory.mktemp("check")
    tokenizer = write_data(root / "data", write_tokenizer(root / "base"))
    write_model(root / "before", tokenizer, 0)
    write_model(root / "after", tokenizer, 0, list(datasets.load_from_disk(root / "data")["validation"]))
    return root


def check(place, *flags):
    folders = ("--data-dir", "data", "--before-model", "before", "--after-model", "after", "--output-dir", "out")
    return subprocess.run(
        [sys.executable, "-m", "sft.evaluation.assistant_check", *folders, "--max-new-tokens", "40", *flags],
        cwd=place,
        env=os.environ | {"PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_what_training_changed(place):
    import datasets
    import torch
    from transformers import AutoModelForCausalLM

    done = check(place, "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    written = json.loads((place / "out/assistant.json").read_text())
    rows = {row["label"]: row for row in written["rows"]}
    assert [(name, row["metric"], len(row["before"])) for name, row in rows.items() if name != "Plain text"] == [
        ("Held-out answers: a", "loss", 2),
        ("Held-out answers: b", "loss", 2),
        ("Held-out answers: all", "loss", 4),
        ("Answers that end by themselves", "share", 4),
        ("Answers with sound <think>, or none", "share", 4),
    ]
    data = datasets.load_from_disk(place / "data")["validation"]
    for side in ("before", "after"):  # the loss is the one that training minimises
        model, everything = (
            AutoModelForCausalLM.from_pretrained(place / side, dtype=torch.float32),
            rows["Held-out answers: all"],
        )
        for row, loss, weight in zip(data, everything[side], everything["weights"], strict=True):
            ids, mask = torch.tensor(row["input_ids"]), torch.tensor(row["assistant_masks"])
            with torch.no_grad():
                expected = model(input_ids=ids[None], labels=ids.where(mask, -100)[None]).loss.item()
            assert loss == pytest.approx(expected, rel=1e-4) and weight == mask.sum()
    assert max(rows["Held-out answers: all"]["after"]) < 0.5 < min(rows["Held-out answers: all"]["before"])
    assert rows["Answers that end by themselves"]["after"] == [1] * 4
    assert rows["Answers that end by themselves"]["before"] != [1] * 4
    assert rows["Answers with sound <think>, or none"]["after"] == [1] * 4
    plain = rows["Plain text"]
    assert len(plain["before"]) == len(plain["after"]) == len(plain["weights"]) > 100 and max(plain["weights"]) == 10
    assert "in 1 of 4 held-out conversations" in written["notes"][1].replace("\n", " ")
    answers = [json.loads(line) for line in (place / "out/answers.jsonl").read_text().splitlines()]
    assert [line["after"].split() for line in answers] == [
        ["I", "am", "Genesis."],
        ["yes"],
        ["<think>", "one", "and", "one", "</think>", "two"],
        ["four"],
    ]
    assert answers[1]["prompt"].endswith("<|im_start|>user\nSay yes<|im_end|>\n<|im_start|>assistant\n")


def test_an_answer_has_its_reasoning_first_once_and_then_an_answer():
    sound = [[5], [1, 5, 2, 6], [1, 2, 5]]
    broken = [[5, 1, 5, 2, 6], [1, 5, 2], [1, 5, 2, 0, 0], [1, 5], [5, 2], [1, 2, 1, 2, 5], [1, 1, 2, 5]]
    for ids in sound + broken:  # 1 and 2 are the markers, 0 is white space
        assert assistant_check.well_formed(ids, 1, 2, lambda rest: not any(rest)) is (ids in sound), ids


def test_the_prompt_ends_before_a_marker_that_is_not_trained():
    # 7 8 opens an answer, 1 is <think>, and only what follows it is trained
    mask = [False] * 6 + [True] * 2
    assert assistant_check.first_prompt([7, 9, 5, 7, 8, 1, 5, 5], mask, [7, 8]) == [7, 9, 5, 7, 8]


@pytest.mark.parametrize(
    ("setting", "value", "says"),
    [
        ("BEFORE_MODEL", "base", "base: the tokenizer is not that of data/tokenizer"),
        ("AFTER_MODEL", "nowhere", "nowhere holds no tokenizer.json, export_hf.py has not written it"),
        ("PLAIN_TEXT", "nowhere.txt", "nowhere.txt cannot be read"),
        ("ANSWERS", 0, "at least 1"),
    ],
)
def test_what_does_not_fit_is_said(place, monkeypatch, setting, value, says):
    monkeypatch.chdir(place)
    given = {"DATA_DIR": "data", "BEFORE_MODEL": "before", "AFTER_MODEL": "after", "OUTPUT_DIR": "refused"}
    for name, chosen in (given | {setting: value}).items():
        monkeypatch.setattr(assistant_check, name, chosen)
    with pytest.raises(SystemExit, match=says):
        assistant_check.main(given)
    assert not Path("refused").exists()
