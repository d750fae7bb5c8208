"""What was prepared, for reading: report.md, report.png, and single sequences in colour. Used by prepare_data.py."""

import itertools
from pathlib import Path

import datasets
import matplotlib
import numpy as np
from matplotlib.figure import Figure
from transformers import PreTrainedTokenizerFast

from sft.data import decontamination
from sft.text import printable, table_cell

COLUMNS = ("read", "rejected", "conversations", "sequences", "tokens", "trainable_tokens")

# ==== report.md ====


def markdown(report):
    """Return report.md: the table of the sources, their rejections and changes, and the evaluation's tasks."""
    lines = []
    if report["limit"]:
        lines += [f"**LIMIT = {report['limit']:,}: a quick look, not the whole mixture. Don't train on it.**", ""]
    lines += [*source_table(report), ""]
    lines += ["trainable: share of the source's tokens; share: of all trainable tokens.", ""]
    for source in report["sources"]:
        lines += source_notes(source)
    lines += ["", *evaluation_table(report)]
    return "\n".join(lines) + "\n"


def source_table(report):
    """Return the lines of the table of the sources."""
    columns = list(COLUMNS)
    if any(source["source"]["repeat"] > 1 for source in report["sources"]):
        columns.insert(3, "repeat")
    names = " | ".join(column.replace("_", " ") for column in columns)
    lines = [f"| source | {names} | trainable | share |", "|---|" + "---:|" * (len(columns) + 2)]
    rows = [source | {"repeat": f"{source['source']['repeat']}x"} for source in report["sources"]]
    rows.append({"name": "all", "repeat": ""} | report["totals"])
    rows += kinds(report)
    for row in rows:
        cells = [row[column] if column == "repeat" else f"{row[column]:,}" for column in columns]
        trainable = row["trainable_tokens"] / row["tokens"]
        share = row["trainable_tokens"] / report["totals"]["trainable_tokens"]
        lines.append(f"| {table_cell(row['name'])} | {' | '.join(cells)} | {trainable:.1%} | {share:.1%} |")
    if len(rows) > len(report["sources"]) + 1:
        lines += ["", "plain text: no markers, and all of it is trained; a document counts as a conversation."]
    return lines


def kinds(report):
    """Return the table's rows that count conversations and plain text apart, if the mixture has both."""
    text = report["plain_text"]
    conversations = {name: count - text[name] for name, count in report["totals"].items()}
    if not text["tokens"] or not conversations["tokens"]:
        return []
    rows = {"of these, conversations": conversations, "of these, plain text": text}
    return [{"name": name, "repeat": ""} | counts for name, counts in rows.items()]


def source_notes(source):
    """Return the lines about what was rejected, changed or damaged in one source."""
    name = table_cell(source["name"])
    lines = [f"- {name}: {count:,} rejected: {table_cell(reason)}" for reason, count in source["reasons"].items()]
    lines += [f"- {name}: {count:,} kept, changed: {change}" for change, count in source["changes"].items()]
    if source["control_text"]:
        lines.append(f"- {name}: {source['control_text']:,} kept, with the name of a control token as text")
    if source["damage"]:
        lines.append(f"- {name}: the file is damaged: {table_cell(source['damage'])}")
    return lines


def evaluation_table(report):
    """Return the lines of the table of the evaluation's tasks and the conversations rejected for each."""
    if not report["evaluation"]:
        return ["Not compared with the evaluation's questions (DECONTAMINATE_AGAINST)."]
    names = [table_cell(source["name"]) for source in report["sources"]]
    lines = [
        f"Conversations rejected because they share {decontamination.NGRAM} words in a row with a question of the "
        "evaluation:",
        "",
        f"| task | questions | too short to compare | formulas left out | {' | '.join(names)} |",
        "|---|---:|---:|---:|" + "---:|" * len(names),
    ]
    for task in report["evaluation"]:
        hits = [source["reasons"].get(f"contaminated: {task['task']}", 0) for source in report["sources"]]
        cells = [f"{count:,}" for count in (task["questions"], task["too_short"], task["boilerplate"], *hits)]
        lines.append(f"| {table_cell(task['task'])} | {' | '.join(cells)} |")
    lines += ["", f"formulas: runs of {decontamination.NGRAM} words that a task repeats around different texts."]
    return lines


# ==== report.png ====


@matplotlib.rc_context({"text.parse_math": False})  # a name with two "$" is no formula
def draw(report, path):
    """Write report.png: the histogram of sequence lengths, and each source's share of sequences and trained tokens."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    lengths, shares = figure.subplots(1, 2, width_ratios=(3, 2))
    bins = len(report["sources"][0]["lengths"])
    width, bottom = report["max_seq_len"] / bins, np.zeros(bins)
    left = np.zeros(3)
    for index, source in enumerate(report["sources"]):
        color = f"C{index}"
        starts = np.arange(bins) * width
        lengths.bar(starts, source["lengths"], width, bottom, align="edge", color=color, label=source["name"])
        bottom += source["lengths"]
        for row, column in enumerate(("trainable_tokens", "tokens", "conversations")):
            share = source[column] / report["totals"][column]
            shares.barh(row, share, left=left[row], color=color)
            if share > 0.05:
                shares.text(left[row] + share / 2, row, f"{share:.0%}", ha="center", va="center", color="white")
            left[row] += share
    lengths.set(xlabel=f"tokens of a sequence (window {report['max_seq_len']})", ylabel="sequences")
    lengths.legend()
    shares.set(yticks=range(3), yticklabels=("trained tokens", "tokens", "conversations"), xlabel="share by source")
    figure.savefig(path, dpi=120)


# ==== Single sequences ====


def show(folder, number):
    """Print `number` sequences per source from the finished `folder`: titles in bold, trained text in green.

    Nothing in a row can do either: its escape characters are printed as such.
    """
    try:
        data = datasets.load_from_disk(str(folder))["train"]
        tokenizer = PreTrainedTokenizerFast.from_pretrained(Path(folder) / "tokenizer")
    except (OSError, ValueError) as error:
        raise SystemExit(f"{folder} holds no finished data ({error}). Run prepare_data.py first.") from None
    names = np.array(data["source"])
    for name in dict.fromkeys(names.tolist()):
        for index in np.flatnonzero(names == name)[:number].tolist():
            ids, mask = data[index]["input_ids"], np.array(data[index]["assistant_masks"])
            title = f"---- {name}, sequence {index}: {len(ids)} tokens, {mask.sum()} trained ----"
            print(f"\n\033[1m{printable(title)}\033[0m")
            edges = [0, *(np.flatnonzero(mask[1:] != mask[:-1]) + 1).tolist(), len(ids)]
            for begin, end in itertools.pairwise(edges):
                text = printable(tokenizer.decode(ids[begin:end]))
                print(f"\033[32m{text}\033[0m" if mask[begin] else text, end="")
    print()
