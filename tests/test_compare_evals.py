"""compare_evals.py on folders shaped like lm_eval's, with scores made up for each test."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sft.evaluation import compare_evals, eval_results

SCRIPT = Path(__file__).parents[1] / "sft" / "evaluation" / "compare_evals.py"
TIME = "2026-01-02T03-04-05.678901"


def write_run(folder, tasks, groups=None, change=None, choices=4, time=TIME):
    """Write an lm_eval result: tasks = {task: {metric: scores per question}}, groups = {group: [tasks]}.

    choices: number of answers to choose from, for all tasks or {task: number}; 0 for a task without.
    `change(results)` edits the results JSON before it is written.
    """
    model = folder / "models__x"
    model.mkdir(parents=True, exist_ok=True)
    results, configs = {}, {}
    for task, metrics in tasks.items():
        (n,) = {len(scores) for scores in metrics.values()}
        offered = choices.get(task, 4) if isinstance(choices, dict) else choices
        entry = results[task] = {"name": task, "alias": task, "sample_len": n}
        for metric, scores in metrics.items():
            mean = sum(scores) / n
            stderr = math.sqrt(sum((s - mean) ** 2 for s in scores) / (n - 1) / n)
            if metric == "perplexity":
                mean, stderr = math.exp(-mean), math.exp(-mean) * stderr
            entry |= {f"{metric},none": mean, f"{metric}_stderr,none": stderr}
        with (model / f"samples_{task}_{time}.jsonl").open("w") as file:
            for i in range(n):
                sample = {"doc_id": i, "doc": {"q": i}, "filter": "none", "filtered_resps": [["-1.0", "False"]]}
                sample["arguments"] = {f"gen_args_{c}": {} for c in range(offered or 1)}
                file.write(json.dumps(sample | {metric: scores[i] for metric, scores in metrics.items()}) + "\n")
        kind = "multiple_choice" if offered else "loglikelihood"
        configs[task] = {"output_type": kind, "metric_list": [{"metric": metric} for metric in metrics]}
    for group, members in (groups or {}).items():
        scores = [s for task in leaf_tasks(groups, members) for s in tasks[task]["acc"]]
        results[group] = {"alias": group, "acc,none": sum(scores) / len(scores), "acc_stderr,none": 0.0036}
    document = {
        "results": results,
        "group_subtasks": groups or {},
        "configs": configs,
        "versions": dict.fromkeys(results, 1.0),
        "n-shot": dict.fromkeys(results, 0),
        "higher_is_better": {task: {m: m != "perplexity" for m in metrics} for task, metrics in tasks.items()},
        "config": {
            "model_args": {"pretrained": str(folder), "dtype": "bfloat16"},
            "model_dtype": "torch.bfloat16",
            "batch_size": "auto:2",
            "limit": None,
        },
        "lm_eval_version": "0.4.13",
        "model_name": folder.name,
        "task_hashes": dict.fromkeys(tasks, "same"),
    }
    if change:
        change(document)
    (model / f"results_{time}.json").write_text(json.dumps(document))
    (folder / "run.json").write_text(
        json.dumps({"adds_bos": False, "files_sha256": {"model.safetensors": folder.name}})
    )


def leaf_tasks(groups, members):
    return [leaf for m in members for leaf in (leaf_tasks(groups, groups[m]) if m in groups else [m])]


def share(right, n):
    """n answers, the first `right` of them right."""
    return [1.0] * right + [0.0] * (n - right)


def compare(tmp_path, *flags):
    return subprocess.run(
        [sys.executable, SCRIPT, *flags],
        env=os.environ | {"PYTHONPATH": str(SCRIPT.parents[2])},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        encoding="utf-8",
    )


def pair(tmp_path, before, after, **options):
    write_run(tmp_path / "eval-results/before", before, **options)
    write_run(tmp_path / "eval-results/after", after, **options)


def rows_of(tmp_path):
    return json.loads((tmp_path / "eval-results/comparison.json").read_text())["parts"][0]["rows"]


def refused(tmp_path, *flags):
    """The sentence with which the script refuses."""
    done = compare(tmp_path, *flags)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "eval-results/comparison.md").exists()
    return done.stderr


mine = {"mine": {"acc": share(3, 9)}}

# ---- The published baseline ----

# Right answers out of each task's real number of questions: they give every published score.
published = {
    "arc_challenge": {"acc": share(250, 1172), "acc_norm": share(304, 1172)},
    "arc_easy": {"acc": share(600, 2376), "acc_norm": share(600, 2376)},
    "hellaswag": {"acc": share(2570, 10042), "acc_norm": share(2615, 10042)},
    "piqa": {"acc": share(985, 1838), "acc_norm": share(900, 1838)},
    "winogrande": {"acc": share(618, 1267)},
    "lambada_openai": {
        "acc": share(0, 5152),
        "perplexity": [-math.log(3360048) + (0.5 if i % 2 else -0.5) for i in range(5152)],
    },
    "mmlu_h": {"acc": share(1155, 4705)},
    "mmlu_st": {"acc": share(867, 3153)},
    "mmlu_so": {"acc": share(818, 3077)},
    "mmlu_ot": {"acc": share(764, 3107)},
}
mmlu = {
    "mmlu_humanities": ["mmlu_h"],
    "mmlu_stem": ["mmlu_st"],
    "mmlu_social_sciences": ["mmlu_so"],
    "mmlu_other": ["mmlu_ot"],
    "mmlu": ["mmlu_stem", "mmlu_other", "mmlu_social_sciences", "mmlu_humanities"],
}


def test_published_table_in_its_rows_and_rounding(tmp_path):
    choices = {"piqa": 2, "winogrande": 2, "lambada_openai": 0}
    pair(tmp_path, published, published, groups=mmlu, choices=choices)
    done = compare(tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if line[:1] == "|"]
    table = [(task, metric, before.split(" ± ")[0], chance) for task, metric, _, chance, before, *_ in lines[2:]]
    assert table == [
        ("ARC-Challenge", "acc_norm", "0.2594", "0.25"),
        ("ARC-Easy", "acc_norm", "0.2525", "0.25"),
        ("HellaSwag", "acc_norm", "0.2604", "0.25"),
        ("PIQA", "acc", "0.5359", "0.50"),
        ("Winogrande", "acc", "0.4878", "0.50"),
        ("Lambada (OpenAI)", "acc", "0.0000", "-"),
        ("Lambada (OpenAI)", "perplexity", "3,360,048", "-"),
        ("MMLU (overall)", "acc", "0.2567", "0.25"),
        ("MMLU: Humanities", "acc", "0.2455", "0.25"),
        ("MMLU: STEM", "acc", "0.2750", "0.25"),
        ("MMLU: Social Sciences", "acc", "0.2658", "0.25"),
        ("MMLU: Other", "acc", "0.2459", "0.25"),
    ]
    # DESIGN's reading of that table: HellaSwag and PIQA are above chance by two standard errors, most others are not.
    above = {line[0]: line[-1] for line in lines[2:]}
    assert (above["HellaSwag"], above["PIQA"], above["ARC-Challenge"], above["Winogrande"]) == (
        "both",
        "both",
        "neither",
        "neither",
    )
    assert {line[-2] for line in lines[2:]} == {"no difference seen"}
    assert "cannot read plain text" in done.stdout
    assert (tmp_path / "eval-results/comparison.md").read_text(encoding="utf-8").strip() in done.stdout
    assert (tmp_path / "eval-results/comparison.png").read_bytes().startswith(b"\x89PNG")


# ---- The paired difference ----


def test_paired_difference_by_hand(tmp_path):
    before = {"persona": {"acc": [0.0] * 60 + [1.0] * 40}, "facts": {"acc": share(50, 100)}}
    after = {"persona": {"acc": [1.0] * 40 + [0.0] * 20 + [1.0] * 35 + [0.0] * 5}, "facts": {"acc": share(49, 100)}}
    pair(tmp_path, before, after)
    assert compare(tmp_path).returncode == 0
    persona, facts = rows_of(tmp_path)
    found = persona["paired"]
    # 40 gained, 5 lost of 100: mean 0.35, variance (45 - 100 * 0.35**2) / 99
    stderr = math.sqrt((45 - 100 * 0.35**2) / 99 / 100)
    assert (found["ups"], found["downs"]) == (40, 5)
    assert found["difference"] == pytest.approx(0.35) and found["stderr"] == pytest.approx(stderr)
    assert found["interval"] == pytest.approx([0.35 - 1.96 * stderr, 0.35 + 1.96 * stderr])
    assert found["difference"] / found["stderr"] > 2 and persona["verdict"] == "better"
    assert persona["chance"] == 0.25
    assert facts["paired"]["difference"] == pytest.approx(-0.01) and facts["verdict"] == "no difference seen"
    flips = [json.loads(line) for line in (tmp_path / "eval-results/flips.jsonl").read_text().splitlines()]
    assert len(flips) == 46 and flips[0] == {
        "part": "lm_eval", "task": "persona", "metric": "acc", "before": 0.0, "after": 1.0, "doc": {"q": 0},
    }  # fmt: skip


def test_perplexity_on_a_log_scale_lower_is_better(tmp_path):
    before = [-3.0 - 0.01 * (i % 7) for i in range(70)]
    pair(
        tmp_path,
        {"lambada_openai": {"acc": share(10, 70), "perplexity": before}},
        {
            "lambada_openai": {
                "acc": share(10, 70),
                "perplexity": [x + 0.5 + 0.001 * (i % 5) for i, x in enumerate(before)],
            }
        },
    )
    assert compare(tmp_path).returncode == 0
    _, row = rows_of(tmp_path)
    assert row["paired"]["difference"] == pytest.approx(-0.502) and row["verdict"] == "better"
    assert row["before"]["value"] == pytest.approx(math.exp(3.03)) and row["chance"] is None


def test_p_of_flipped_questions_is_that_of_the_exact_sign_test():
    def p(ups, downs):
        return compare_evals.paired(
            [0] * ups + [1] * downs + [1], [1] * ups + [0] * downs + [1], [1] * (ups + downs + 1)
        )

    assert p(1, 0)["p"] == p(0, 1)["p"] == 1 and p(2, 0)["p"] == 0.5
    assert p(8, 1)["p"] == pytest.approx(2 * (1 + 9) / 2**9)
    assert p(3000, 3000)["p"] == 1


def test_p_of_other_numbers_is_that_of_the_paired_t_test():
    found = compare_evals.paired([1.0, 2.0, 3.0], [1.5, 2.5, 4.5], [1, 1, 1])  # gaps 0.5, 0.5, 1.5: t = 2.5
    assert found["stderr"] == pytest.approx(1 / 3) and found["p"] == pytest.approx(0.1296, abs=1e-4)
    assert compare_evals.paired([1.5, 2.5], [1.5, 2.5], [1, 1])["p"] == 1


def test_weighted_mean_and_its_error():
    mean, stderr = compare_evals.mean_and_stderr([1.0, 2.0, 4.0], [1, 1, 2])
    assert mean == 2.75  # residuals 1.75, 0.75 and 2 * 1.25; their squares' sum 9.875
    assert stderr == pytest.approx(math.sqrt(9.875 * 3 / 2) / 4)
    assert compare_evals.mean_and_stderr([5.0], [3]) == (5.0, None)


def test_holm_corrects_for_the_number_of_rows():
    def rows(*p_values):
        made = [{"paired": {"p": p, "difference": 0.1}, "higher_is_better": True} for p in p_values]
        compare_evals.give_verdicts(made, 0.05)
        return [row["verdict"][:6] for row in made]

    assert rows(0.04) == ["better"]
    assert rows(0.04, 0.5) == ["no dif", "no dif"]
    assert rows(0.5, 0.02, 0.026) == ["no dif"] * 3
    assert rows(0.03, 0.01, 0.02) == ["better"] * 3  # 0.01 <= 0.05 / 3, 0.02 <= 0.05 / 2, 0.03 <= 0.05


def test_own_group_is_paired_over_all_its_questions_and_shows_its_tasks(tmp_path):
    tasks = {"one": {"acc": share(1, 4)}, "two": {"acc": share(10, 20)}}
    pair(tmp_path, tasks, {"one": {"acc": share(3, 4)}, "two": {"acc": share(10, 20)}}, groups={"both": ["one", "two"]})
    assert compare(tmp_path).returncode == 0
    rows = {row["task"]: row for row in rows_of(tmp_path)}
    assert set(rows) == {"one", "two", "both"} and rows["both"]["questions"] == 24
    assert rows["both"]["paired"]["difference"] == pytest.approx(2 / 24)
    assert len((tmp_path / "eval-results/flips.jsonl").read_text().splitlines()) == 2  # once, not again for the group


def test_group_of_another_average_is_shown_without_a_verdict(tmp_path):
    def unweighted(document):
        document["results"]["both"]["acc,none"] = 0.375

    tasks = {"one": {"acc": share(1, 4)}, "two": {"acc": share(10, 20)}}
    pair(tmp_path, tasks, tasks, groups={"both": ["one", "two"]}, change=unweighted)
    assert compare(tmp_path).returncode == 0
    assert {row["task"]: row["verdict"] for row in rows_of(tmp_path)}["both"] == "not tested"


def test_other_task_shows_all_its_metrics_and_chance_from_its_choices(tmp_path):
    tasks = {"mine": {"acc": share(3, 9), "acc_norm": share(4, 9)}}
    pair(tmp_path, tasks, tasks, choices=3)
    assert compare(tmp_path).returncode == 0
    assert [(row["metric"], round(row["chance"], 4)) for row in rows_of(tmp_path)] == [
        ("acc", 0.3333),
        ("acc_norm", 0.3333),
    ]


def test_quick_look_and_other_batch_size_are_marked(tmp_path):
    tasks = {"mine": {"acc": share(3, 9)}}

    def limited(batch_size):
        return lambda document: document["config"].update(limit=9.0, batch_size=batch_size)

    write_run(tmp_path / "eval-results/before", tasks, change=limited("8"))
    write_run(tmp_path / "eval-results/after", tasks, change=limited("16"))
    done = compare(tmp_path)
    assert (
        done.returncode == 0
        and "| Task (LIMIT=9) " in done.stdout
        and "batch_size differs (8 before, 16 after)" in done.stdout
    )


def test_a_metric_of_several_verdicts_per_question_is_paired_with_their_number_as_weight(tmp_path):
    def lists(*rights):
        return [[i < right for i in range(2 if n % 2 else 1)] for n, right in enumerate(rights)]

    def write(side, values):
        flat = [x for value in values for x in value]

        def change(document):
            document["results"]["ifeval"]["inst_level_strict_acc,none"] = sum(flat) / len(flat)

        folder = tmp_path / "eval-results" / side
        write_run(folder, {"ifeval": {"x": [0.0] * len(values)}}, change=change, choices=0)
        path = folder / f"models__x/samples_ifeval_{TIME}.jsonl"
        samples = [json.loads(line) for line in path.read_text().splitlines()]
        samples = [s | {"inst_level_strict_acc": value} for s, value in zip(samples, values, strict=True)]
        path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))

    write("before", lists(0, 0, 1, 1))
    write("after", lists(1, 2, 1, 1))
    assert compare(tmp_path).returncode == 0
    row = next(row for row in rows_of(tmp_path) if row["metric"] == "inst_level_strict_acc")
    assert row["before"]["value"] == pytest.approx(2 / 6) and row["after"]["value"] == pytest.approx(5 / 6)
    assert row["paired"]["difference"] == pytest.approx(3 / 6) and row["chance"] is None


def test_two_results_in_one_folder_are_refused_and_a_place_for_each_task_is_read(tmp_path):
    write_run(tmp_path / "eval-results/before", mine, time="2025-01-01T00-00-00.000000")
    pair(tmp_path, {"mine": {"acc": share(6, 9)}}, {"mine": {"acc": share(6, 9)}})
    assert "before holds two results of mine" in refused(tmp_path)
    for side in ("before", "after"):
        write_run(tmp_path / side / "mine", mine)
        write_run(tmp_path / side / "piqa", {"piqa": {"acc": share(5, 9)}}, choices=2)
    done = compare(tmp_path, "--before", "before", "--after", "after")
    assert done.returncode == 0, done.stderr
    assert [(row["task"], row["chance"]) for row in rows_of(tmp_path)] == [("piqa", 0.5), ("mine", 0.25)]
    write_run(tmp_path / "after/more", {"more": {"acc": share(5, 9)}}, change=edit("config", limit=3.0))
    done = compare(tmp_path, "--before", "before", "--after", "after")
    assert done.returncode == 1 and "parts of one run that were measured differently: limit: None" in done.stderr


def test_chat_pass_has_a_table_of_its_own_and_is_never_mixed_with_the_first(tmp_path):
    def templated(document):
        document.update(chat_template_sha="abc")

    pair(tmp_path, mine, mine)
    for side in ("before", "after"):
        write_run(tmp_path / f"eval-results/{side}-chat", {"mine": {"acc": share(6, 9)}}, change=templated)
    done = compare(tmp_path)
    assert done.returncode == 0 and "## lm_eval through the chat template" in done.stdout
    parts = json.loads((tmp_path / "eval-results/comparison.json").read_text())["parts"]
    assert [part["rows"][0]["before"]["value"] for part in parts] == [pytest.approx(3 / 9), pytest.approx(6 / 9)]
    done = compare(tmp_path, "--after", "eval-results/after-chat")
    assert done.returncode == 1 and "chat_template_sha: None before, abc after" in done.stderr


def test_built_in_check_has_its_table_with_weights(tmp_path):
    pair(tmp_path, mine, mine)
    loss = {"label": "Held-out answers: tulu", "metric": "loss", "before": [3.0, 2.0] * 20, "after": [1.0, 1.5] * 20}
    share = {"label": "Answers", "metric": "ended", "before": [0] * 8, "after": [1] * 8, "weights": [1] * 8}
    check = {"rows": [loss | {"weights": [10, 30] * 20}, share], "notes": ["Measured on 40 conversations."]}
    path = tmp_path / "eval-results/after/assistant.json"
    path.write_text(json.dumps(check))
    done = compare(tmp_path)
    assert done.returncode == 0 and "## Is it a better assistant?" in done.stdout
    assert "Note: Measured on 40 conversations." in done.stdout
    loss, share = json.loads((tmp_path / "eval-results/comparison.json").read_text())["parts"][1]["rows"]
    assert (loss["before"]["value"], loss["after"]["value"]) == (2.25, 1.375)
    assert loss["paired"]["difference"] == pytest.approx(-0.875) and loss["verdict"] == "better"
    assert share["verdict"] == "better" and share["paired"]["p"] == pytest.approx(2 / 2**8)
    path.write_text(json.dumps(check | {"rows": [check["rows"][0] | {"after": [1.0]}]}))
    done = compare(tmp_path)
    assert done.returncode == 1 and "the numbers of Held-out answers: tulu are not pairs" in done.stderr


def test_other_seeds_stand_side_by_side(tmp_path):
    pair(tmp_path, {"mine": {"acc": share(10, 40)}}, {"mine": {"acc": share(30, 40)}})
    write_run(tmp_path / "eval-results/seed43", {"mine": {"acc": share(12, 40)}})
    done = compare(tmp_path, "--other-seeds", "eval-results/seed43")
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if line[:1] == "|"]
    assert lines[-3] == ["Task", "Metric", "after", "seed43", "Verdicts"]
    assert lines[-1] == ["mine", "acc", "+0.5000", "+0.0500", "better, no difference seen"]


# ---- Bad input ----


def edit(part, **values):
    return lambda document: document[part].update(values)


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
def test_runs_measured_differently_are_refused(tmp_path, change, says):
    write_run(tmp_path / "eval-results/before", mine)
    write_run(tmp_path / "eval-results/after", mine, change=change)
    sentence = refused(tmp_path)
    assert "measured differently" in sentence and says in sentence


def test_other_bos_policy_is_refused(tmp_path):
    pair(tmp_path, mine, mine)
    (tmp_path / "eval-results/after/run.json").write_text('{"adds_bos": true}')
    assert "BOS put before each prompt: False before, True after" in refused(tmp_path)


def test_missing_or_broken_files_have_their_sentence(tmp_path):
    assert "There is no folder eval-results/before" in refused(tmp_path)
    (tmp_path / "eval-results/before").mkdir(parents=True)
    assert "lm_eval did not finish there" in refused(tmp_path)
    pair(tmp_path, mine, mine)
    assert "between 0 and 1" in refused(tmp_path, "--family-error", "2.0")
    folder = tmp_path / "eval-results/after/models__x"
    samples, results = folder / f"samples_mine_{TIME}.jsonl", folder / f"results_{TIME}.json"
    whole = samples.read_text()
    samples.write_text(whole[:-20])
    assert "line 9, is not a logged question" in refused(tmp_path)
    samples.write_text("".join(whole.splitlines(keepends=True)[:-1]))
    assert "The logged questions of mine differ" in refused(tmp_path)
    samples.write_text(whole.replace('"-1.0"', '"nan"'))
    assert "line 1: the model answered NaN" in refused(tmp_path)
    samples.unlink()
    assert "The logged questions of mine are missing" in refused(tmp_path)
    results.write_text(results.read_text()[:100])
    assert "is not readable JSON" in refused(tmp_path)
    results.write_text("{}")
    assert "is not a results file of lm_eval" in refused(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("results", [], "its results has not the form"),
        ("results", {"mine": 1}, "its results has not the form"),
        ("configs", {"mine": {"metric_list": [1]}}, "its configs has not the form"),
        ("config", {"model_args": 5}, "its config has not the form"),
        ("group_subtasks", {"mine": ["other"], "other": ["mine"]}, "the group mine is a part of itself"),
        ("results", {"../x": {"acc,none": 0.5}}, "The logged questions of ../x are missing"),
    ],
)
def test_results_of_another_form_are_refused(tmp_path, key, value, says):
    for side in ("before", "after"):
        write_run(tmp_path / side, mine, change=lambda document: document.update({key: value}))
    with pytest.raises(SystemExit, match=says):
        compare_evals.compare(
            compare_evals.read_run(tmp_path / "before"), compare_evals.read_run(tmp_path / "after"), 0.05
        )


def test_results_without_model_arguments_can_be_compared(tmp_path):
    write_run(tmp_path, mine, change=lambda document: document.update(config={}))
    run = compare_evals.read_run(tmp_path)
    assert compare_evals.agree(run, run) == ["both runs measured the very same weights."]


@pytest.mark.parametrize("line", [b"\xff", b"[" * 100_000, b'{"filter": "none", "doc_id": "x", "filtered_resps": []}'])
def test_a_logged_question_of_another_form_is_refused(tmp_path, line):
    write_run(tmp_path, mine)
    (tmp_path / f"models__x/samples_mine_{TIME}.jsonl").write_bytes(line)
    with pytest.raises(SystemExit, match="line 1, is not a logged question"):
        eval_results.read_samples(compare_evals.read_run(tmp_path), "mine")


@pytest.mark.parametrize("score", [math.nan, 10**400, 1e308])
def test_scores_that_cannot_be_added_are_those_of_no_run(tmp_path, score):
    write_run(tmp_path, {"piqa": {"acc": share(3, 9)}})
    path = tmp_path / f"models__x/samples_piqa_{TIME}.jsonl"
    path.write_text(path.read_text().replace('"acc": 1.0', f'"acc": {json.dumps(score)}'))
    run = compare_evals.read_run(tmp_path)
    with pytest.raises(SystemExit, match="its logged questions give another value"):
        compare_evals.compare(run, run, 0.05)


@pytest.mark.parametrize(
    ("value", "says"), [(None, "is missing"), (math.nan, "is nan"), (math.inf, "is inf"), (10**400, "is 1000")]
)
def test_missing_or_nan_metric_is_refused(tmp_path, value, says):
    def change(document):
        entry = document["results"]["piqa"]
        if value is None:
            del entry["acc,none"]
        else:
            entry["acc,none"] = value

    pair(tmp_path, {"piqa": {"acc": share(3, 9)}}, {"piqa": {"acc": share(3, 9)}}, change=change)
    assert f"The metric acc of piqa {says}" in refused(tmp_path)


def test_samples_of_another_run_are_refused(tmp_path):
    pair(tmp_path, {"piqa": {"acc": share(3, 9)}}, {"piqa": {"acc": share(3, 9)}}, change=None)
    path = tmp_path / f"eval-results/after/models__x/samples_piqa_{TIME}.jsonl"
    path.write_text(path.read_text().replace('"acc": 1.0', '"acc": 0.0'))
    assert "its logged questions give another value" in refused(tmp_path)
