"""Write EVAL_RESULTS/report.html: the run as its owner would publish it, one file that needs no network.

Reads comparison.json and flips.jsonl in EVAL_RESULTS (compare_evals.py), the answers of the built-in check in the run
that was compared, and training.json in EXPORT_DIR (export_hf.py). Without the last, or if that is about another model,
the page has no sections on training and data, and says why.

    python -m sft.evaluation.report_page        run_eval.sh runs it after each comparison
"""

import json
from collections import defaultdict
from pathlib import Path

import jinja2
from markupsafe import Markup

from sft import settings, system
from sft.evaluation import compare_evals, model_card, report_charts
from sft.text import one_line, printable

# ---- Files ----
EVAL_RESULTS = "eval-results"  # folder of the comparison; report.html is written there
EXPORT_DIR = "exports/sft_v1"  # Hugging Face folder written by export_hf.py

# ==== Constants ====

ROOT = Path(__file__).resolve().parents[2]
SCORES = ("Task", "Verdict", "Difference", "Before", "After", "Chance", "Questions")  # most important first, for phones
SOURCES = ("Source", "Licence", "Read", "Rejected", "Conversations", "Held out", "Sequences", "Tokens", "Trained")
COUNTS = ("read", "rejected", "conversations", "validation_conversations", "sequences", "tokens", "trainable_tokens")
SHOWN_ANSWERS = 12  # of the check's, evenly from all; answers.jsonl has the others
SHOWN_FLIPS = 6  # questions per task and direction; flips.jsonl has the others
SHOWN_TEXT = 4000  # characters of a text; what is longer is cut, and the page says so
QUESTION_FIELDS = ("question", "query", "ctx", "goal", "sentence", "text", "prompt", "input")  # of lm_eval's tasks
ANSWER_KEYS = ("messages", "before", "before_ended", "after", "after_ended")  # of a line of answers.jsonl
TRAINING_KEYS = ("averaged", "base_share", "state", "losses", "curves", "run", "data")  # of training.json
# Settings that name folders, what to do, or what other parts of the page show
NOT_RECIPE = ("DATA_DIR", "BASE_MODEL", "RESIZED_MODEL", "CHECKPOINT_DIR", "MIXTURE", "TASKS_INCLUDE_PATH", "RESUME")
NOT_RECIPE += ("PLAN_ONLY", "PLAN_RANKS", "PLAN_GIB", "WORKERS", "SHOW")
SHAPE = {  # of the architecture, from config.json
    "num_hidden_layers": "{:,} layers",
    "hidden_size": "hidden size {:,}",
    "num_attention_heads": "{:,} attention heads",
    "num_key_value_heads": "{:,} key-value heads",
    "vocab_size": "{:,} tokens in the vocabulary",
    "max_position_embeddings": "{:,} tokens of context",
}
CURVES = (  # (title, unit, the metrics' names)
    ("loss", "nats per trained token", ("loss", "validation_loss")),
    ("learning rate", "", ("lr",)),
    ("gradient norm", "", ("grad_norm",)),
    ("tokens per second", "", ("tokens_per_second",)),
)

# ==== Before and after ====


def headline(parts):
    """Return {verdict: number of rows} over all parts of a comparison; a loss in bits per byte is no further row."""
    counts = dict.fromkeys(("better", "no difference seen", "worse", "not tested"), 0)
    for part in parts:
        for row in part["rows"]:
            if row["metric"] != compare_evals.BITS:
                counts[row["verdict"]] += 1
    return counts


def score_line(row):
    """Return a row's cells in the order of SCORES; a cell is a text or a pair of texts, the second one small."""
    number, pair = compare_evals.number, row["paired"]
    if pair is None:
        difference = (compare_evals.difference(row), "not paired")
    else:
        interval = " to ".join(number(end, signed=True) for end in pair["interval"] or ())
        difference = (f"{compare_evals.difference(row)} ± {number(pair['stderr'])}", interval)
    sides = []
    for side in ("before", "after"):
        value, stderr = (number(row[side][name], row["log_scale"]) for name in ("value", "stderr"))
        sides.append((value, f"± {stderr}"))
    chance = "-"
    if row["chance"] is not None:
        chance = (f"{row['chance']:.2f}", f"above it: {compare_evals.above_chance(row)}")
    return [(row["label"], row["metric"]), row["verdict"], difference, *sides, chance, f"{row['questions']:,}"]


def shown_parts(parts):
    """Return the parts of a comparison with their chart, and their rows as lines of cells (see `score_line`).

    The losses in bits per byte, which have the verdicts of those in nats, are apart.
    """
    shown = []
    for part in parts:
        rows = {True: [], False: []}
        for row in part["rows"]:
            rows[row["metric"] == compare_evals.BITS].append(score_line(row))
        chart = Markup(report_charts.scores(part["rows"], f"{part['title']}: scores before and after"))
        notes = [one_line(note).replace("`", "") for note in part["notes"]]
        how = part["how"].replace("`", "")
        shown.append(part | {"lines": rows[False], "bits": rows[True], "chart": chart, "how": how, "notes": notes})
    return shown


def read_lines(path, keys, made_by):
    """Return the lines of the JSONL file `path` as dicts that have `keys`.

    Raises: SystemExit naming the line, and `made_by`, which writes the file again.
    """
    lines = []
    if not path.is_file():
        raise SystemExit(f"{path} is missing. Run {made_by} again.")
    try:
        for entry in path.read_text(encoding="utf-8").split("\n"):  # an answer may hold other line separators
            if not entry:
                continue
            line = json.loads(entry)
            if missing := [key for key in keys if key not in line]:
                raise ValueError(f"it has no {', '.join(missing)}")
            lines.append(line)
    except (*system.JSON_ERRORS, TypeError) as error:
        raise SystemExit(
            f"{path}, line {len(lines) + 1}, is not what {made_by} writes ({error}). Run {made_by} again."
        ) from None
    return lines


def question_of(doc):
    """Return a question's text from lm_eval's `doc`, whatever the task calls it."""
    if isinstance(doc, dict):
        for field in QUESTION_FIELDS:
            if isinstance(doc.get(field), str) and doc[field].strip():
                return doc[field]
    return json.dumps(doc, ensure_ascii=False)


def shown_flips(folder):
    """Return a list of dicts per task and metric: how many questions were gained and lost, and the first of each."""
    groups = defaultdict(lambda: {"gained": [], "lost": []})
    keys = ("part", "task", "metric", "before", "after", "doc")
    for flip in read_lines(folder / "flips.jsonl", keys, "run_eval.sh compare"):
        way = "gained" if flip["after"] > flip["before"] else "lost"
        groups[flip["part"], flip["task"], flip["metric"]][way].append(question_of(flip["doc"]))
    several = len({part for part, _, _ in groups}) > 1
    return [
        {
            "title": " · ".join([task, metric, *([part] if several else [])]),
            "gained": len(ways["gained"]),
            "lost": len(ways["lost"]),
            "questions": {way: texts[:SHOWN_FLIPS] for way, texts in ways.items()},
        }
        for (part, task, metric), ways in groups.items()
    ]


def shown_answers(run):
    """Return at most SHOWN_ANSWERS of the check's answers in the folder `run`, evenly from all, and their number."""
    path = run / "answers.jsonl"
    if not path.is_file():
        return [], 0
    check = f"python -m sft.evaluation.assistant_check --result-dir {run}"
    lines = read_lines(path, ANSWER_KEYS, check)
    number = min(SHOWN_ANSWERS, len(lines))
    return [lines[index * len(lines) // number] for index in range(number)], len(lines)


# ==== Training and data ====


def points(curves, name):
    """Return (steps, values) of a metric in training.json's `curves`."""
    pairs = curves.get(name, [])
    return [step for step, _ in pairs], [value for _, value in pairs]


def shown_curves(curves, names):
    """Return the charts of the run's metrics, and of the validation loss of each of the sources `names`."""
    charts = []
    for title, unit, metrics in CURVES:
        lines = [(name.replace("_", " "), *points(curves, name), name == "validation_loss") for name in metrics]
        charts.append(report_charts.curves(lines, title, unit))
    lines = [(name, *points(curves, f"validation_loss/{name}"), True) for name in names]
    title, several = "validation loss of each source", sum(bool(line[1]) for line in lines) > 1
    charts.insert(1, report_charts.curves(lines, title, "nats per trained token") if several else "")
    return [Markup(chart) for chart in charts if chart]


def source_line(source, origin, all_trained):
    """Return a source's cells, see SOURCES and `score_line`. origin: dict of its `origin` and `licence`, or empty."""
    name, repeat = source.get("name", "all"), source.get("source", {}).get("repeat", 1)
    counts = [f"{source.get(count, 0):,}" for count in COUNTS]
    share = source["trainable_tokens"] / all_trained if all_trained else 0
    counts[-1] = (counts[-1], f"{share:.1%}")
    if repeat > 1:
        counts[4] = (counts[4], f"each {repeat} times")
    return [(name, origin.get("origin", "")), origin.get("licence", ""), *counts]


def source_notes(sources):
    """Return [number, source, what happened to so many of its rows], the largest number first; damage has none."""
    lines = []
    for source in sources:
        name = source["name"]
        lines += [(count, name, f"rejected: {reason}") for reason, count in source["reasons"].items()]
        lines += [(count, name, f"kept, changed: {change}") for change, count in source["changes"].items()]
        if source["control_text"]:
            lines.append((source["control_text"], name, "kept, with the name of a control token as text"))
        if source["damage"]:
            lines.append((0, name, f"the file is damaged: {source['damage']}"))
    return [
        [f"{count:,}" if count else "-", name, what] for count, name, what in sorted(lines, key=lambda line: -line[0])
    ]


def shown_data(data):
    """Return what the page says about the mixture, or None: sources, charts, what was rejected and why.

    data: of training.json; None where the folder of the data held something else by then.
    """
    if data is None:
        return None
    report, origins = data["report"], {source["name"]: source for source in data["sources"]}
    all_trained, chosen = report["totals"]["trainable_tokens"], report["settings"]
    columns = {"conversations": "conversations", "tokens": "tokens", "trainable_tokens": "trained tokens"}
    largest = report_charts.merge_small(report["sources"])
    lines = [source_line(source, origins.get(source["name"], {}), all_trained) for source in report["sources"]]
    return {
        "lines": [*lines, source_line(report["totals"], {}, all_trained)],
        "notes": source_notes(report["sources"]),
        "names": [source["name"] for source in largest],
        "shares": Markup(report_charts.shares(largest, columns)),
        "lengths": Markup(report_charts.lengths(largest, report["max_seq_len"])),
        "digest": report["digest"],
        "clear_of": ", ".join(chosen.get("DECONTAMINATE_AGAINST", ())),
        "limit": chosen.get("LIMIT", 0),
        "settings": chosen,
    }


def changed_from_recipe(script, chosen):
    """Return [name, default, this run's value, script] of the settings `chosen` (dict) that `script` has otherwise."""
    recipe = json.loads(json.dumps(settings.defaults(ROOT / script)))
    lines = []
    for name, value in chosen.items():
        if name in recipe and name not in NOT_RECIPE and value != recipe[name]:
            values = (json.dumps(one, ensure_ascii=False) for one in (recipe[name], value))
            lines.append([name, *values, script])
    return lines


def duration(seconds):
    """Return a time as text that no line break cuts: 3 h 07 min, or 12 min 05 s."""
    minutes, seconds = divmod(round(seconds), 60)
    text = f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min {seconds:02} s"
    return text.replace(" ", "\N{NO-BREAK SPACE}")


def digests(training, mixture, parts):
    """Return [what, SHA-256] of the data and of the weights, from the base to those that were measured."""
    named = {f"data, {split}": digest for split, digest in mixture["digest"].items()} if mixture else {}
    weights = {"base": training["weights_sha256"]["base"], "resized": training["weights_sha256"]["resized"]}
    for label, files in (weights | {"export": parts[0]["weights"]["after"]}).items():
        named |= {f"{label}: {file}": digest for file, digest in files.items()}
    return list(named.items())


def why_no_training(folder, results):
    """Return why the page has nothing of the training of the export `folder`, a phrase, or None if it has."""
    path = folder / model_card.TRAINING
    if not path.is_file():
        return f"{path} is missing, export_hf.py didn't write this model"
    training = system.read_json(path, "export_hf.py")
    missing = [key for key in TRAINING_KEYS if key not in training]
    if not missing and training["data"] and "settings" not in training["data"].get("report", {}):
        missing = ["data.report.settings"]
    if missing:
        return f"{path} has no {', '.join(missing)}: export the checkpoint again with export_hf.py"
    return model_card.why_not_shown(folder, training, results)


def shown_training(folder, parts):
    """Return what the page says about the run that made the export `folder`. parts: of the comparison."""
    training = system.read_json(folder / model_card.TRAINING, "export_hf.py")
    state, mixture, curves = training["state"], shown_data(training["data"]), training["curves"]
    names = (
        mixture["names"]
        if mixture
        else [name.partition("/")[2] for name in curves if "/" in name][: len(report_charts.SOURCES)]
    )
    shape = {form: state.get("fingerprints", {}).get(f"config.json {name}") for name, form in SHAPE.items()}
    changed = changed_from_recipe("prepare_data.py", mixture["settings"]) if mixture else []
    return training | {
        "origin": model_card.origin(training).replace("`", ""),
        "shape": ", ".join(form.format(value) for form, value in shape.items() if isinstance(value, int)),
        "time": duration(training["run"]["seconds"]),
        "charts": shown_curves(curves, names),
        "mixture": mixture,
        "changed": changed + changed_from_recipe("sft_v1.py", state["settings"]),
        "recipe": [[name, str(state["settings"][name])] for name in model_card.RECIPE if name in state["settings"]],
        "versions": list(state["versions"].items()),
        "digests": digests(training, mixture, parts),
    }


# ==== Writing ====


def clean(value):
    """Return `value` with each control character and direction mark in its texts visible."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def cut(words):
    """Return a text of at most SHOWN_TEXT characters and a remark on the rest."""
    rest = len(words) - SHOWN_TEXT
    return f"{words[:SHOWN_TEXT]} … ({rest:,} more characters)" if rest > 0 else words


def render(**values):
    """Return the page (text). Whatever others wrote stays text: it is escaped, and the page allows no script."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=clean,
    )
    environment.filters["cut"] = cut
    environment.filters["count"] = "{:,}".format
    return environment.get_template("report.html.jinja").render(values)


def main(args):
    """Write the page as the settings `args` (dict) say."""
    results, export = Path(args["EVAL_RESULTS"]), Path(args["EXPORT_DIR"])
    comparison = system.read_json(results / "comparison.json", "run_eval.sh compare")
    parts = comparison["parts"]
    missing = why_no_training(export, results)
    answers, number = shown_answers(Path(comparison["settings"]["AFTER"]))
    page = render(
        name=export.name,
        heads={"scores": SCORES, "sources": SOURCES},
        parts=shown_parts(parts),
        counts=headline(parts),
        seeds=comparison["seeds_table"],
        seeds_note=compare_evals.SEEDS_NOTE,
        training=None if missing else shown_training(export, parts),
        missing=missing,
        answers=answers,
        all_answers=number,
        flips=shown_flips(results),
    )
    path = results / "report.html"
    try:
        system.write_whole(path, page.encode("utf-8", "replace"))  # a lone surrogate becomes "?"
    except OSError as error:
        raise SystemExit(
            f"{path} cannot be written ({error}). Free disk space; `bash run_eval.sh compare` writes it again."
        ) from None
    print(printable(f"report: {path}" + (f", without training and data: {missing}" if missing else "")))


if __name__ == "__main__":
    main(settings.from_flags(globals()))
