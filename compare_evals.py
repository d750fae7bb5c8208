"""Compare two lm_eval results: what did fine-tuning change, and is the change more than chance?

Reads two folders written by `run_eval.sh` (lm_eval's results JSON and its logged samples, and `run.json`).
Writes to OUTPUT: `comparison.md` (also printed), `comparison.json`, `comparison.png`, and `flips.jsonl`: every question
that one model answers correctly and the other does not.

    python compare_evals.py                                   eval-results/before against eval-results/after
    python compare_evals.py --after eval-results/other        against another run

How a difference is judged. Both models answered the same questions, so the difference is taken question by question;
its standard error is that of the mean of these paired differences, smaller than the two models' own errors suggest. The
95% interval is the difference +- 1.96 standard errors. The p-value comes from the exact sign test over the questions
that flipped (right/wrong metrics), or, from 30 questions on, from difference / standard error (perplexity). The verdict
is "better" or "worse" where p passes Holm's correction for all rows of the table at FAMILY_ERROR, else "no difference
seen". Perplexity is compared as its logarithm, the mean negative log-likelihood of the target. A group such as MMLU is
the mean over all its questions, as lm_eval has it.
"""

import json
import math
import operator
import os
from pathlib import Path
from statistics import NormalDist

import files
import settings

# ---- Paths ----
BEFORE = "eval-results/before"  # folder of the first run, written by run_eval.sh
AFTER = "eval-results/after"  # folder of the second run
OUTPUT = "eval-results"  # folder for comparison.md, .json, .png and flips.jsonl; earlier ones are replaced

# ---- Verdict ----
FAMILY_ERROR = 0.05  # in (0, 1); how often at most a table without any real change shows a "better" or "worse"

# ==== Facts ====

# The published baseline's rows: lm_eval task, label, metric, score of random guessing. Other tasks show all metrics.
KNOWN_ROWS = (
    ("arc_challenge", "ARC-Challenge", "acc_norm", 0.25),
    ("arc_easy", "ARC-Easy", "acc_norm", 0.25),
    ("hellaswag", "HellaSwag", "acc_norm", 0.25),
    ("piqa", "PIQA", "acc", 0.5),
    ("winogrande", "Winogrande", "acc", 0.5),
    ("lambada_openai", "Lambada (OpenAI)", "acc", None),
    ("lambada_openai", "Lambada (OpenAI)", "perplexity", None),
    ("mmlu", "MMLU (overall)", "acc", 0.25),
    ("mmlu_humanities", "MMLU: Humanities", "acc", 0.25),
    ("mmlu_stem", "MMLU: STEM", "acc", 0.25),
    ("mmlu_social_sciences", "MMLU: Social Sciences", "acc", 0.25),
    ("mmlu_other", "MMLU: Other", "acc", 0.25),
)
# What must have which shape, where it is there: a type, {key: shape} with "*" for every other key, [shape of each].
RESULTS = {"results": {"*": {"alias": str}}, "configs": {"*": {"metric_list": ([{"metric": str}], type(None))}}}
RESULTS |= {"higher_is_better": {"*": {}}, "group_subtasks": {"*": [str]}, "config": {"model_args": (str, {})}}
RESULTS |= {"versions": {}, "n-shot": {}, "task_hashes": {}}
FACTS = {"files_sha256": {}, "versions": {}}  # of run.json


# ==== Reading one run ====


def fits(value, shape):
    """Return whether a JSON value has a shape (see RESULTS); a tuple gives several."""
    if isinstance(shape, tuple):
        return any(fits(value, one) for one in shape)
    if isinstance(shape, list):
        return isinstance(value, list) and all(fits(part, shape[0]) for part in value)
    if isinstance(shape, dict):
        parts = value.items() if isinstance(value, dict) else ()
        return isinstance(value, dict) and all(fits(part, shape.get(k, shape.get("*", object))) for k, part in parts)
    return isinstance(value, shape)


def finite(value):
    """Return whether a JSON value is a number to calculate with: JSON in Python knows NaN, and integers of any size."""
    return isinstance(value, int | float) and abs(value) < 1e100


def read_json(path, shapes):
    """Parse a JSON file, an object. Raises: SystemExit naming the file when it is not whole or has another shape."""
    value = files.read_json(path, "run_eval.sh")
    if wrong := [key for key, shape in shapes.items() if key in value and not fits(value[key], shape)]:
        raise SystemExit(f"{path}: its {wrong[0]} has not the form that lm_eval 0.4 writes. Run run_eval.sh again.")
    return value


def read_run(folder):
    """Read the newest results of a run folder.

    Returns: lm_eval's results dict with three more keys: `folder`, `results_file` (Path) and `run` (run.json or {}).
    Raises: SystemExit for a missing folder, no results, broken JSON, or a JSON that is not lm_eval's.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise SystemExit(f"There is no folder {folder}. `bash run_eval.sh before` and `after` write the two runs.")
    # lm_eval writes into a folder named after the model; the time in the file's name sorts.
    found = sorted(folder.rglob("results_*.json"), key=lambda path: path.name)
    if not found:
        raise SystemExit(f"No results_*.json under {folder}: lm_eval did not finish there. Run run_eval.sh again.")
    if len(found) > 1:
        print(f"{folder} holds {len(found)} results; the newest is used: {found[-1].name}")
    result = read_json(found[-1], RESULTS)
    missing = [k for k in ("results", "versions", "n-shot", "configs", "config", "lm_eval_version") if k not in result]
    if missing:
        raise SystemExit(f"{found[-1]} is not a results file of lm_eval 0.4: it has no {', '.join(missing)}.")
    facts = folder / "run.json"
    result |= {"folder": folder, "results_file": found[-1]}
    return result | {"run": read_json(facts, FACTS) if facts.exists() else {}}


def read_samples(run, task):
    """Read the logged questions of one task: {(filter, doc_id): sample}. Raises: SystemExit if missing or broken."""
    path = run["results_file"].parent / (run["results_file"].name.replace("results_", f"samples_{task}_") + "l")
    if not os.path.isfile(path):  # Path.is_file raises for a name that is too long
        raise SystemExit(
            f"The logged questions of {task} are missing: {path}. Run lm_eval with --log_samples, as run_eval.sh does."
        )
    samples = {}
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                sample = json.loads(line.decode())
                samples[sample["filter"], operator.index(sample["doc_id"])] = sample
                # lm_eval takes the first choice for a model that answers NaN, and calls it right or wrong.
                broken = any(answer[0] == "nan" for answer in sample["filtered_resps"] if isinstance(answer, list))
            except (ValueError, LookupError, TypeError, RecursionError):
                raise SystemExit(f"{path}, line {number}, is not a logged question of lm_eval.") from None
            if broken:
                raise SystemExit(f"{path}, line {number}: the model answered NaN; its weights or its dtype are broken.")
    return samples


# ==== The gate: were the two runs measured alike? ====


def how_measured(run):
    """Two dicts {what: value}: what must be equal in both runs of a comparison, and what may move scores a little."""
    config, facts = run["config"], run["run"]
    arguments = config.get("model_args", {})
    if isinstance(arguments, str):
        arguments = dict(part.partition("=")[::2] for part in arguments.split(","))
    must = {"tasks": ", ".join(sorted(run["results"])), "lm_eval": run["lm_eval_version"]}
    must["model arguments"] = {name: value for name, value in arguments.items() if name != "pretrained"}
    for name in ("limit", "model_dtype", "gen_kwargs", "random_seed", "numpy_seed", "torch_seed", "fewshot_seed"):
        must[name] = config.get(name)
    for name in ("chat_template_sha", "system_instruction_sha", "fewshot_as_multiturn", "max_length"):
        must[name] = run.get(name)
    if "adds_bos" in facts:
        must["BOS put before each prompt"] = facts["adds_bos"]
    # The task hash covers every question, prompt and target, so also few-shot examples and templates.
    for name, key in (("version", "versions"), ("few-shot", "n-shot"), ("hash of the prompts", "task_hashes")):
        must |= {f"{name} of {task}": value for task, value in run.get(key, {}).items()}
    may = {name: config.get(name) for name in ("batch_size", "batch_sizes", "device")}
    may |= {"transformers": run.get("transformers_version"), "device's name": facts.get("device")}
    may["torch"] = facts.get("versions", {}).get("torch")
    return must, may


def agree(before, after):
    """Compare how two runs were measured.

    Returns: list of sentences: what differs and may move scores a little, and what looks wrong with a run.
    Raises: SystemExit listing the differences that make the scores incomparable.
    """
    (must, may), (other_must, other_may) = how_measured(before), how_measured(after)
    apart = [
        f"  {name}: {value} before, {other_must[name]} after"
        for name, value in must.items()
        if name in other_must and value != other_must[name]
    ]
    if apart:
        more = [f"  and {len(apart) - 8} more"] if len(apart) > 8 else []
        raise SystemExit(
            f"{before['folder']} and {after['folder']} were measured differently, so they cannot be compared:\n"
            + "\n".join(apart[:8] + more)
            + "\nMeasure one of them again with the settings of the other."
        )
    notes = [
        f"{name} differs ({value} before, {other_may[name]} after); scores can move slightly with it."
        for name, value in may.items()
        if value != other_may[name]
    ]
    weights = [
        {name: digest for name, digest in run["run"].get("files_sha256", {}).items() if name.endswith(".safetensors")}
        for run in (before, after)
    ]
    if weights[0] and weights[0] == weights[1]:
        notes.append("both runs measured the very same weights.")
    for side, run in (("before", before), ("after", after)):
        perplexity = run["results"].get("lambada_openai", {}).get("perplexity,none")
        if finite(perplexity) and perplexity > 10_000:
            notes.append(
                f"{side}: Lambada's perplexity is that of a model that cannot read plain text. Such a model is usually "
                "a broken import or export (rotary layout, key names, tokenizer), not a weak one."
            )
    return notes


# ==== Rows ====


def plan_rows(run):
    """List the table's rows from one run's results: (task, label, metric key "name,filter", chance or None)."""
    results, rows = run["results"], []
    hidden = {task for task, *_ in KNOWN_ROWS}
    for task, label, metric, chance in KNOWN_ROWS:
        if task in results:
            rows.append((task, label, f"{metric},none", chance))
            if task.startswith("mmlu"):  # the 57 subjects are in their groups
                hidden.update(run.get("group_subtasks", {}).get(task, ()))
    for task in results:
        if task not in hidden:
            declared = [m["metric"] for m in run["configs"].get(task, {}).get("metric_list") or () if "metric" in m]
            keys = [k for k in results[task] if "," in k and not k.split(",")[0].endswith("_stderr")]
            keys += [f"{metric},none" for metric in declared if not any(k.split(",")[0] == metric for k in keys)]
            rows += [(task, results[task].get("alias", task).strip(" -"), key, "guess") for key in keys]
    return rows


def value_of(run, task, key):
    """The metric's value and its standard error (None if lm_eval gives none). Raises: SystemExit if missing or NaN."""
    name, _, kind = key.partition(",")
    value = run["results"][task].get(key)
    if not finite(value) or (name == "perplexity" and value <= 0):
        found = "is missing" if value is None else f"is {value}"
        raise SystemExit(
            f"The metric {name} of {task} {found} in {run['results_file']}. A model with broken weights gives NaN or "
            "infinity; a task that stopped half way leaves it out. Measure it again."
        )
    stderr = run["results"][task].get(f"{name}_stderr,{kind}")
    return value, stderr if finite(stderr) else None


def leaves(run, task, above=()):
    """The tasks below a group, in order; a task itself. Raises: SystemExit if a group is below itself."""
    if task in above:
        raise SystemExit(f"{run['results_file']}: the group {task} is a part of itself. Run run_eval.sh again.")
    below = run.get("group_subtasks", {}).get(task)
    return [leaf for child in below for leaf in leaves(run, child, (*above, task))] if below else [task]


def pairs_of(before, after, tasks, kind, cache):
    """Pair the logged questions of both runs: list of (task, sample before, sample after), for one filter (`kind`)."""
    pairs = []
    for task in tasks:
        if task not in cache:
            cache[task] = read_samples(before, task), read_samples(after, task)
        first, second = ({doc: s for (k, doc), s in side.items() if k == kind} for side in cache[task])
        if set(first) != set(second):
            raise SystemExit(f"The logged questions of {task} differ between the runs; a file was cut or edited.")
        pairs += [(task, first[doc], second[doc]) for doc in sorted(first)]
    return pairs


def sign_test(ups, downs):
    """Exact two-sided p-value that `ups` and `downs` come from a fair coin (McNemar's exact test)."""
    flips, term, tail = ups + downs, 1, 0
    for k in range(min(ups, downs) + 1):
        tail += term
        term = term * (flips - k) // (k + 1)
    return min(1.0, 2 * tail / 2**flips)


def paired(first, second):
    """The paired difference of two equally long lists of at least two numbers; right/wrong scores are 0 and 1.

    Returns: dict of difference (mean of second - first), stderr, interval [low, high], p (of "no difference"), ups and
    downs (numbers that rose and fell).
    """
    n, gaps = len(first), [b - a for a, b in zip(first, second, strict=True)]
    ups, downs = sum(gap > 0 for gap in gaps), sum(gap < 0 for gap in gaps)
    mean = math.fsum(gaps) / n
    stderr = math.sqrt(math.fsum((gap - mean) ** 2 for gap in gaps) / (n - 1) / n)
    if set(first) | set(second) <= {0, 1}:
        p = sign_test(ups, downs)
    else:  # the normal approximation, where there are enough questions for it
        p = 2 * NormalDist().cdf(-abs(mean) / stderr) if n >= 30 and stderr > 0 else 1.0
    interval = [mean - 1.96 * stderr, mean + 1.96 * stderr]
    return {"difference": mean, "stderr": stderr, "interval": interval, "p": p, "ups": ups, "downs": downs}


def compare_row(before, after, planned, cache):
    """Compare one planned row.

    Returns: the row's facts (a dict; `paired` is None where lm_eval does not average one number per question), and the
    flipped questions as list of (task, sample before, sample after).
    """
    task, label, key, chance = planned
    name, _, kind = key.partition(",")
    log_scale = name == "perplexity"
    pairs = pairs_of(before, after, leaves(before, task), kind, cache)
    higher = before.get("higher_is_better", {}).get(task, {}).get(name)
    row = {"label": label, "task": task, "metric": name if kind == "none" else f"{name} ({kind})"}
    row |= {"questions": len(pairs), "log_scale": log_scale, "paired": None}
    row["higher_is_better"] = not log_scale if higher is None else higher
    row["chance"] = guess_rate(pairs, before, name) if chance == "guess" else chance
    scores = []
    for side, run, place in (("before", before, 1), ("after", after, 2)):
        value, stderr = value_of(run, task, key)
        row[side] = {"value": value, "stderr": stderr}
        numbers = [pair[place].get(name) for pair in pairs]
        if len(numbers) > 1 and all(isinstance(x, int | float) for x in numbers):
            # lm_eval logs the target's log-likelihood as its "perplexity"
            numbers = [-x for x in numbers] if log_scale else numbers
            mean = math.fsum(numbers) / len(numbers) if all(map(finite, numbers)) else math.nan
            expected = math.log(value) if log_scale else value
            if math.isclose(mean, expected, rel_tol=1e-6, abs_tol=1e-9):
                scores.append(numbers)
            elif chance != "guess":
                raise SystemExit(
                    f"{name} of {task} is {value} in {run['results_file']}, but its logged questions give another "
                    "value: they are of another run or were edited. Measure it again."
                )
    if len(scores) < 2:
        return row, []
    row["paired"] = paired(*scores)
    return row, [pair for pair in pairs if {pair[1][name], pair[2][name]} == {0, 1}]


def compare(before, after, family_error):
    """Compare two runs that agree.

    Returns: list of rows (see `compare_row`, and `verdict`), list of flipped questions as dicts, each question once.
    """
    cache, rows, flips = {}, [], []
    for planned in plan_rows(before):
        row, flipped = compare_row(before, after, planned, cache)
        rows.append(row)
        if leaves(before, row["task"]) == [row["task"]] or row["task"] == "mmlu":
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


def table(rows):
    """The rows as an aligned Markdown table."""
    heads = "Task|Metric|Questions|Chance|Before ± SE|After ± SE|Difference ± paired SE|Difference / SE|95% interval|"
    lines = [(heads + "Verdict|Above chance").split("|")]
    for row in rows:
        pair, log = row["paired"], row["log_scale"]
        cells = [row["label"], row["metric"], f"{row['questions']:,}"]
        cells.append("-" if row["chance"] is None else f"{row['chance']:.2f}")
        cells += [f"{number(row[s]['value'], log)} ± {number(row[s]['stderr'], log)}" for s in ("before", "after")]
        if pair:
            low, high = (number(end, signed=True) for end in pair["interval"])
            difference = ("ln " if log else "") + number(pair["difference"], signed=True)
            ratio = f"{pair['difference'] / pair['stderr']:+.1f}" if pair["stderr"] > 0 else "-"
            cells += [f"{difference} ± {number(pair['stderr'])}", ratio, f"{low} to {high}"]
        else:
            cells += [number(row["after"]["value"] - row["before"]["value"], signed=True), "-", "-"]
        lines.append([*cells, row["verdict"], above_chance(row)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines]


def markdown(rows, before, after, notes, family_error):
    """The comparison as a Markdown page."""
    limit = before["config"].get("limit")
    limit = f"{limit:g}" if finite(limit) and limit else limit
    models = " against ".join(f"`{run.get('model_name')}`" for run in (before, after))
    page = ["# What fine-tuning changed", "", f"{models}.", ""]
    if limit:
        page += [f"**A quick look (LIMIT={limit}): only a part of each task was measured.**", ""]
    page += [
        *table(rows),
        "",
        "Before, After: score ± its own standard error (SE); above chance: by more than two of those. Difference: "
        "paired by question; perplexity as its natural logarithm (ln), where lower is better. Verdict: corrected over "
        f"all rows (Holm): without any real change at most {family_error:.0%} of such tables show 'better' or 'worse'.",
        "",
        f"lm_eval {before['lm_eval_version']}, {before['config'].get('model_dtype')}, batch size "
        f"{before['config'].get('batch_size')}, "
        f"{'with' if before.get('chat_template_sha') else 'without'} chat template.",
        *(f"\nNote: {note}" for note in notes),
    ]
    return ("\n".join(page) + "\n").encode("utf-8", "replace").decode()  # a lone surrogate becomes "?"


def chart(rows, path):
    """Draw every accuracy before and after, with its 95% interval and the chance line, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [row for row in rows if not row["log_scale"] and 0 <= row["before"]["value"] <= 1 >= row["after"]["value"]]
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
    axes.set_xlabel("score, with 95% interval")
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(run_settings):
    before, after = read_run(BEFORE), read_run(AFTER)
    if not 0 < FAMILY_ERROR < 1:
        raise SystemExit(f"FAMILY_ERROR is {FAMILY_ERROR}, but must lie between 0 and 1.")
    notes = agree(before, after)
    rows, flips = compare(before, after, FAMILY_ERROR)
    page = markdown(rows, before, after, notes, FAMILY_ERROR)
    output = Path(OUTPUT)
    output.mkdir(parents=True, exist_ok=True)
    (output / "comparison.md").write_text(page, encoding="utf-8")
    facts = {"settings": run_settings, "notes": notes, "limit": before["config"].get("limit"), "rows": rows}
    (output / "comparison.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    with (output / "flips.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(flip, ensure_ascii=False) + "\n" for flip in flips)
    chart(rows, output / "comparison.png")
    print(page)


if __name__ == "__main__":
    main(settings.from_flags(globals()))
