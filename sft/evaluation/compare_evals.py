"""Compare two evaluations: what did fine-tuning change, and is the change more than chance?

Reads two folders written by `run_eval.sh` (lm_eval's results JSON and its logged samples, `run.json`, the built-in
check's `assistant.json`); beside them those of the chat pass, `BEFORE-chat` and `AFTER-chat`, if both are there.
Writes to OUTPUT: `comparison.md` (also printed), `comparison.json`, `comparison.png`, and `flips.jsonl`: every question
that one model answers correctly and the other does not.

    python compare_evals.py                                       eval-results/before against eval-results/after
    python compare_evals.py --after eval-results/other            against another run
    python compare_evals.py --other-seeds eval-results/seed43     and how far the same recipe moves with its seed

How a difference is judged. Both models answered the same questions, so the difference is taken question by question;
its standard error is that of the mean of these paired differences, smaller than the two models' own errors suggest. The
95% interval is the difference +- 1.96 standard errors. The p-value comes from the exact sign test over the questions
that flipped (right/wrong metrics), or from the paired t-test (perplexity, loss). The verdict is "better" or "worse"
where p passes Holm's correction for all rows of its table at FAMILY_ERROR, else "no difference seen". Perplexity is
compared as its logarithm, the mean negative log-likelihood of the target. A group such as MMLU is the mean over all its
questions, as lm_eval has it. Chance is that of the questions' own numbers of choices.
"""

import json
import math
from pathlib import Path

from sft import settings
from sft.evaluation import eval_results

# ---- Paths ----
BEFORE = "eval-results/before"  # folder of the first run, written by run_eval.sh
AFTER = "eval-results/after"  # folder of the second run
OTHER_SEEDS = ()  # folders of further runs: the same recipe as AFTER with other seeds
OUTPUT = "eval-results"  # folder for comparison.md, .json, .png and flips.jsonl; earlier ones are replaced

# ---- Verdict ----
FAMILY_ERROR = 0.05  # in (0, 1); how often at most a table without any real change shows a "better" or "worse"

# ==== Facts ====

# The published baseline's rows: lm_eval task, label, metric. Other tasks show all metrics.
KNOWN_ROWS = (
    ("arc_challenge", "ARC-Challenge", "acc_norm"),
    ("arc_easy", "ARC-Easy", "acc_norm"),
    ("hellaswag", "HellaSwag", "acc_norm"),
    ("piqa", "PIQA", "acc"),
    ("winogrande", "Winogrande", "acc"),
    ("lambada_openai", "Lambada (OpenAI)", "acc"),
    ("lambada_openai", "Lambada (OpenAI)", "perplexity"),
    ("mmlu", "MMLU (overall)", "acc"),
    ("mmlu_humanities", "MMLU: Humanities", "acc"),
    ("mmlu_stem", "MMLU: STEM", "acc"),
    ("mmlu_social_sciences", "MMLU: Social Sciences", "acc"),
    ("mmlu_other", "MMLU: Other", "acc"),
)
NUMBERS = [(int, float)]
# The shape of assistant.json.
ASSISTANT = {"rows": [{"label": str, "metric": str, "before": NUMBERS, "after": NUMBERS, "weights": NUMBERS}]}

# ==== Rows ====


def plan_rows(run):
    """List the table's rows from one run's results: (task, label, metric key "name,filter", whether known)."""
    results, rows = run["results"], []
    hidden = {task for task, *_ in KNOWN_ROWS}
    for task, label, metric in KNOWN_ROWS:
        if task in results:
            rows.append((task, label, f"{metric},none", True))
            if task.startswith("mmlu"):  # the 57 subjects are in their groups
                hidden.update(run["group_subtasks"].get(task, ()))
    for task in results:
        if task not in hidden:
            declared = [m["metric"] for m in run["configs"].get(task, {}).get("metric_list") or () if "metric" in m]
            keys = [k for k in results[task] if "," in k and not k.split(",")[0].endswith("_stderr")]
            keys += [f"{metric},none" for metric in declared if not any(k.split(",")[0] == metric for k in keys)]
            rows += [(task, results[task].get("alias", task).strip(" -"), key, False) for key in keys]
    return rows


def mean_and_stderr(numbers, weights):
    """The weighted mean of a list of numbers, one per question, and its standard error (None for a single one)."""
    n, total = len(numbers), math.fsum(weights)
    mean = math.fsum(w * x for x, w in zip(numbers, weights, strict=True)) / total
    square = math.fsum((w * (x - mean)) ** 2 for x, w in zip(numbers, weights, strict=True))
    return mean, math.sqrt(square * n / (n - 1)) / total if n > 1 else None


def paired(first, second, weights):
    """The paired difference of two equally long lists of at least two numbers; right/wrong scores are 0 and 1.

    Returns: dict of difference (mean of second - first), stderr, interval [low, high], p (of "no difference"), ups and
    downs (numbers that rose and fell).
    """
    from scipy.stats import binomtest, t  # takes half a second; what is refused, is refused before

    gaps = [b - a for a, b in zip(first, second, strict=True)]
    ups, downs = sum(gap > 0 for gap in gaps), sum(gap < 0 for gap in gaps)
    mean, stderr = mean_and_stderr(gaps, weights)
    if set(first) | set(second) <= {0, 1}:  # McNemar's exact test
        p = float(binomtest(ups, ups + downs).pvalue) if ups + downs else 1.0
    else:
        p = 2 * float(t.sf(abs(mean) / stderr, len(gaps) - 1)) if stderr > 0 else 1.0
    interval = [mean - 1.96 * stderr, mean + 1.96 * stderr]
    return {"difference": mean, "stderr": stderr, "interval": interval, "p": p, "ups": ups, "downs": downs}


def per_question(samples, name, log_scale):
    """Return (a number for each question, their weights), or None where lm_eval logs none.

    A metric that is a list, such as one verdict for each instruction of a question, counts by its length.
    """
    found = [sample.get(name) for sample in samples]
    lists = [value if isinstance(value, list) and value else [value] for value in found]
    if len(found) < 2 or not all(isinstance(x, int | float) for values in lists for x in values):
        return None
    if not all(eval_results.finite(x) for values in lists for x in values):
        return [math.nan] * len(lists), [1] * len(lists)
    sign = -1 if log_scale else 1  # lm_eval logs the target's log-likelihood as its "perplexity"
    return [sign * math.fsum(values) / len(values) for values in lists], [len(values) for values in lists]


def compare_row(before, after, planned, cache):
    """Compare one planned row.

    Returns: the row's facts (a dict; `paired` is None where lm_eval does not average one number per question), and the
    flipped questions as list of (task, sample before, sample after).
    """
    task, label, key, known = planned
    name, _, kind = key.partition(",")
    log_scale = name == "perplexity"
    pairs = eval_results.pairs_of(before, after, eval_results.leaves(before, task), kind, cache)
    higher = before["higher_is_better"].get(task, {}).get(name)
    row = {"label": label, "task": task, "metric": name if kind == "none" else f"{name} ({kind})"}
    row |= {"questions": len(pairs), "log_scale": log_scale, "paired": None}
    row["higher_is_better"] = not log_scale if higher is None else higher
    row["chance"] = guess_rate(pairs, before, name)
    scores = []
    for side, run, place in (("before", before, 1), ("after", after, 2)):
        value, stderr = eval_results.value_of(run, task, key)
        row[side] = {"value": value, "stderr": stderr}
        if found := per_question([pair[place] for pair in pairs], name, log_scale):
            expected = math.log(value) if log_scale else value
            if math.isclose(mean_and_stderr(*found)[0], expected, rel_tol=1e-6, abs_tol=1e-9):
                scores.append(found)
            elif known:
                raise SystemExit(
                    f"{name} of {task} is {value} in {run['file_of'][task]}, but its logged questions give another "
                    "value: they are of another run or were edited. Measure it again."
                )
    if len(scores) < 2 or scores[0][1] != scores[1][1]:
        return row, []
    row["paired"] = paired(scores[0][0], *scores[1])
    return row, [pair for pair in pairs if [pair[1][name], pair[2][name]] in ([0, 1], [1, 0])]


def compare(before, after, family_error):
    """Compare two runs that agree.

    Returns: list of rows (see `compare_row`, and `verdict`), list of flipped questions as dicts, each question once.
    """
    cache, rows, flips = {}, [], []
    for planned in plan_rows(before):
        row, flipped = compare_row(before, after, planned, cache)
        rows.append(row)
        if eval_results.leaves(before, row["task"]) == [row["task"]] or row["task"] == "mmlu":
            name = row["metric"].partition(" ")[0]
            flips += [
                {"task": task, "metric": row["metric"], "before": a[name], "after": b[name], "doc": a.get("doc")}
                for task, a, b in flipped
            ]
    give_verdicts(rows, family_error)
    return rows, flips


def guess_rate(pairs, run, metric):
    """The accuracy of random guessing: mean of 1 / number of choices; None for anything but multiple choice."""
    if (
        not pairs
        or metric not in ("acc", "acc_norm", "acc_bytes")
        or any(run["configs"].get(task, {}).get("output_type") != "multiple_choice" for task, *_ in pairs)
        or not all(isinstance(a.get("arguments"), list | dict) and a["arguments"] for _, a, _ in pairs)
    ):
        return None
    return math.fsum(1 / len(a["arguments"]) for _, a, _ in pairs) / len(pairs)


def give_verdicts(rows, family_error):
    """Add `verdict` to each row: Holm's step-down correction over all rows that have a p-value."""
    tested = sorted((row for row in rows if row["paired"]), key=lambda row: row["paired"]["p"])
    passed = True
    for rank, row in enumerate(tested):
        passed = passed and row["paired"]["p"] <= family_error / (len(tested) - rank)
        better = (row["paired"]["difference"] > 0) == row["higher_is_better"]
        row["verdict"] = ("better" if better else "worse") if passed else "no difference seen"
    for row in rows:
        row.setdefault("verdict", "not tested")


def assistant_rows(folder):
    """Return (rows, notes) of the built-in check that was written into a run's folder, ([], []) if there is none.

    Each of its rows has a number for each item before and after, and the items' weights.
    """
    path = Path(folder) / "assistant.json"
    if not path.exists():
        return [], []
    check, rows = eval_results.read_json(path, ASSISTANT), []
    for entry in check["rows"]:
        first, second, weights = entry["before"], entry["after"], entry["weights"]
        if not len(first) == len(second) == len(weights) > 0 or not all(
            map(eval_results.finite, first + second + weights)
        ):
            raise SystemExit(f"{path}: the numbers of {entry['label']} are not pairs. Run assistant_check.py again.")
        row = {"label": entry["label"], "task": entry["label"], "metric": entry["metric"], "questions": len(first)}
        row |= {"log_scale": False, "higher_is_better": entry["metric"] != "loss", "chance": None}
        for side, numbers in (("before", first), ("after", second)):
            row[side] = dict(zip(("value", "stderr"), mean_and_stderr(numbers, weights), strict=True))
        rows.append(row | {"paired": paired(first, second, weights) if len(first) > 1 else None})
    return rows, check["notes"]


def section(title, before, after, family_error):
    """Compare two run folders. Returns: (dict of title, rows, notes, limit and how it was measured; flips)."""
    first, second = eval_results.read_run(before), eval_results.read_run(after)
    notes = eval_results.agree(first, second)
    rows, flips = compare(first, second, family_error)
    limit = first["config"].get("limit")
    how = " against ".join(f"`{run.get('model_name')}`" for run in (first, second))
    how += f"; lm_eval {first['lm_eval_version']}, {first['config'].get('model_dtype')}, batch size "
    how += (
        f"{first['config'].get('batch_size')}, {'with' if first.get('chat_template_sha') else 'without'} chat template"
    )
    part = {"title": title, "rows": rows, "notes": notes, "how": f"{how}."}
    return part | {"limit": f"{limit:g}" if eval_results.finite(limit) and limit else limit}, flips


def sections(before, after, family_error):
    """Compare two runs in all that was measured: lm_eval, lm_eval through the chat template, the built-in check.

    Returns: (list of what `section` gives, flipped questions).
    """
    parts, flips = [], []
    chat = [f"{folder}-chat" for folder in (before, after)]
    asked = [("lm_eval", before, after)]
    if all(Path(folder).is_dir() for folder in chat):
        asked.append(("lm_eval through the chat template", *chat))
    for title, *folders in asked:
        part, flipped = section(title, *folders, family_error)
        parts.append(part)
        flips += [{"part": title} | flip for flip in flipped]
    rows, notes = assistant_rows(after)
    if rows:
        give_verdicts(rows, family_error)
        parts.append({"title": "Is it a better assistant?", "rows": rows, "notes": notes, "how": "", "limit": None})
    return parts, flips


# ==== Showing ====


def number(value, log_scale=False, signed=False):
    """The published table's rounding: four decimals, perplexity as a whole number with thousands; None as "-"."""
    if value is None:
        return "-"
    if log_scale:
        return f"{value:,.0f}" if value >= 100 else f"{value:,.2f}"
    return f"{value:+.4f}" if signed else f"{value:.4f}"


def above_chance(row):
    """Which of the two are more than two of their own standard errors above random guessing."""
    if row["chance"] is None:
        return "-"
    sides = [s for s in ("before", "after") if row[s]["value"] - row["chance"] > 2 * (row[s]["stderr"] or math.inf)]
    return "both" if len(sides) == 2 else "".join(sides) or "neither"


def aligned(lines):
    """Lists of cells, the first of them the head, as the lines of an aligned Markdown table."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines = [lines[0], ["-" * width for width in widths], *lines[1:]]
    return ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines]


def table(rows, limit):
    """The rows as an aligned Markdown table; `limit`: questions per task of a quick look, or None."""
    heads = "Metric|Questions|Chance|Before ± SE|After ± SE|Difference ± paired SE|Difference / SE|95% interval|"
    lines = [[f"Task (LIMIT={limit})" if limit else "Task", *(heads + "Verdict|Above chance").split("|")]]
    for row in rows:
        pair, log = row["paired"], row["log_scale"]
        cells = [row["label"], row["metric"], f"{row['questions']:,}"]
        cells.append("-" if row["chance"] is None else f"{row['chance']:.2f}")
        cells += [f"{number(row[s]['value'], log)} ± {number(row[s]['stderr'], log)}" for s in ("before", "after")]
        if pair:
            low, high = (number(end, signed=True) for end in pair["interval"])
            ratio = f"{pair['difference'] / pair['stderr']:+.1f}" if pair["stderr"] > 0 else "-"
            cells += [f"{difference(row)} ± {number(pair['stderr'])}", ratio, f"{low} to {high}"]
        else:
            cells += [difference(row), "-", "-"]
        lines.append([*cells, row["verdict"], above_chance(row)])
    return aligned(lines)


def difference(row):
    """The row's difference as the tables show it; without pairs it is that of the two values."""
    change = row["paired"]["difference"] if row["paired"] else row["after"]["value"] - row["before"]["value"]
    return ("ln " if row["log_scale"] and row["paired"] else "") + number(change, signed=True)


def seeds_table(names, seeds):
    """The differences of several runs of one recipe side by side. names: theirs; seeds: for each its list of parts."""
    lines = [["Task", "Metric", *names, "Verdicts"]]
    by_row = [{(p["title"], r["label"], r["metric"]): r for p in parts for r in p["rows"]} for parts in seeds]
    for key in by_row[0]:
        rows = [found[key] for found in by_row if key in found]
        if len(rows) == len(seeds):
            verdicts = list(dict.fromkeys(row["verdict"] for row in rows))
            lines.append([*key[1:], *map(difference, rows), ", ".join(verdicts)])
    return aligned(lines)


def markdown(parts, names, others, family_error):
    """The comparison as a Markdown page.

    parts: of `sections`; names: of AFTER and of the other seeds' runs; others: the parts of each of the latter.
    """
    page = ["# What fine-tuning changed", ""]
    for part in parts:
        page += [f"## {part['title']}", ""]
        page += [part["how"], ""] if part["how"] else []
        if part["limit"]:
            page += [f"**A quick look (LIMIT={part['limit']}): only a part of each task was measured.**", ""]
        page += [*table(part["rows"], part["limit"]), "", *(f"Note: {note}\n" for note in part["notes"])]
    if others:
        page += ["## Other seeds", "", "The same recipe with other seeds: each run's difference to before.", ""]
        page += [*seeds_table(names, [parts, *others]), ""]
    page += [
        "Before, After: score ± its own standard error (SE); above chance: by more than two of those. Difference: "
        "paired by question; perplexity as its natural logarithm (ln). Of perplexity and loss less is better. Verdict: "
        "corrected over all rows of its table (Holm): without any real change at most "
        f"{family_error:.0%} of such tables show 'better' or 'worse'."
    ]
    return ("\n".join(page) + "\n").encode("utf-8", "replace").decode()  # a lone surrogate becomes "?"


def chart(parts, path):
    """Draw every score between 0 and 1 before and after, with its 95% interval and the chance line, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for part in parts for row in part["rows"] if row["higher_is_better"] and not row["log_scale"]]
    shown = [row for row in rows if 0 <= row["before"]["value"] <= 1 >= row["after"]["value"] >= 0]
    figure, axes = pyplot.subplots(figsize=(8, 1.2 + 0.45 * len(shown)), layout="constrained")
    for side, color, shift in (("before", "tab:gray", -0.12), ("after", "tab:blue", 0.12)):
        axes.errorbar(
            [row[side]["value"] for row in shown],
            [y + shift for y in range(len(shown))],
            xerr=[1.96 * (row[side]["stderr"] or 0) for row in shown],
            fmt="o", color=color, label=side, capsize=2,
        )  # fmt: skip
    ticks = [(row["chance"], y) for y, row in enumerate(shown) if row["chance"] is not None]
    axes.vlines(
        [x for x, _ in ticks], [y - 0.4 for _, y in ticks], [y + 0.4 for _, y in ticks], "tab:red", label="chance"
    )
    axes.set_yticks(range(len(shown)), [f"{row['label']} ({row['metric']})" for row in shown])
    axes.invert_yaxis()
    limits = {f"LIMIT={part['limit']}" for part in parts if part["limit"]}
    axes.set_xlabel(", ".join(["score, with 95% interval", *limits]))
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(run_settings):
    if not 0 < FAMILY_ERROR < 1:
        raise SystemExit(f"FAMILY_ERROR is {FAMILY_ERROR}, but must lie between 0 and 1.")
    parts, flips = sections(BEFORE, AFTER, FAMILY_ERROR)
    others = [sections(BEFORE, folder, FAMILY_ERROR)[0] for folder in OTHER_SEEDS]
    names = [Path(folder).name for folder in (AFTER, *OTHER_SEEDS)]
    page, output = markdown(parts, names, others, FAMILY_ERROR), Path(OUTPUT)
    facts = {"settings": run_settings, "parts": parts, "other_seeds": dict(zip(names[1:], others, strict=True))}
    output.mkdir(parents=True, exist_ok=True)
    (output / "comparison.md").write_text(page, encoding="utf-8")
    (output / "comparison.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    with (output / "flips.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(flip, ensure_ascii=False) + "\n" for flip in flips)
    chart(parts, output / "comparison.png")
    print(page)


if __name__ == "__main__":
    main(settings.from_flags(globals()))
