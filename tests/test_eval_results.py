"""eval_results.py on folders shaped like lm_eval's: what is read, and which pairs of runs are refused.

Alone: bash tests/run.sh tests/test_eval_results.py
"""

import json
import math

import pytest
from helpers import MINE, RESULTS_TIME, compare_in, edit_json, share, write_pair, write_run

from sft.evaluation import eval_results


@pytest.fixture
def refusal(tmp_path, monkeypatch, capsys):
    """Return a function that returns the sentence with which compare_evals.py refuses the runs in `tmp_path`."""
    monkeypatch.chdir(tmp_path)

    def refuse():
        with pytest.raises(SystemExit) as error:
            compare_in(capsys)()
        assert not (tmp_path / "eval-results/comparison.md").exists()
        return str(error.value)

    return refuse


def edit(part, **values):
    return lambda document: document[part].update(values)


# ==== Measured differently ====


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (edit("versions", mine=2.0), "version of mine: 1.0 before, 2.0 after"),
        (edit("n-shot", mine=5), "few-shot of mine: 0 before, 5 after"),
        (edit("config", limit=3.0), "limit: None before, 3.0 after"),
        (edit("config", model_dtype="torch.float32"), "model_dtype: torch.bfloat16 before, torch.float32 after"),
        (edit("config", model_args={"pretrained": "x", "add_bos_token": True}), "model arguments: "),
        (edit("task_hashes", mine="other"), "hash of the prompts of mine"),
        (lambda document: document.update(chat_template_sha="abc"), "chat_template_sha: None before, abc after"),
        (lambda document: document.update(lm_eval_version="0.4.9"), "lm_eval: 0.4.13 before, 0.4.9 after"),
        (lambda document: document["results"].update(extra={"acc,none": 1.0}), "tasks: mine before, extra, mine after"),
    ],
)
def test_runs_measured_differently_are_refused(tmp_path, refusal, change, says):
    write_run(tmp_path / "eval-results/before", MINE)
    write_run(tmp_path / "eval-results/after", MINE, change=change)
    sentence = refusal()
    assert "measured differently" in sentence and says in sentence


def test_many_differences_are_counted(tmp_path, refusal):
    write_run(tmp_path / "eval-results/before", MINE)
    seeds = {"random_seed": 1, "numpy_seed": 1, "torch_seed": 1, "fewshot_seed": 1}
    more = edit("config", **seeds, limit=1, gen_kwargs={"x": 1}, model_dtype="x", model_args={"y": 1})
    write_run(tmp_path / "eval-results/after", MINE, change=lambda d: [more(d), d.update(lm_eval_version="0")])
    sentence = refusal()
    assert sentence.count("before, ") == 8 and "and 1 more" in sentence


def test_another_bos_policy_is_refused(tmp_path, refusal):
    write_pair(tmp_path, MINE, MINE)
    (tmp_path / "eval-results/after/run.json").write_text('{"adds_bos": true}')
    assert "BOS put before each prompt: False before, True after" in refusal()


def test_other_token_ids_of_the_same_text_are_refused(tmp_path, refusal):
    write_pair(tmp_path, MINE, MINE)
    for side in ("before", "after"):
        edit_json(tmp_path / f"eval-results/{side}/run.json", ids_sha256=side)
    assert "digest of the token ids of a text: before before, after after" in refusal()


def test_results_without_model_arguments_can_be_compared(tmp_path):
    write_run(tmp_path, MINE, change=lambda document: document.update(config={}))
    run = eval_results.read_run(tmp_path)
    assert eval_results.check_comparable(run, run) == ["both runs measured the very same weights."]


# ==== Missing or broken ====


def test_missing_or_broken_files_have_their_sentence(tmp_path, refusal):
    assert "There is no folder eval-results/before" in refusal()
    (tmp_path / "eval-results/before").mkdir(parents=True)
    assert "lm_eval did not finish there" in refusal()
    write_pair(tmp_path, MINE, MINE)
    folder = tmp_path / "eval-results/after/models__x"
    samples, results = folder / f"samples_mine_{RESULTS_TIME}.jsonl", folder / f"results_{RESULTS_TIME}.json"
    whole = samples.read_text()
    samples.write_text(whole[:-20])
    assert "line 9, is not a logged question" in refusal()
    samples.write_text("".join(whole.splitlines(keepends=True)[:-1]))
    assert "The logged questions of mine differ" in refusal()
    samples.write_text(whole.replace('"-1.0"', '"nan"'))
    assert "line 1: the model answered NaN" in refusal()
    samples.unlink()
    assert "The logged questions of mine are missing" in refusal()
    results.write_text(results.read_text()[:100])
    assert "is not readable JSON" in refusal()
    results.write_text("{}")
    assert "is not a results file of lm_eval" in refusal()


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("results", [], "its results doesn't have the form"),
        ("results", {"mine": 1}, "its results doesn't have the form"),
        ("configs", {"mine": {"metric_list": [1]}}, "its configs doesn't have the form"),
        ("config", {"model_args": 5}, "its config doesn't have the form"),
        ("results", {"../x": {"acc,none": 0.5}}, "The logged questions of ../x are missing"),
    ],
)
def test_results_of_another_form_are_refused(tmp_path, refusal, key, value, says):
    write_pair(tmp_path, MINE, MINE, change=lambda document: document.update({key: value}))
    assert says in refusal()


@pytest.mark.parametrize("line", [b"\xff", b"[" * 100_000, b'{"filter": "none", "doc_id": "x", "filtered_resps": []}'])
def test_a_logged_question_of_another_form_is_refused(tmp_path, line):
    write_run(tmp_path, MINE)
    (tmp_path / f"models__x/samples_mine_{RESULTS_TIME}.jsonl").write_bytes(line)
    with pytest.raises(SystemExit, match="line 1, is not a logged question"):
        eval_results.read_samples(eval_results.read_run(tmp_path), "mine")


@pytest.mark.parametrize(("value", "says"), [(None, "is missing"), (math.nan, "is nan"), (math.inf, "is inf")])
def test_a_missing_or_nan_metric_is_refused(tmp_path, refusal, value, says):
    def change(document):
        entry = document["results"]["piqa"]
        if value is None:
            del entry["acc,none"]
        else:
            entry["acc,none"] = value

    piqa = {"piqa": {"acc": share(3, 9)}}
    write_pair(tmp_path, piqa, piqa, change=change)
    assert f"The metric acc of piqa {says}" in refusal()


def test_a_refusal_shows_the_name_of_a_task_without_escape_sequences(tmp_path, refusal):
    write_run(tmp_path / "eval-results/before", MINE)
    write_run(tmp_path / "eval-results/after", MINE, change=lambda d: d["results"].update({"x\x1b[2J": {}}))
    assert r"before, mine, x\x1b[2J after" in refusal()


def test_parts_are_read_as_one_run(tmp_path):
    write_run(tmp_path / "mine", MINE)
    write_run(tmp_path / "piqa", {"piqa": {"acc": share(5, 9)}})
    (tmp_path / "run.json").write_text(json.dumps({"adds_bos": True}))
    run = eval_results.read_run(tmp_path)
    assert set(run["results"]) == set(run["versions"]) == set(run["file_of"]) == {"mine", "piqa"}
    assert run["file_of"]["piqa"].is_relative_to(tmp_path / "piqa") and run["record"] == {"adds_bos": True}
    assert run["config"]["batch_sizes"] == [None, None]
