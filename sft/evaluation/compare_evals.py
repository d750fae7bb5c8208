"""Compare two evaluations: what did fine-tuning change, and is the change more than chance?

Reads two folders written by `run_eval.sh`: lm_eval's results JSON and its logged samples, `run.json`, and the built-in
check's `assistant.json`. If the folders of the chat pass, `BEFORE-chat` and `AFTER-chat`, are both there, it compares
them too, in a table of their own; it refuses a chat pass or a check of other weights than AFTER's. Writes to
EVAL_RESULTS: `comparison.md` (also printed), `comparison.json`, and `flips.jsonl`: every question that one model
answers correctly and the other does not. report_page.py draws it.

    bash run_eval.sh compare            eval-results/before against eval-results/after
    bash run_eval.sh compare seed43     and how far the same recipe moves with its seed
    python -m sft.evaluation.compare_evals --after eval-results/other    against another run

How a difference is judged. Both models answered the same questions, so the difference is taken question by question;
its standard error is that of the mean of these paired differences, smaller than the two models' own errors suggest.
Where questions have weights (a conversation counts by its tokens), it is the leave-one-out error. The 95% interval is
the difference +- Student's quantile times that error. The p-value comes from the exact sign test over the questions
that flipped (right/wrong metrics, McNemar), or from the paired t-test (perplexity, loss, unequal weights); its degrees
of freedom are those of the effective number of questions, (sum w)^2 / sum w^2; below two nothing is tested. A change
that is the same in every question has no error; the sign test judges it. The verdict is "better" or "worse"
where p passes Holm's correction for all rows of its table at FAMILY_ERROR, else "no difference seen". Perplexity is
compared as its logarithm, the mean negative log-likelihood of the target. The score of a group such as MMLU is the mean
over all its questions, as in lm_eval. Chance follows from the number of choices of each question.
"""

import contextlib
import json
import math
import statistics
from hashlib import sha256
from pathlib import Path

from sft import settings, system, text
from sft.evaluation import eval_results

# ---- Paths ----
BEFORE = "eval-results/before"  # folder of the first run, written by run_eval.sh
AFTER = "eval-results/after"  # folder of the second run
OTHER_SEEDS = ()  # folders of further runs: the same recipe as AFTER with other seeds
EVAL_RESULTS = "eval-results"  # folder for comparison.md, .json and flips.jsonl; earlier ones are replaced

# ==== Constants ====

FAMILY_ERROR = 0.05  # how often at most a table without any real change shows a "better" or "worse"
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
COLUMNS = (
    "Task",
    "Metric",
    "Questions",
    "Chance",
    "Before ± SE",
    "After ± SE",
    "Difference ± paired SE",
    "Difference / SE",
    "95% interval",
    "Verdict",
    "Above chance",
)
GUESSED_METRICS = ("acc", "acc_norm", "acc_bytes")  # have a chance level, in tasks of multiple choice
NUMBERS = [(int, float)]
# The shape of assistant.json, see eval_results.RESULTS.
ASSISTANT = {
    "rows": [{"label": str, "metric": str, "before": NUMBERS, "after": NUMBERS, "weights": NUMBERS}],
    "notes": [str],
    "weights_sha256": {"before": {"*": str}, "after": {"*": str}},
}
SEEDS_NOTE = (
    "The same recipe with other seeds: each run's difference to before. The spread is the standard deviation over the "
    "runs. The verdict uses the paired error of a single run, which is the chance in the questions and not that of the "
    "seed: a difference within two spreads of zero may be the seed's."
)
BITS = "bits per byte"  # metric of a row of the built-in check that has the loss of the row before it in another unit
CHAT_TITLE = "lm_eval through the chat template"

# ==== Statistics ====


def mean_and_stderr(numbers, weights):
    """Return the weighted mean of a list of numbers, one per question, and its standard error (None for one number).

    The error is the leave-one-out (jackknife) error: a heavy question pulls the mean to itself, so its own distance
    from the mean says too little. With equal weights it is the usual standard error of a mean.
    """
    n = len(numbers)
    total = math.fsum(weights)
    mean = math.fsum(w * x for x, w in zip(numbers, weights, strict=True)) / total
    if n == 1:
        return mean, None
    squares = math.fsum((w * (x - mean) / (total - w)) ** 2 for x, w in zip(numbers, weights, strict=True))
    return mean, math.sqrt(squares * (n - 1) / n)


def paired_difference(first, second, weights):
    """Compare two equally long lists of numbers, one pair per question; right/wrong scores are 0 and 1.

    Returns: dict of difference (mean of second - first), stderr, interval [low, high] (None where all questions changed
    alike), p (of "no difference"), ups and downs (how many numbers rose and fell); None for fewer than two questions,
    or weights of which one counts for almost all. The sign test counts questions, so it is only for equal weights, or
    where all questions changed alike.
    """
    effective = math.fsum(weights) ** 2 / math.fsum(w * w for w in weights)  # Kish's effective sample size
    if effective < 2 - 1e-9:
        return None
    from scipy import special, stats  # takes half a second; imported only after the checks

    gaps = [b - a for a, b in zip(first, second, strict=True)]
    ups = sum(gap > 0 for gap in gaps)
    downs = sum(gap < 0 for gap in gaps)
    mean, stderr = mean_and_stderr(gaps, weights)
    alike = stderr <= 1e-12 * abs(mean)  # up to rounding
    right_or_wrong = set(first) | set(second) <= {0, 1}
    if ups + downs == 0:
        p = 1.0
    elif alike or (right_or_wrong and len(set(weights)) == 1):  # the sign test; of right/wrong scores McNemar's
        p = float(stats.binomtest(ups, ups + downs).pvalue)
    else:
        p = 2 * float(special.stdtr(effective - 1, -abs(mean) / stderr))
    half = float(special.stdtrit(effective - 1, 0.975)) * stderr
    interval = None if alike else [mean - half, mean + half]
    return {"difference": mean, "stderr": stderr, "interval": interval, "p": p, "ups": ups, "downs": downs}


def give_verdicts(rows):
    """Add `verdict` to each row: Holm's step-down correction over all rows that have a p-value."""
    for row in rows:
        row["verdict"] = "not tested"
    tested = [row for row in rows if row["paired"]]
    tested.sort(key=lambda row: row["paired"]["p"])
    passed = True
    for rank, row in enumerate(tested):
        passed = passed and row["paired"]["p"] <= FAMILY_ERROR / (len(tested) - rank)
        if not passed:
            row["verdict"] = "no difference seen"
        elif (row["paired"]["difference"] > 0) == row["higher_is_better"]:
            row["verdict"] = "better"
        else:
            row["verdict"] = "worse"


# ==== The rows of lm_eval's tasks ====


def plan_rows(run):
    """List the table's rows from one run's results: (task, label, metric key "name,filter", whether known)."""
    results = run["results"]
    rows = []
    hidden = {task for task, *_ in KNOWN_ROWS}
    for task, label, metric in KNOWN_ROWS:
        if task in results:
            rows.append((task, label, f"{metric},none", True))
            if task.startswith("mmlu"):  # the 57 subjects are in their groups
                hidden.update(run["group_subtasks"].get(task, ()))
    for task, entry in results.items():
        if task not in hidden:
            label = entry.get("alias", task).strip(" -")
            rows += [(task, label, key, False) for key in metric_keys(run, task)]
    return rows


def metric_keys(run, task):
    """Return the keys "name,filter" of a task's metrics: those in its results, then those only its definition has."""
    keys = [key for key in run["results"][task] if "," in key and not key.split(",")[0].endswith("_stderr")]
    names = {key.split(",")[0] for key in keys}
    for metric in run["configs"].get(task, {}).get("metric_list") or ():
        if "metric" in metric and metric["metric"] not in names:
            keys.append(f"{metric['metric']},none")
    return keys


def metric_name(key):
    """Return how tables name the metric of lm_eval's key "name,filter"; the filter "none" is left out."""
    metric, _, filter_name = key.partition(",")
    return metric if filter_name == "none" else f"{metric} ({filter_name})"


def guess_rate(pairs, run, metric):
    """Return the accuracy of random guessing, mean of 1 / number of choices; None for anything but multiple choice.

    For the metric acc_mutual_info, lm_eval asks for each choice a second time without the question.
    """
    if not pairs or metric not in GUESSED_METRICS:
        return None
    rates = []
    for task, sample, _ in pairs:
        choices, config = sample.get("arguments"), run["configs"].get(task, {})
        is_choice = config.get("output_type") == "multiple_choice"
        if not is_choice or not isinstance(choices, list | dict) or not choices:
            return None
        twice = any(one.get("metric") == "acc_mutual_info" for one in config.get("metric_list") or ())
        rates.append((2 if twice else 1) / len(choices))
    return math.fsum(rates) / len(rates)


def per_question(samples, metric, log_scale):
    """Return (a number for each question, their weights), or None where lm_eval logs none.

    A metric that is a list, such as one verdict for each instruction of a question, counts by its length.
    """
    lists = []
    for sample in samples:
        value = sample.get(metric)
        lists.append(value if isinstance(value, list) and value else [value])
    values = [value for one in lists for value in one]
    if len(lists) < 2 or not all(isinstance(value, int | float) for value in values):
        return None
    if not all(eval_results.finite(value) for value in values):
        return [math.nan] * len(lists), [1] * len(lists)
    sign = -1 if log_scale else 1  # lm_eval logs the target's log-likelihood as its "perplexity"
    numbers = [sign * math.fsum(one) / len(one) for one in lists]
    return numbers, [len(one) for one in lists]


def checked_scores(run, planned, samples, log_scale):
    """Return what `per_question` does if its mean is the run's score, else None.

    Raises: SystemExit if it is not, for a row where lm_eval always takes that mean (a known row).
    """
    task, _, key, known = planned
    metric = key.partition(",")[0]
    value, _ = eval_results.value_of(run, task, key)
    scores = per_question(samples, metric, log_scale)
    if scores is None:
        return None
    mean, _ = mean_and_stderr(*scores)
    if math.isclose(mean, math.log(value) if log_scale else value, rel_tol=1e-6, abs_tol=1e-9):
        return scores
    if known:
        raise SystemExit(
            f"{metric} of {task} is {value} in {run['file_of'][task]}, but its logged questions give another value: "
            "they are of another run or were edited. Measure it again."
        )
    return None


def compare_row(before, after, planned, cache):
    """Compare one row of `plan_rows`.

    Returns: the row (a dict; `paired` is None where lm_eval does not average one number per question), and the flipped
    questions as list of (task, sample before, sample after).
    """
    task, label, key, _ = planned
    metric, _, filter_name = key.partition(",")
    log_scale = metric == "perplexity"
    pairs = eval_results.pair_questions(before, after, eval_results.leaves(before, task), filter_name, cache)
    higher_is_better = before["higher_is_better"].get(task, {}).get(metric)
    row = {
        "label": label,
        "task": task,
        "metric": metric_name(key),
        "questions": len(pairs),
        "log_scale": log_scale,
        "paired": None,
        "higher_is_better": not log_scale if higher_is_better is None else higher_is_better,
        "chance": guess_rate(pairs, before, metric),
    }
    scores = []
    for side, run, column in (("before", before, 1), ("after", after, 2)):
        value, stderr = eval_results.value_of(run, task, key)
        row[side] = {"value": value, "stderr": stderr}
        scores.append(checked_scores(run, planned, [pair[column] for pair in pairs], log_scale))
    first, second = scores
    if first is None or second is None or first[1] != second[1]:
        return row, []
    row["paired"] = paired_difference(first[0], second[0], first[1])
    return row, [pair for pair in pairs if [pair[1][metric], pair[2][metric]] in ([0, 1], [1, 0])]


def compare_tasks(before, after):
    """Compare two runs that were measured alike.

    Returns: list of rows (see `compare_row`, and `verdict`), list of flipped questions as dicts, each question once.
    """
    cache, rows, flips = {}, [], []
    recorded = {}  # {(task, metric): the row that recorded its flips}; a group's questions are those of its tasks
    for planned in plan_rows(before):
        row, flipped = compare_row(before, after, planned, cache)
        rows.append(row)
        metric = row["metric"].partition(" ")[0]
        for task, first, second in flipped:
            if recorded.setdefault((task, row["metric"]), row["task"]) != row["task"]:
                continue
            flips.append(
                {
                    "task": task,
                    "metric": row["metric"],
                    "before": first[metric],
                    "after": second[metric],
                    "doc": first.get("doc"),
                }
            )
    give_verdicts(rows)
    return rows, flips


# ==== The rows of the built-in check ====


def assistant_part(path, after, weights):
    """Return the part (see `compare_part`) of the built-in check in the file `path`, which belongs to the run `after`.

    Each of its entries has a number for each item before and after, and the items' weights. weights: {file name:
    SHA-256} of what `after` measured. Raises: SystemExit if the check measured another model.
    """
    check = eval_results.read_json(path, ASSISTANT)
    again = f"Run it again: python -m sft.evaluation.assistant_check --result-dir {after}, with the folders' flags."
    if missing := [key for key in ASSISTANT if key not in check]:
        raise SystemExit(f"{path} has no {', '.join(missing)}. {again}")
    check_same_weights(check["weights_sha256"]["after"], weights, path, after, again)
    rows = []
    for entry in check["rows"]:
        first, second, weights = entry["before"], entry["after"], entry["weights"]
        same_length = len(first) == len(second) == len(weights) > 0
        if not same_length or not all(map(eval_results.finite, first + second + weights)) or min(weights) <= 0:
            raise SystemExit(f"{path}: the numbers of {text.one_line(entry['label'])} are not pairs. {again}")
        row = {
            "label": entry["label"],
            "task": entry["label"],
            "metric": entry["metric"],
            "questions": len(first),
            "log_scale": False,
            "higher_is_better": entry["metric"] not in ("loss", BITS),
            "chance": None,
            "paired": paired_difference(first, second, weights),
        }
        for side, numbers in (("before", first), ("after", second)):
            value, stderr = mean_and_stderr(numbers, weights)
            row[side] = {"value": value, "stderr": stderr}
        rows.append(row)
    give_verdicts([row for row in rows if row["metric"] != BITS])
    before_it = {"verdict": "not tested"}
    for row in rows:
        if row["metric"] == BITS:
            row["verdict"] = before_it["verdict"]
        before_it = row
    return {
        "title": "Is it a better assistant?",
        "rows": rows,
        "notes": check["notes"],
        "how": "",
        "limit": None,
        "weights": check["weights_sha256"],
    }


# ==== The parts of the report ====


def check_same_weights(weights, expected, path, run, remedy):
    """Raise SystemExit, ending with `remedy`, unless `path` measured the same weights as the folder `run`."""
    if weights != expected:
        different = "; ".join(system.differences(expected, weights, f"in {run}", "here"))
        raise SystemExit(f"{path} measured other weights than {run} ({different}). {remedy}")


def code(words):
    """Return `words` as one line in Markdown's code span."""
    return "`" + text.one_line(str(words)).replace("`", "'") + "`"


def compare_part(before_folder, after_folder):
    """Compare two run folders.

    Returns: (dict of title, rows, notes, limit, how it was measured, and the weights' digests of both sides; flips).
    """
    before, after = eval_results.read_run(before_folder), eval_results.read_run(after_folder)
    notes = eval_results.check_comparable(before, after)
    rows, flips = compare_tasks(before, after)
    config = before["config"]
    templated = bool(before.get("chat_template_sha"))
    measured = f"lm_eval {before['lm_eval_version']}, {config.get('model_dtype')}, "
    measured += f"batch size {config.get('batch_size')}"
    how = (
        f"{code(before.get('model_name'))} against {code(after.get('model_name'))}; {text.table_cell(measured)}, "
        f"{'with' if templated else 'without'} chat template."
    )
    limit = config.get("limit")
    if limit and eval_results.finite(limit):
        limit = f"{limit:g}"
    part = {"title": CHAT_TITLE if templated else "lm_eval", "rows": rows, "notes": notes, "how": how, "limit": limit}
    part["weights"] = {"before": eval_results.weights_of(before), "after": eval_results.weights_of(after)}
    return part, [{"part": part["title"], **flip} for flip in flips]


def compare_chat_pass(before, after, weights):
    """Do what `compare_part` does with the chat pass of the runs `before` and `after` (folders).

    weights: {file name: SHA-256} of what `after` measured. Raises: SystemExit if the chat pass is not one of the same
    model.
    """
    first, second = f"{before}-chat", f"{after}-chat"
    part, flips = compare_part(first, second)
    again = "Move it away and measure it again with CHAT_TEMPLATE=1 bash run_eval.sh"
    if part["title"] != CHAT_TITLE:
        raise SystemExit(f"{first} and {second} were measured without the chat template. {again}.")
    check_same_weights(part["weights"]["after"], weights, second, after, f"{again} {Path(after).name}.")
    return part, flips


def compare_folders(before, after):
    """Compare two runs in all that was measured: lm_eval, lm_eval through the chat template, the built-in check.

    Returns: (list of parts, as of `compare_part`; flipped questions).
    """
    part, flips = compare_part(before, after)
    parts, weights = [part], part["weights"]["after"]
    if Path(f"{before}-chat").is_dir() and Path(f"{after}-chat").is_dir():
        chat, chat_flips = compare_chat_pass(before, after, weights)
        parts.append(chat)
        flips += chat_flips
    path = Path(after) / "assistant.json"
    if path.exists():
        check = assistant_part(path, after, weights)
        if len(parts) > 1:
            remedy = "Measure both with the same RESIZED_MODEL."
            first = parts[1]["weights"]["before"]
            check_same_weights(check["weights"]["before"], first, f"{path}, its before,", f"{before}-chat", remedy)
        parts.append(check)
    return parts, flips


# ==== Tables ====


def number(value, log_scale=False, signed=False):
    """Return a number in the published table's rounding: four decimals, perplexity as a whole number; None as "-"."""
    if value is None:
        return "-"
    if log_scale:
        return f"{value:,.0f}" if value >= 100 else f"{value:,.2f}"
    return f"{value:+.4f}" if signed else f"{value:.4f}"


def change(row):
    """Return the row's difference; without pairs it is that of the two values."""
    return row["paired"]["difference"] if row["paired"] else row["after"]["value"] - row["before"]["value"]


def difference(row):
    """Return the row's difference as the tables show it."""
    shown = number(change(row), signed=True)
    return f"ln {shown}" if row["log_scale"] and row["paired"] else shown


def above_chance(row):
    """Return which of the two are more than two of their own standard errors above random guessing."""
    if row["chance"] is None:
        return "-"
    sides = []
    for side in ("before", "after"):
        stderr = row[side]["stderr"]
        if stderr and row[side]["value"] - row["chance"] > 2 * stderr:
            sides.append(side)
    if len(sides) == 2:
        return "both"
    return sides[0] if sides else "neither"


def aligned(lines):
    """Return lists of cells (text of others), the first of them the head, as the lines of an aligned Markdown table."""
    lines = [list(map(text.table_cell, line)) for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines = [lines[0], ["-" * width for width in widths], *lines[1:]]
    return ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines]


def table(rows, limit):
    """Return the rows' table as lists of cells (text), the first of them its head.

    limit: questions per task of a quick look, or None.
    """
    lines = [[f"Task (LIMIT={limit})" if limit else "Task", *COLUMNS[1:]]]
    for row in rows:
        cells = [row["label"], row["metric"], f"{row['questions']:,}"]
        cells.append("-" if row["chance"] is None else f"{row['chance']:.2f}")
        for side in ("before", "after"):
            value, stderr = row[side]["value"], row[side]["stderr"]
            cells.append(f"{number(value, row['log_scale'])} ± {number(stderr, row['log_scale'])}")
        pair = row["paired"]
        if pair:
            cells.append(f"{difference(row)} ± {number(pair['stderr'])}")
            if pair["interval"]:
                low, high = pair["interval"]
                cells.append(f"{pair['difference'] / pair['stderr']:+.1f}")
                cells.append(f"{number(low, signed=True)} to {number(high, signed=True)}")
            else:
                cells += ["-", "-"]
        else:
            cells += [difference(row), "-", "-"]
        lines.append([*cells, row["verdict"], above_chance(row)])
    return lines


def seeds_table(names, seeds):
    """Return the differences of several runs of one recipe side by side, as `table` does.

    names: of the runs; seeds: for each run its list of parts. The spread is the standard deviation of the differences
    over the runs; beside it stands the paired error of the first run, which alone decides its verdict.
    """
    by_row = []
    for parts in seeds:
        by_row.append({(part["title"], row["label"], row["metric"]): row for part in parts for row in part["rows"]})
    lines = [["Task", "Metric", *names, "Spread over seeds", "Paired SE", "Verdicts"]]
    for key in by_row[0]:
        rows = [table[key] for table in by_row if key in table]
        if len(rows) == len(seeds):
            verdicts = dict.fromkeys(row["verdict"] for row in rows)
            spread = number(statistics.stdev(change(row) for row in rows))
            error = number(rows[0]["paired"]["stderr"]) if rows[0]["paired"] else "-"
            lines.append([*key[1:], *map(difference, rows), spread, error, ", ".join(verdicts)])
    return lines


# ==== The report ====


def markdown(parts, names, others):
    """Return the comparison as a Markdown page.

    parts: of `compare_folders`; names: of AFTER and of the other seeds' runs; others: the parts of each of the latter.
    """
    page = ["# What fine-tuning changed", ""]
    for part in parts:
        page += [f"## {part['title']}", ""]
        if part["how"]:
            page += [part["how"], ""]
        if part["limit"]:
            page += [f"**A quick look (LIMIT={part['limit']}): only a part of each task was measured.**", ""]
        page += [*aligned(table(part["rows"], part["limit"])), ""]
        for note in part["notes"]:
            page.append(f"Note: {text.one_line(note).replace('<', '&lt;')}\n")
    if others:
        page += ["## Other seeds", ""]
        page += [*aligned(seeds_table(names, [parts, *others])), "", SEEDS_NOTE, ""]
    page.append(
        "Before, After: score ± its own standard error (SE); above chance: by more than two of those. Difference: "
        "paired by question; perplexity as its natural logarithm (ln). Of perplexity, loss and bits per byte less is "
        "better; bits per byte is the loss in another unit and has its verdict. 95% interval: the difference ± "
        "Student's quantile times its SE. Verdict: corrected over all rows of its table (Holm): without any real "
        "change at most "
        f"{FAMILY_ERROR:.0%} of such tables show 'better' or 'worse'."
    )
    return ("\n".join(page) + "\n").encode("utf-8", "replace").decode()  # a lone surrogate becomes "?"


# ==== Main ====


def write_report(folder, files):
    """Replace files in `folder`, all or none. files: {name: bytes}.

    Raises: SystemExit if the disk is full or read-only; the earlier files are then unchanged.
    """
    paths = [folder / name for name in files]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, content in zip(paths, files.values(), strict=True):
            system.stage(path, content)
        for path in paths:
            system.unfinished(path).replace(path)
    except OSError as error:
        for path in paths:
            with contextlib.suppress(OSError):
                system.unfinished(path).unlink()
        raise SystemExit(
            f"The comparison cannot be written to {folder} ({error}). Free disk space, or name another --eval-results; "
            "the runs are unchanged, the same command works again."
        ) from None


def main(args):
    """Write and print the comparison as the settings `args` (dict) say."""
    try:
        parts, flips = compare_folders(args["BEFORE"], args["AFTER"])
        others = [compare_folders(args["BEFORE"], folder)[0] for folder in args["OTHER_SEEDS"]]
    except SystemExit as error:
        raise SystemExit(text.printable(str(error))) from None  # it may name a task of others
    folders = [args["AFTER"], *args["OTHER_SEEDS"]]
    names = [Path(folder).name for folder in folders]
    if len(set(names)) < len(names):
        names = folders
    page = markdown(parts, names, others)
    flip_lines = "".join(json.dumps(flip) + "\n" for flip in flips)
    files = {"comparison.md": page.encode(), "flips.jsonl": flip_lines.encode()}
    comparison = {
        "settings": args,
        "parts": parts,
        "other_seeds": dict(zip(folders[1:], others, strict=True)),
        "seeds_table": seeds_table(names, [parts, *others]) if others else [],
        "files_sha256": {name: sha256(content).hexdigest() for name, content in files.items()},  # for the model card
    }
    files["comparison.json"] = (json.dumps(comparison, indent=2) + "\n").encode()
    write_report(Path(args["EVAL_RESULTS"]), files)
    print(text.printable(page))


if __name__ == "__main__":
    main(settings.from_flags(globals()))
