"""Write EVAL_RESULTS/report.html: the run as its owner would publish it, one file that needs no network.

Reads comparison.json and flips.jsonl in EVAL_RESULTS (compare_evals.py), the answers of the built-in check in the run
that was compared, and training.json in EXPORT_DIR (export_hf.py). Without the last, the page has no sections on
training and data.

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
# compare_evals.py's columns, what matters most first: a phone shows the beginning of a table.
COLUMNS = ("Task", "Metric", "Verdict", "Difference ± paired SE", "Before ± SE", "After ± SE", "Chance")
COLUMNS += ("95% interval", "Above chance", "Difference / SE", "Questions")
SHOWN_ANSWERS = 12  # of the check's, evenly from all; answers.jsonl has the others
SHOWN_FLIPS = 6  # questions per task and direction; flips.jsonl has the others
QUESTION_FIELDS = ("question", "query", "ctx", "goal", "sentence", "text", "prompt", "input")  # of lm_eval's tasks
NOT_RECIPE = ("DATA_DIR", "RESIZED_MODEL", "CHECKPOINT_DIR", "RESUME", "PLAN_ONLY", "PLAN_RANKS", "PLAN_GIB")
CURVES = (  # (label, the metrics' names, whether on a logarithmic scale)
    ("cross-entropy per trainable token (nats)", ("loss", "validation_loss"), False),
    ("learning rate", ("lr",), False),
    ("gradient norm", ("grad_norm",), True),
    ("tokens per second", ("tokens_per_second",), False),
)

# ==== What the page shows ====


def headline(parts):
    """Return {verdict: number of rows} over all parts of a comparison; a loss in bits per byte is no further row."""
    counts = dict.fromkeys(("better", "no difference seen", "worse"), 0)
    for part in parts:
        for row in part["rows"]:
            if row["verdict"] in counts and row["metric"] != compare_evals.BITS:
                counts[row["verdict"]] += 1
    return counts


def shown_parts(parts):
    """Return the parts of a comparison with their chart and their table's cells as text."""
    shown = []
    for part in parts:
        lines = compare_evals.table(part["rows"], part["limit"])
        order = [compare_evals.COLUMNS.index(name) for name in COLUMNS]
        head, *lines = [[line[index] for index in order] for line in lines]
        chart = Markup(report_charts.scores(part["rows"]))
        how = part["how"].replace("`", "")
        shown.append(part | {"head": head, "lines": lines, "chart": chart, "how": how})
    return shown


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
    for line in (folder / "flips.jsonl").read_text(encoding="utf-8").splitlines():
        flip = json.loads(line)
        way = "gained" if flip["after"] > flip["before"] else "lost"
        groups[flip["part"], flip["task"], flip["metric"]][way].append(question_of(flip["doc"]))
    return [
        {
            "title": f"{task} · {metric}",
            "gained": len(ways["gained"]),
            "lost": len(ways["lost"]),
            "questions": {way: texts[:SHOWN_FLIPS] for way, texts in ways.items()},
        }
        for (_, task, metric), ways in groups.items()
    ]


def shown_answers(run):
    """Return at most SHOWN_ANSWERS of the check's answers in the folder `run`, evenly from all, and their number."""
    path = run / "answers.jsonl"
    if not path.is_file():
        return [], 0
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    number = min(SHOWN_ANSWERS, len(lines))
    return [lines[index * len(lines) // number] for index in range(number)], len(lines)


def shown_curves(training):
    """Return the charts of the run's metrics, and of the validation loss per source."""
    curves, charts = training["curves"], []
    for label, names, log_scale in CURVES:
        lines = [(name.replace("_", " "), *points(curves, name), name == "validation_loss") for name in names]
        charts.append(report_charts.curves(lines, label, log_scale))
    sources = [name for name in curves if name.startswith("validation_loss/")]
    lines = [(name.partition("/")[2], *points(curves, name), True) for name in sources]
    charts.insert(1, report_charts.curves(lines, "validation loss per source (nats)") if len(sources) > 1 else "")
    return [Markup(chart) for chart in charts if chart]


def points(curves, name):
    """Return (steps, values) of a metric in training.json's `curves`."""
    pairs = curves.get(name, [])
    return [step for step, _ in pairs], [value for _, value in pairs]


def shown_data(training):
    """Return what the page says about the mixture, or None: sources, charts, what was rejected and why."""
    if training["data"] is None:
        return None
    report, origins = training["data"]["report"], {source["name"]: source for source in training["data"]["sources"]}
    sources = [source | origins.get(source["name"], {}) for source in report["sources"]]
    columns = {"conversations": "conversations", "tokens": "tokens", "trainable_tokens": "trained tokens"}
    rejected = [
        (source["name"], reason, count) for source in report["sources"] for reason, count in source["reasons"].items()
    ]
    return {
        "sources": sources,
        "totals": report["totals"],
        "rejected": sorted(rejected, key=lambda line: -line[2]),
        "shares": Markup(report_charts.shares(report["sources"], columns)),
        "lengths": Markup(report_charts.lengths(report["sources"], report["max_seq_len"])),
        "digest": report["digest"],
    }


def changed_from_recipe(state):
    """Return [(name, the recipe's value, this run's)] of the settings that sft_v1.py's defaults have otherwise."""
    recipe = settings.defaults(ROOT / "sft_v1.py")
    lines = []
    for name, value in state["settings"].items():
        default = recipe.get(name)
        default = list(default) if isinstance(default, tuple) else default
        if name in recipe and name not in NOT_RECIPE and value != default:
            lines.append((name, default, value))
    return lines


def duration(seconds):
    """Return a time as text: 3 h 07 min, or 12 min 05 s."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min {seconds:02} s"


def shown_training(folder):
    """Return what the page says about the run that made the export `folder`, or None without its training.json."""
    if not (folder / model_card.TRAINING).is_file():
        return None
    training = system.read_json(folder / model_card.TRAINING, "export_hf.py")
    state = training["state"]
    training["run"]["time"] = duration(training["run"]["seconds"])
    return training | {
        "charts": shown_curves(training),
        "mixture": shown_data(training),
        "changed": changed_from_recipe(state),
        "recipe": [(name, state["settings"][name]) for name in model_card.RECIPE],
    }


# ==== Writing ====


def clean(value):
    """Return `value` with each control character and direction mark in its texts visible."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


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
    environment.filters["one_line"] = one_line
    return environment.get_template("report.html.jinja").render(values)


def main(args):
    """Write the page as the settings `args` (dict) say."""
    results, export = Path(args["EVAL_RESULTS"]), Path(args["EXPORT_DIR"])
    comparison = system.read_json(results / "comparison.json", "run_eval.sh compare")
    training = shown_training(export)
    if training and model_card.why_not_shown(export, training, results):
        training = None
    answers, number = shown_answers(Path(comparison["settings"]["AFTER"]))
    page = render(
        name=export.name,
        parts=shown_parts(comparison["parts"]),
        counts=headline(comparison["parts"]),
        seeds=comparison["seeds_table"],
        seeds_note=compare_evals.SEEDS_NOTE,
        training=training,
        answers=answers,
        all_answers=number,
        flips=shown_flips(results),
    )
    path = results / "report.html"
    system.write_whole(path, page.encode("utf-8", "replace").decode())
    print(f"report: {path}")


if __name__ == "__main__":
    main(settings.from_flags(globals()))
