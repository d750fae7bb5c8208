"""The model card, from the files that a training run, the data and an evaluation leave. No model is needed.

Alone: bash tests/run.sh tests/test_model_card.py
"""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import MINE, ROOT, compare_in, edit_json, share, write_pair, write_run

import prepare_data
from sft import system
from sft.evaluation import model_card, run_eval

DIGEST = {"train": "aa", "validation": "bb"}
METRICS = [
    {"step": 0, "validation_loss": 7, "validation_bits_per_byte": 1.75},
    {"step": 50, "loss": 5},
    {"step": 50, "validation_loss": 6},
    {"step": 51, "loss": None},
    {"step": 100, "loss": 1},
    {"step": 100, "validation_loss": 2, "validation_bits_per_byte": 0.5},
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
        "total_steps": step,
        "updates": step - 1,
        "history": [],
        "world_size": 2,
        "versions": {"torch": "2.13.0"},
        "fingerprints": {"data": json.dumps(DIGEST, sort_keys=True)},
        "settings": recipe | {"DATA_DIR": "data/sft_v1", "RESIZED_MODEL": "models/resized"} | settings,
    }


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """Return a checkpoint's path in a current folder with the metrics, curve and data of its run, and its base."""
    monkeypatch.chdir(tmp_path)
    checkpoint = Path("checkpoints/sft_v1/step_000100")
    checkpoint.mkdir(parents=True)
    lines = "".join(json.dumps(line) + "\n" for line in METRICS)
    (checkpoint.parent / "metrics.jsonl").write_text(lines + '{"step": 101, "lo')  # as a kill leaves it
    (checkpoint.parent / "loss.png").write_bytes(b"curve")
    resized = Path("models/resized")
    resized.mkdir(parents=True)
    (resized / "model.safetensors").write_bytes(b"resized")
    digests = {"base": {"model.safetensors": "before"}, "resized": system.weight_digests(resized)}
    (resized / "resize.json").write_text(json.dumps({"weights_sha256": digests}))
    data = Path("data/sft_v1")
    data.mkdir(parents=True)
    counts = dict.fromkeys(("read", "rejected", "conversations", "sequences", "tokens", "trainable_tokens"), 3)
    source = counts | {"lengths": [1, 2], "reasons": {}, "changes": {}, "control_text": 0, "damage": None}
    sources = [
        source | {"name": "smol", "revision": "0123456789abcdef" * 2 + "01234567"},
        source | {"name": "other"},
        source | {"name": "answers"},
    ]
    report = {"settings": {"MIXTURE": MIXTURE}, "sources": sources, "digest": DIGEST}
    report |= {"totals": counts, "max_seq_len": 8}
    (data / "report.json").write_text(json.dumps(report))
    (data / "report.md").write_text("| source | train |\n|---|---|\n| answers | 12 |\n")
    return checkpoint


def export(checkpoint, state, name="export", earlier=(), base_share=0.0):
    """Write the part of an export that the card needs, and the card. Returns: the export's folder."""
    folder = Path(name)
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    source = SimpleNamespace(checkpoints=[checkpoint, *earlier], base_share=base_share, resized="models/resized")
    weights = system.weight_digests(source.resized)
    training = model_card.describe(source, state, weights, 1_234_567, "bfloat16")
    model_card.write_first(folder, checkpoint, training)
    return folder


def test_a_card_says_which_mean_it_is_about(checkpoint):
    earlier = [checkpoint.parent / "step_000050"]
    card = (export(checkpoint, state_of(100), "mean", earlier, 0.25) / "README.md").read_text()
    words = "the mean of the checkpoints `step_000100`, `step_000050` (99 optimizer steps in the first), moved 0.25 of"
    assert f"from `models/resized`, {words} the way back to the base's weights.\n" in card
    card = (export(checkpoint, state_of(100), "one") / "README.md").read_text()
    assert "from `models/resized`, checkpoint `step_000100` (99 optimizer steps).\n" in card


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
    assert "in bits per byte of the text: 1.7500 at first, 0.5000 at last" in last and "bits per byte" not in early


def test_what_is_not_there_is_left_out(checkpoint):
    for file in ("metrics.jsonl", "loss.png"):
        (checkpoint.parent / file).unlink()
    card = (export(checkpoint, state_of(100, DATA_DIR="data/moved")) / "README.md").read_text()
    assert "loss" not in card and "## Data" not in card and "## Recipe" in card and "## Chat" in card


def test_the_curve_of_another_run_does_not_reach_the_card(checkpoint):
    curve = checkpoint.parent / "loss.png"
    curve.unlink()  # it is drawn at the end of a run
    folder = export(checkpoint, state_of(100))
    plain = (folder / "README.md").read_text()
    curve.write_bytes(b"another run's")  # now at the same path
    model_card.write(folder)
    assert (folder / "README.md").read_text() == plain and not (folder / "loss.png").exists()


def test_no_link_to_a_private_file_is_published(checkpoint):
    Path("private").write_text("| private |")
    for path in (checkpoint.parent / "loss.png", Path("data/sft_v1/report.md")):
        path.unlink()
        path.symlink_to(Path("private").absolute())
    folder = export(checkpoint, state_of(100))
    assert not (folder / "loss.png").exists() and "## Data" not in (folder / "README.md").read_text()
    assert not [path for path in folder.iterdir() if "private" in path.read_text()]
    for name in ("checkpoints", "data"):  # folders on another disk, which is how a user has links
        Path(name).rename(f"{name}-moved")
        Path(name).symlink_to(f"{name}-moved")
    for path in (checkpoint.parent / "loss.png", Path("data/sft_v1/report.md")):
        path.unlink()
        path.write_text("its own")
    folder = export(checkpoint, state_of(100), "again")
    assert (folder / "loss.png").read_text() == "its own" and "its own" in (folder / "README.md").read_text()


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
    shutil.rmtree("models")
    assert model_card.write(folder, results) == "there is no eval-results/comparison.json"
    write_pair(Path(), MINE, MINE)
    edit_json(results / "after/run.json", files_sha256=system.weight_digests(folder))
    write_run(results / "other", {"mine": {"acc": share(9, 9)}})  # another model, in a folder next to `after`
    compare = compare_in(capsys)
    compare(AFTER="eval-results/other")
    assert "is about other weights than those in export" in model_card.write(folder, results)
    assert (folder / "README.md").read_text() == plain
    compare()
    assert model_card.write(folder, results) is None
    card = (folder / "README.md").read_text()
    assert "### lm_eval\n" in card and "| mine " in card
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


def templated(document):
    """Make lm_eval's results those of a chat pass."""
    document.update(chat_template_sha="abc")


def measure(folder):
    """Write every result of the export `folder`: lm_eval, the chat pass and the built-in check. Returns: their Path."""
    results, weights = Path("eval-results"), system.weight_digests(folder)
    resized = system.weight_digests("models/resized")
    write_pair(Path(), MINE, MINE)
    for side, digests in (("before", resized), ("after", weights)):
        write_run(results / f"{side}-chat", MINE, change=templated)
        edit_json(results / f"{side}-chat/run.json", files_sha256=digests)
    edit_json(results / "after/run.json", files_sha256=weights)
    row = {"label": "x", "metric": "loss", "before": [1, 2], "after": [1, 2], "weights": [1, 1]}
    check = {"rows": [row], "notes": [], "weights_sha256": {"before": resized, "after": weights}}
    (results / "after/assistant.json").write_text(json.dumps(check))
    return results


def test_a_comparison_with_another_model_than_the_runs_base_does_not_reach_the_card(checkpoint, capsys):
    folder, compare = export(checkpoint, state_of(100)), compare_in(capsys)
    plain, results = (folder / "README.md").read_text(), measure(folder)
    other = {"model.safetensors": "f" * 64}
    for part, names in (
        ("lm_eval", ["before"]),
        ("lm_eval through the chat template", ["before-chat"]),
        ("Is it a better assistant?", []),
    ):
        for name in names:
            edit_json(results / name / "run.json", files_sha256=other)
        check = json.loads((results / "after/assistant.json").read_text())
        if part != "lm_eval":
            edit_json(results / "after/assistant.json", weights_sha256=check["weights_sha256"] | {"before": other})
        if not names:
            shutil.rmtree(results / "after-chat")
        compare()
        reason = model_card.write(folder, results)
        assert f"comparison.json ({part}) compares with another model than the one that export was trained" in reason
        assert (folder / "README.md").read_text() == plain
        measure(folder)
        compare()
        assert model_card.write(folder, results) is None


def test_no_honest_comparison_is_kept_off_the_card(checkpoint, capsys):
    Path("models").rename("elsewhere")
    Path("models").symlink_to("elsewhere")
    folder = export(checkpoint, state_of(100))
    results, compare = measure(folder), compare_in(capsys)
    compare()
    assert model_card.write(folder, results) is None and (folder / "README.md").read_text().count("\n### ") == 3
    edit_json(results / "before/run.json", files_sha256=system.weight_digests("models/resized"))  # as BASE_MODEL
    compare()
    assert model_card.write(folder, results) is None
    for name in ("before", "after"):  # only the chat pass was measured
        shutil.rmtree(results / name)
    run_eval.main({"EVAL_RESULTS": "eval-results", "EXPORT_DIR": "export"}, "compare")
    assert capsys.readouterr().out.endswith("export/README.md is up to date\n")
    assert "through the chat template" in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    "record",
    [None, {}, {"weights_sha256": [1]}, {"weights_sha256": {"base": {"model.safetensors": "before"}, "resized": {}}}],
)
def test_without_a_record_of_the_base_the_card_shows_no_comparison(checkpoint, capsys, record):
    path = Path("models/resized/resize.json")
    path.unlink() if record is None else path.write_text(json.dumps(record))
    folder = export(checkpoint, state_of(100))
    results = measure(folder)
    compare_in(capsys)()
    sentence = "training.json doesn't name the base: run resize_vocab.py again, then export_hf.py"
    assert sentence in model_card.write(folder, results)
    training = json.loads((folder / model_card.TRAINING).read_text())
    del training["weights_sha256"]  # as an older export has it
    (folder / model_card.TRAINING).write_text(json.dumps(training))
    assert sentence in model_card.write(folder, results)


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


def test_every_hub_data_set_of_the_ready_mixtures_has_a_licence():
    mixtures = [prepare_data.MIXTURE, *(json.loads(path.read_text()) for path in (ROOT / "mixtures").glob("*.json"))]
    named = {source["hub"] for mixture in mixtures for source in mixture if "hub" in source}
    assert named == model_card.LICENCES.keys()
