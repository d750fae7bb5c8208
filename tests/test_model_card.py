"""The model card, from the files that a training run, the data and an evaluation leave. No model is needed.

Alone: bash tests/run.sh tests/test_model_card.py
"""

import json
from pathlib import Path

import pytest
from helpers import MINE, compare_in, edit_json, share, write_pair, write_run

from sft.evaluation import eval_results, model_card, run_eval

DIGEST = {"train": "aa", "validation": "bb"}
METRICS = [
    {"step": 0, "validation_loss": 7},
    {"step": 50, "loss": 5},
    {"step": 50, "validation_loss": 6},
    {"step": 51, "loss": None},
    {"step": 100, "loss": 1},
    {"step": 100, "validation_loss": 2},
]
MIXTURE = [
    {"name": "smol", "hub": "HuggingFaceTB/smoltalk"},
    {"name": "other", "hub": "someone/other"},
    {"name": "answers", "path": "rows.jsonl"},
]


def state_of(step, **settings):
    """Return a checkpoint's state as sft_v1.py writes it, as far as the card reads it."""
    recipe = dict.fromkeys(model_card.RECIPE, 1) | {"LEARNING_RATE": 0.01}
    return {
        "step": step,
        "updates": step - 1,
        "world_size": 2,
        "versions": {"torch": "2.13.0"},
        "fingerprints": {"data": json.dumps(DIGEST, sort_keys=True)},
        "settings": recipe | {"DATA_DIR": "data/sft_v1", "RESIZED_MODEL": "models/resized"} | settings,
    }


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """Return a checkpoint's path in a current folder that holds the metrics, the curve and the data of its run."""
    monkeypatch.chdir(tmp_path)
    checkpoint = Path("checkpoints/sft_v1/step_000100")
    checkpoint.mkdir(parents=True)
    lines = "".join(json.dumps(line) + "\n" for line in METRICS)
    (checkpoint.parent / "metrics.jsonl").write_text(lines + '{"step": 101, "lo')  # as a kill leaves it
    (checkpoint.parent / "loss.png").write_bytes(b"curve")
    data = Path("data/sft_v1")
    data.mkdir(parents=True)
    sources = [
        {"name": "smol", "revision": "0123456789abcdef" * 2 + "01234567"},
        {"name": "other"},
        {"name": "answers"},
    ]
    report = {"settings": {"MIXTURE": MIXTURE}, "sources": sources, "digest": DIGEST}
    (data / "report.json").write_text(json.dumps(report))
    (data / "report.md").write_text("| source | train |\n|---|---|\n| answers | 12 |\n")
    return checkpoint


def export(checkpoint, state, name="export"):
    """Write the part of an export that the card needs, and the card. Returns: the export's folder."""
    folder = Path(name)
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    training = model_card.describe(checkpoint, state, 1_234_567, "bfloat16")
    (folder / model_card.TRAINING).write_text(json.dumps(training))
    model_card.write(folder)
    return folder


def test_the_card_shows_model_data_licences_recipe_and_curve(checkpoint):
    folder = export(checkpoint, state_of(100))
    card = (folder / "README.md").read_text()
    assert (
        "1,234,567 parameters, bfloat16; from `models/resized`, checkpoint `step_000100` (99 optimizer steps)" in card
    )
    assert "| answers | 12 |" in card
    assert "| smol | HuggingFaceTB/smoltalk at 0123456789ab | Apache-2.0 |" in card
    assert "| other | someone/other | see its page |" in card
    assert "| answers | rows.jsonl | of your own file: add it |" in card
    assert "- LEARNING_RATE: 0.01\n" in card and "- versions: torch 2.13.0; 2 processes" in card
    assert "chat.py --export-dir" in card
    assert "![Loss by optimizer step](loss.png)" in card and (folder / "loss.png").read_bytes() == b"curve"
    assert "Before and after" not in card


def test_the_card_of_an_earlier_checkpoint_shows_its_own_losses(checkpoint):
    early = (export(checkpoint.with_name("step_000050"), state_of(50), "early") / "README.md").read_text()
    assert "last training loss: 5.0000" in early and "7.0000 at first, 6.0000 at last" in early
    last = (export(checkpoint, state_of(100), "last") / "README.md").read_text()
    assert "last training loss: 1.0000" in last and "7.0000 at first, 2.0000 at last" in last


def test_what_is_not_there_is_left_out(checkpoint):
    for file in ("metrics.jsonl", "loss.png"):
        (checkpoint.parent / file).unlink()
    card = (export(checkpoint, state_of(100, DATA_DIR="data/moved")) / "README.md").read_text()
    assert "loss" not in card and "## Data" not in card and "## Recipe" in card and "## Chat" in card


def test_data_that_the_run_was_not_trained_on_is_not_shown(checkpoint):
    report = json.loads(Path("data/sft_v1/report.json").read_text())
    Path("data/sft_v1/report.json").write_text(json.dumps(report | {"digest": {"train": "cc"}}))
    assert "## Data" not in (export(checkpoint, state_of(100)) / "README.md").read_text()


def test_a_mixture_file_that_was_moved_leaves_the_names(checkpoint):
    report = json.loads(Path("data/sft_v1/report.json").read_text())
    Path("data/sft_v1/report.json").write_text(json.dumps(report | {"settings": {"MIXTURE": "moved.json"}}))
    assert "| smol | unknown | of your own file" in (export(checkpoint, state_of(100)) / "README.md").read_text()


def test_the_comparison_of_another_model_does_not_reach_the_card(checkpoint, capsys):
    folder, results = export(checkpoint, state_of(100)), Path("eval-results")
    plain = (folder / "README.md").read_text()
    for path in checkpoint.parent.glob("*.*"):
        path.unlink()  # the card needs nothing of the run any more
    assert model_card.write(folder, results) == "there is no eval-results/comparison.json"
    write_pair(Path(), MINE, MINE)
    edit_json(results / "after/run.json", files_sha256=eval_results.weights_in(folder))
    write_run(results / "other", {"mine": {"acc": share(9, 9)}})  # another model, in a folder next to `after`
    compare = compare_in(capsys)
    compare(AFTER="eval-results/other")
    assert "is about other weights than those in export" in model_card.write(folder, results)
    assert (folder / "README.md").read_text() == plain and not (folder / "comparison.png").exists()
    compare()
    assert model_card.write(folder, results) is None
    card = (folder / "README.md").read_text()
    assert "### lm_eval\n" in card and "| mine " in card and (folder / "comparison.png").exists()
    page = results / "comparison.md"
    page.write_text(page.read_text() + "| forged |\n")
    assert "comparison.md is not the one that" in model_card.write(folder, results)
    assert (folder / "README.md").read_text() == plain


def test_a_source_named_by_others_forges_no_row_and_no_html(checkpoint):
    path = Path("data/sft_v1/report.json")
    report = json.loads(path.read_text())
    report["sources"][0]["name"] = "x | y\n| forged | <img> |"
    path.write_text(json.dumps(report))
    card = (export(checkpoint, state_of(100)) / "README.md").read_text()
    assert r"| x \| y \| forged \| &lt;img> \| | unknown |" in card


def test_a_card_that_cannot_be_written_is_refused_in_one_sentence(checkpoint):
    folder = export(checkpoint, state_of(100))
    earlier = (folder / "README.md").read_text()
    write_pair(Path(), MINE, MINE)
    (folder / "README.md.unfinished").mkdir()
    with pytest.raises(SystemExit, match=r"run_eval.sh: .*README.md.unfinished'. Check the free disk space"):
        run_eval.main({"EVAL_RESULTS": "eval-results", "EXPORT_DIR": "export"}, "compare")
    assert (folder / "README.md").read_text() == earlier


def test_zeroed_lines_of_the_metrics_are_skipped(checkpoint):
    path = checkpoint.parent / "metrics.jsonl"
    first, *rest = path.read_text().splitlines(keepends=True)
    path.write_text("".join([first, "\0" * 40 + "\n", *rest]))
    assert "last training loss: 1.0000" in (export(checkpoint, state_of(100)) / "README.md").read_text()


def test_a_folder_that_is_no_export_is_refused(checkpoint):
    Path("model").mkdir()
    with pytest.raises(SystemExit, match=r"model/training.json is missing. Run export_hf.py"):
        model_card.write("model", "eval-results")
