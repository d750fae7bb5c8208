"""report.html: what it shows of a run, and that nothing in the data or the answers becomes more than text.

Alone: bash tests/run.sh tests/test_report_page.py
"""

import itertools
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from helpers import args_of, compare_in, edit_json, full_disk, share, write_pair, write_run

from sft import settings, system
from sft.evaluation import model_card, report_charts, report_page

HOSTILE = "</td></style>]]>--><script>alert(1)</script><img src=http://x.test/a onerror=alert(2)> \x1b[2J "
HOSTILE += "\u202eevil\u2066 $x$ {{ 7*7 }} \u2028 \x85 \ud800"
VOID = ("meta", "br", "img", "input", "link", "hr")
TASKS = {"arc_easy": {"acc": share(30, 90), "acc_norm": share(40, 90)}, "piqa": {"acc": share(50, 90)}}
LATER = {"arc_easy": {"acc": share(60, 90), "acc_norm": share(45, 90)}, "piqa": {"acc": share(48, 90)}}


class Page(HTMLParser):
    """The elements, attributes and text of a page, and the tags that no end tag closes."""

    def __init__(self, html):
        super().__init__()
        self.html, self.elements, self.text, self.open = html, [], "", []
        self.feed(html)
        self.tags = [tag for tag, _ in self.elements]
        self.attributes = [pair for _, attributes in self.elements for pair in attributes.items()]
        self.words = " ".join(self.text.split())

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, self.getpos()

    def handle_data(self, data):
        self.text += data


def write_training(export, weights, names=("smoltalk", "constitutional"), change=lambda training: None):
    """Write the training.json of an export, 400 steps on sources called `names`, after `change` did its work on it."""
    sources = []
    for index, label in enumerate(names):
        sources.append(
            {"name": label, "read": 900, "rejected": 12, "conversations": 888, "sequences": 900, "tokens": 90_000}
            | {"trainable_tokens": 40_000 * (index + 1), "lengths": [5, 9, 7, 3], "reasons": {"empty answer": 12}}
            | {"validation_conversations": 9, "changes": {f"merged {label}": 4}, "source": {"repeat": index + 1}}
            | {"control_text": 2, "damage": None if index else "row 7 is cut off"}
        )
    totals = {count: sum(source[count] for source in sources) for count in report_page.COUNTS}
    report = {"sources": sources, "totals": totals, "max_seq_len": 2048, "digest": {"train": "d1", "validation": "d2"}}
    report["settings"] = {"MAX_SEQ_LEN": 512, "DECONTAMINATE_AGAINST": ["arc_easy", "piqa"], "LIMIT": 0}
    origins = [{"name": names[0], "origin": "hub/one at 0123", "licence": "MIT"}]
    first, last = ({f"validation_loss/{name}": loss for name in names} for loss in (2.6, 1.6))
    lines = [{"step": 0, "validation_loss": 2.6} | first]
    for step in range(1, 401):
        line = {"step": step, "loss": 2 - step / 500 + 0.1 * math.sin(step), "lr": 2e-5, "grad_norm": 1 + 1 / step}
        lines.append(line | {"tokens_per_second": 500.0, "tokens": 20_000, "step_seconds": 40.0})
    lines[-1] |= {"validation_loss": 1.6} | last
    recipe = settings.defaults(report_page.ROOT / "sft_v1.py")
    state = {
        "settings": json.loads(json.dumps(recipe)) | {"LEARNING_RATE": 3e-4, "RESIZED_MODEL": f"models/{names[0]}"},
        "fingerprints": {"config.json num_hidden_layers": 32, "config.json hidden_size": 1536},
        "step": 400, "total_steps": 400, "updates": 399, "world_size": 2,
        "versions": {"torch": "2.13.0", "commit": "abc1234"},
        "history": [{"after_step": 100, "changed": []}],
    }  # fmt: skip
    training = {
        "checkpoint": "step_000400", "averaged": ["step_000400"], "base_share": 0.0,
        "parameters": 1_000_000_000, "dtype": "bfloat16", "state": state,
        "losses": model_card.read_losses(lines), "curves": model_card.read_curves(lines),
        "run": model_card.read_run(lines, state), "data": {"table": "", "sources": origins, "report": report},
        "weights_sha256": weights,
    }  # fmt: skip
    change(training)
    (export / model_card.TRAINING).write_text(json.dumps(training))


@pytest.fixture
def make(tmp_path, monkeypatch, capsys):
    """Return a function that writes a run whose names, questions and answers are `text`, and returns its Page."""
    monkeypatch.chdir(tmp_path)

    def make(text="plain", tasks=(TASKS, LATER), training=True, why="", names=None, change=None, **changes):
        export, results = Path("exports/genesis"), Path("eval-results")
        export.mkdir(parents=True)
        (export / "model.safetensors").write_bytes(b"weights")
        weights = system.weight_digests(export)
        write_pair(Path(), *tasks)
        for side, digests in (("before", {"model.safetensors": "base"}), ("after", weights)):
            edit_json(results / f"{side}/run.json", files_sha256=digests)
        lines = []
        for number in range(30):
            turns = [{"role": "system", "content": text}, {"role": "user", "content": f"{text} {number}"}]
            line = {"messages": turns, "before": f"{text} " * 80, "after": text}
            line |= {"before_ended": False, "after_ended": True}
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
        (results / "after/answers.jsonl").write_text("".join(lines), encoding="utf-8", errors="replace")
        compare_in(capsys)(**changes)
        if training:
            base = {"base": {"model.safetensors": "base"}, "resized": {"model.safetensors": "resized"}}
            write_training(export, base, names or (text, "constitutional"), change or (lambda training: None))
        report_page.main(args_of(report_page, EXPORT_DIR=str(export)))
        output = capsys.readouterr()
        assert output.out == f"report: {results / 'report.html'}{why and f', without training and data: {why}'}\n"
        assert output.err == ""
        return Page((results / "report.html").read_text())

    return make


def test_the_page_tells_the_run_from_its_data_to_what_it_changed(make):
    page = make("smoltalk")
    for words in (
        "genesis: what fine-tuning changed", "1,000,000,000 parameters (bfloat16; 32 layers, hidden size 1,536)",
        "step_000400", "8,000,000 tokens in 4 h 26 min", "2.60 → 1.60 validation loss",
        "Continued from a checkpoint 1 time, steps skipped: 1", "ARC-Easy", "piqa", "better", "above it: both",
        "hub/one at 0123 MIT", "each 2 times", "rejected: empty answer", "kept, changed: merged smoltalk",
        "- smoltalk the file is damaged: row 7 is cut off", "2 constitutional kept, with the name of a control token",
        "were rejected: arc_easy, piqa", "LEARNING_RATE 2e-05 0.0003 sft_v1.py", "MAX_SEQ_LEN 2048 512 prepare_data.py",
        "MAX_GRAD_NORM", "d1", "commit abc1234", "base: model.safetensors base", "12 of 30 held-out questions",
        "system smoltalk user smoltalk 0 before, cut off: it did not end by itself", "validation loss of each source",
        "arc_easy · acc_norm: 5 gained, 0 lost",
    ):  # fmt: skip
        assert words in page.words, words
    assert page.tags.count("svg") == 1 + 5 + 2  # scores; curves, one of them by source; data


def test_what_others_wrote_stays_text(make):
    def change(training):
        training["state"]["settings"]["PROMPTS"] = [HOSTILE]
        training["state"]["versions"][HOSTILE] = HOSTILE
        training["data"]["sources"][0] |= {"origin": HOSTILE, "licence": HOSTILE}
        training["data"]["report"]["sources"][0]["reasons"] = {HOSTILE: 3}
        training["data"]["report"]["settings"]["DECONTAMINATE_AGAINST"] = [HOSTILE]

    tame = HOSTILE.replace("/", "|").encode("utf-8", "replace").decode()  # a task's name is also a file's
    tasks = [{f"task{tame}": scores for scores in side.values()} for side in (TASKS, LATER)]
    page = make(HOSTILE, tasks, change=change)
    assert not {"script", "img", "iframe", "object", "link"} & set(page.tags) and page.tags.count("style") == 1 + 8
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert page.text.count("<script>alert(1)</script>") > 40 and "{{ 7*7 }}" in page.text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]", page.html)
    assert r"\x1b[2J \u202eevil" in page.text and page.open == []


def test_the_page_asks_the_network_for_nothing(make):
    page = make()
    loads = [value for name, value in page.attributes if name in ("src", "href", "xlink:href", "srcset", "action")]
    assert loads and all(value.startswith("#") for value in loads)
    policy = dict(page.elements)["meta"]["content"]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    assert "@import" not in page.html and not re.search(r"url\((?!#)", page.html)


def test_the_page_can_be_read_by_who_does_not_see_it(make):
    write_run(Path("eval-results/seed43"), LATER)
    page = make(OTHER_SEEDS=("eval-results/seed43",))
    levels = [int(tag[1]) for tag in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(later - earlier <= 1 for earlier, later in itertools.pairwise(levels))
    assert {attributes.get("scope") for tag, attributes in page.elements if tag == "th"} == {"col", "row"}
    regions = [attributes for _, attributes in page.elements if attributes.get("class") == "scroll"]
    assert len(regions) == page.tags.count("table") and all(region["aria-label"] for region in regions)
    assert page.html.count('<svg role="img"') == page.tags.count("svg") == page.tags.count("title") - 1
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(set(ids)) == len(ids)
    assert {value[1:] for name, value in page.attributes if name in ("href", "xlink:href")} <= set(ids)


def luminance(color):
    """Return the relative luminance of "#rrggbb" or "#rgb" as WCAG 2 defines it."""
    digits = color[1:] if len(color) == 7 else "".join(digit * 2 for digit in color[1:])
    parts = [int(digits[start : start + 2], 16) / 255 for start in (0, 2, 4)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(first, second):
    low, high = sorted(map(luminance, (first, second)))
    return (high + 0.05) / (low + 0.05)


def test_words_and_charts_have_contrast_on_light_and_on_dark_ground():
    style = (Path(report_page.__file__).parent / "report.html.jinja").read_text()
    light, dark = (dict(re.findall(r"--(\w+): (#\w+)", block)) for block in re.findall(r":root {(.*?)}", style, re.S))
    for theme in (light, dark):
        for name in ("text", "soft", "good", "bad", "blue"):
            assert min(contrast(theme[name], theme[ground]) for ground in ("ground", "card")) >= 4.5, name
        for color in (*report_charts.SOURCES, report_charts.BEFORE, report_charts.AFTER, report_charts.CHANCE):
            assert contrast(color, theme["ground"]) >= 3, color
    assert min(contrast("#ffffff", color) for color in report_charts.SOURCES) >= 4.5  # the shares in the bars


def test_a_model_that_the_suite_did_not_train_has_the_comparison_only(make):
    page = make(training=False, why="exports/genesis/training.json is missing, export_hf.py didn't write this model")
    assert "Before and after" in page.text and "Training" not in page.text and page.tags.count("svg") == 1
    assert "export_hf.py didn't write this model" in page.text


@pytest.mark.parametrize("missing", ["curves", "run", "data.report.settings", "weights_sha256"])
def test_an_earlier_training_json_is_left_out_with_the_reason(make, missing):
    def change(training):
        *above, last = missing.split(".")
        for key in above:
            training = training[key]
        del training[last]

    why = f"exports/genesis/training.json has no {missing}: export the checkpoint again with export_hf.py"
    if missing == "weights_sha256":
        why = "exports/genesis/training.json doesn't name the base: run resize_vocab.py again, then export_hf.py"
    page = make(change=change, why=why)
    assert why in page.words and "MAX_GRAD_NORM" not in page.text and page.tags.count("svg") == 1


def test_what_a_run_did_not_record_is_not_shown(make):
    def change(training):
        training["losses"] = model_card.read_losses([])
        training["curves"] = {"loss": [[1, math.nan], [2, math.inf], [3, 2.0]], "grad_norm": [[1, 0.0], [2, 0.0]]}
        training["run"] |= {"tokens": 0, "seconds": 0}
        training["data"] = None

    page = make(change=change)
    assert page.tags.count("svg") == 1 + 2 and "tokens in" not in page.words
    assert "The mixture is not shown: when the model was exported" in page.words
    assert "validation loss" not in page.words and "None" not in page.words and "nan" not in page.words.lower()


@pytest.mark.filterwarnings("error")  # of a letter that matplotlib has no picture of: the browser has
def test_of_many_sources_the_largest_have_a_colour_and_the_others_are_one(make):
    names = [f"_source {number} 汉" for number in range(30)]
    page = make(names=names)
    chart = page.words[page.words.index("Each source's share of the mixture") :]
    legend = chart[: chart.index("Lengths of the sequences")]
    assert "_source 29 汉" in legend and "23 smaller sources" in legend and "_source 22 汉" not in legend
    assert all(name in chart for name in names)  # the table has them all


def test_a_comparison_without_a_single_row_is_a_page_with_empty_tables(make):
    page = make()
    comparison = json.loads(Path("eval-results/comparison.json").read_text())
    edit_json(Path("eval-results/comparison.json"), parts=[part | {"rows": []} for part in comparison["parts"]])
    Path("eval-results/flips.jsonl").write_text("")
    report_page.main(args_of(report_page, EXPORT_DIR="exports/genesis"))
    page = Page(Path("eval-results/report.html").read_text())
    assert "0 rows better" in page.words and "Questions that flipped" not in page.words


def test_a_text_without_end_is_cut_and_the_page_says_so(make):
    page = make("word " * 3000)
    assert "11,000 more characters" in page.words and len(page.html) < 1_500_000


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("flips.jsonl", None, "flips.jsonl is missing. Run run_eval.sh compare again."),
        ("flips.jsonl", '{"part": "a"', "flips.jsonl, line 1, is not what run_eval.sh compare writes"),
        ("after/answers.jsonl", '{"prompt": "a"}', "it has no messages, before, before_ended, after, after_ended"),
        ("after/answers.jsonl", "7", "--result-dir eval-results/after again"),
    ],
)
def test_a_damaged_file_ends_with_a_sentence(make, name, content, sentence):
    make()
    path = Path("eval-results") / name
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(SystemExit, match=re.escape(sentence)):
        report_page.main(args_of(report_page, EXPORT_DIR="exports/genesis"))


def test_a_full_disk_leaves_the_earlier_page(make):
    page = make()
    with full_disk(1000), pytest.raises(SystemExit, match=r"report.html cannot be written .*Free disk space"):
        report_page.main(args_of(report_page, EXPORT_DIR="exports/genesis"))
    assert Path("eval-results/report.html").read_text() == page.html


def test_sixty_tasks_and_other_seeds_have_their_rows(make, tmp_path):
    many = [{f"task_{number}": {"acc": share(right + number, 90)} for number in range(60)} for right in (5, 12)]
    write_run(tmp_path / "eval-results/seed43", many[1])
    page = make(tasks=many, OTHER_SEEDS=("eval-results/seed43",))
    assert page.tags.count("tr") > 120 and "Spread over seeds Paired SE" in page.words
    assert "The verdict uses the paired error of a single run" in page.words
