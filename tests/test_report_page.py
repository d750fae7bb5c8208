"""report.html: what it shows of a run, and that nothing in the data or the answers becomes more than text.

Alone: bash tests/run.sh tests/test_report_page.py
"""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from helpers import args_of, compare_in, edit_json, share, write_pair, write_run

from sft import settings, system
from sft.evaluation import model_card, report_page

HOSTILE = "</td><script>alert(1)</script><img src=http://x.test/a onerror=alert(2)> \x1b[2J "
HOSTILE += "\u202eevil\u2066 $x$ {{ 7*7 }}"
TASKS = {"arc_easy": {"acc": share(30, 90), "acc_norm": share(40, 90)}, "piqa": {"acc": share(50, 90)}}
LATER = {"arc_easy": {"acc": share(60, 90), "acc_norm": share(45, 90)}, "piqa": {"acc": share(48, 90)}}


class Page(HTMLParser):
    """The elements, attributes and text of a page."""

    def __init__(self, html):
        super().__init__()
        self.html, self.tags, self.attributes, self.text = html, [], [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data


def write_training(export, weights, name="smoltalk"):
    """Write the training.json of an export: 400 steps on two sources, the first of them called `name`."""
    sources = []
    for index, label in enumerate((name, "constitutional")):
        sources.append(
            {"name": label, "read": 900, "rejected": 12, "conversations": 888, "sequences": 900, "tokens": 90_000}
            | {"trainable_tokens": 40_000 * (index + 1), "lengths": [5, 9, 7, 3], "reasons": {"empty answer": 12}}
        )
    counts = ("read", "rejected", "conversations", "sequences", "tokens", "trainable_tokens")
    totals = {count: sum(source[count] for source in sources) for count in counts}
    report = {"sources": sources, "totals": totals, "max_seq_len": 2048, "digest": {"train": "d1", "validation": "d2"}}
    origins = [{"name": name, "origin": "hub/one at 0123", "licence": "MIT"}]
    steps = range(1, 401)
    lines = [{"step": 0, "validation_loss": 2.6, "validation_loss/a": 2.4, "validation_loss/b": 2.8}]
    for step in steps:
        line = {"step": step, "loss": 2 - step / 500 + 0.1 * math.sin(step), "lr": 2e-5, "grad_norm": 1 + 1 / step}
        lines.append(line | {"tokens_per_second": 500.0, "tokens": 20_000, "step_seconds": 40.0})
        if step % 100 == 0:
            losses = {"validation_loss": 2.4 - step / 500, "validation_loss/a": 2.0, "validation_loss/b": 2.5}
            lines[-1] |= losses
    recipe = settings.defaults(report_page.ROOT / "sft_v1.py")
    state = {
        "settings": json.loads(json.dumps(recipe)) | {"LEARNING_RATE": 3e-4, "RESIZED_MODEL": "models/resized"},
        "step": 400, "total_steps": 400, "updates": 399, "world_size": 2, "versions": {"torch": "2.13.0"},
        "history": [{"after_step": 100, "changed": []}],
    }  # fmt: skip
    training = {
        "checkpoint": "step_000400", "parameters": 1_000_000_000, "dtype": "bfloat16", "state": state,
        "losses": model_card.read_losses(lines), "curves": model_card.read_curves(lines),
        "run": model_card.read_run(lines, state), "data": {"table": "", "sources": origins, "report": report},
        "weights_sha256": weights,
    }  # fmt: skip
    (export / model_card.TRAINING).write_text(json.dumps(training))


@pytest.fixture
def make(tmp_path, monkeypatch, capsys):
    """Return a function that writes a run whose names, questions and answers are `text`, and returns its Page."""
    monkeypatch.chdir(tmp_path)

    def make(text="plain", tasks=(TASKS, LATER), training=True, **changes):
        export, results = Path("exports/genesis"), Path("eval-results")
        export.mkdir(parents=True)
        (export / "model.safetensors").write_bytes(b"weights")
        weights = system.weight_digests(export)
        write_pair(Path(), *tasks)
        for side, digests in (("before", {"model.safetensors": "base"}), ("after", weights)):
            edit_json(results / f"{side}/run.json", files_sha256=digests)
        lines = []
        for number in range(30):
            line = {"prompt": f"{text} {number}", "before": f"{text} " * 80, "after": text}
            lines.append(json.dumps(line | {"before_ended": False, "after_ended": True}) + "\n")
        (results / "after/answers.jsonl").write_text("".join(lines))
        compare_in(capsys)(**changes)
        if training:
            base = {"base": {"model.safetensors": "base"}, "resized": {"model.safetensors": "resized"}}
            write_training(export, base, text)
        report_page.main(args_of(report_page, EXPORT_DIR=str(export)))
        assert capsys.readouterr().out == f"report: {results / 'report.html'}\n"
        return Page((results / "report.html").read_text())

    return make


def test_the_page_tells_the_run_from_its_data_to_what_it_changed(make):
    page = make("smoltalk")
    for words in (
        "genesis: what fine-tuning changed", "1,000,000,000 parameters", "step_000400", "8,000,000", "4 h 26 min",
        "2.600 → 1.600",
        "times continued from a checkpoint: 1, steps skipped: 1", "ARC-Easy", "piqa", "better",
        "hub/one at 0123", "MIT",
        "empty answer", "LEARNING_RATE", "0.0003", "2e-05", "d1", "torch", "12 of 30 held-out questions",
        "cut off: it did not end by itself",
    ):  # fmt: skip
        assert words in " ".join(page.text.split()), words
    assert page.tags.count("svg") == 1 + 5 + 2  # scores; curves, one of them by source; data
    assert re.search(r"arc_easy · acc_norm: 5 gained, 0 lost", page.text)
    assert "validation loss per source" in page.text and "MAX_GRAD_NORM" in page.text


def test_what_others_wrote_stays_text(make):
    tasks = [{f"task{HOSTILE}".replace("/", "|"): scores for scores in side.values()} for side in (TASKS, LATER)]
    page = make(HOSTILE, tasks)
    assert not {"script", "img", "iframe", "object", "link"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert page.text.count("<script>alert(1)</script>") > 20 and "{{ 7*7 }}" in page.text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]", page.html)
    assert r"\x1b[2J \u202eevil" in page.text


def test_the_page_asks_the_network_for_nothing(make):
    page = make()
    loads = [value for name, value in page.attributes if name in ("src", "href", "xlink:href", "srcset", "action")]
    assert loads and all(value.startswith("#") for value in loads)
    assert "default-src 'none'" in dict(page.attributes)["content"]
    assert "@import" not in page.html and not re.search(r"url\((?!#)", page.html)


def test_a_model_that_the_suite_did_not_train_has_the_comparison_only(make):
    page = make(training=False)
    assert "Before and after" in page.text and "Training" not in page.text and page.tags.count("svg") == 1


def test_sixty_tasks_and_other_seeds_have_their_rows(make, tmp_path):
    many = [{f"task_{number}": {"acc": share(right + number, 90)} for number in range(60)} for right in (5, 12)]
    write_run(tmp_path / "eval-results/seed43", many[1])
    page = make(tasks=many, OTHER_SEEDS=("eval-results/seed43",))
    assert page.tags.count("tr") > 120 and "Spread over seeds" in page.text
    assert "The verdict uses the paired error of a single run" in page.text
