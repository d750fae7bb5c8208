"""What was prepared, for reading: report.md, report.png, and single sequences in colour. Used by prepare_data.py."""

import itertools
from pathlib import Path

import datasets
import numpy as np
from matplotlib.figure import Figure
from transformers import PreTrainedTokenizerFast


def markdown(report):
    """Return report.md: the table of the sources, their rejections and changes, and the evaluation's tasks."""
    columns = ["read", "rejected", "conversations", "sequences", "tokens", "trainable_tokens"]
    sources = [line | {"repeat": f"{line['source'].get('repeat', 1)}x"} for line in report["sources"]]
    if any(line["repeat"] != "1x" for line in sources):
        columns.insert(3, "repeat")
    total = report["totals"]["trainable_tokens"]
    names = " | ".join(column.replace("_", " ") for column in columns)
    lines = [f"| source | {names} | trainable | share |", "|---|" + "---:|" * (len(columns) + 2)]
    for line in [*sources, {"name": "all", "repeat": "", **report["totals"]}]:
        numbers = " | ".join(line[column] if column == "repeat" else f"{line[column]:,}" for column in columns)
        percent = line["trainable_tokens"] / line["tokens"]
        lines.append(f"| {line['name']} | {numbers} | {percent:.1%} | {line['trainable_tokens'] / total:.1%} |")
    lines += ["", "trainable: share of the source's tokens; share: of all trainable tokens.", ""]
    for line in report["sources"]:
        for kind, what in (("reasons", "rejected"), ("changes", "kept, changed")):
            lines += [f"- {line['name']}: {count:,} {what}: {text}" for text, count in line[kind].items()]
        if line["control_text"]:
            lines.append(f"- {line['name']}: {line['control_text']:,} kept, with the name of a control token as text")
    if not report["evaluation"]:
        return "\n".join([*lines, "", "Not compared with the evaluation's questions (DECONTAMINATE_AGAINST)."]) + "\n"
    names = [line["name"] for line in report["sources"]]
    lines += [
        "",
        f"Conversations rejected because they share {report['settings']['DECONTAMINATION_NGRAM']} words in a ",
    ]
    lines[-1] += "row with a question of the evaluation:"
    lines += ["", f"| task | questions | too short to compare | {' | '.join(names)} |"]
    lines += ["|---|---:|---:|" + "---:|" * len(names)]
    for task in report["evaluation"]:
        hits = [line["reasons"].get(f"contaminated: {task['task']}", 0) for line in report["sources"]]
        counts = [task["questions"], task["too_short"], *hits]
        lines.append(f"| {task['task']} | " + " | ".join(f"{count:,}" for count in counts) + " |")
    return "\n".join(lines) + "\n"


def draw(report, path):
    """Write report.png: the histogram of sequence lengths, and each source's share of sequences and trained tokens."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    lengths, shares = figure.subplots(1, 2, width_ratios=(3, 2))
    bins = len(report["sources"][0]["lengths"])
    width, below = report["max_seq_len"] / bins, np.zeros(bins)
    for place, line in enumerate(report["sources"]):
        starts = np.arange(bins) * width
        lengths.bar(starts, line["lengths"], width, below, align="edge", color=f"C{place}", label=line["name"])
        below += line["lengths"]
        for row, column in enumerate(("trainable_tokens", "tokens", "conversations")):
            share = line[column] / report["totals"][column]
            left = sum(before[column] for before in report["sources"][:place]) / report["totals"][column]
            shares.barh(row, share, left=left, color=f"C{place}")
            if share > 0.05:
                shares.text(left + share / 2, row, f"{share:.0%}", ha="center", va="center", color="white")
    lengths.set(xlabel=f"tokens of a sequence (window {report['max_seq_len']})", ylabel="sequences")
    lengths.legend()
    shares.set(yticks=range(3), yticklabels=("trained tokens", "tokens", "conversations"), xlabel="share by source")
    figure.savefig(path, dpi=120)


def show(folder, number):
    """Print `number` sequences per source from the finished `folder`, trained text in green."""
    try:
        data = datasets.load_from_disk(str(folder))["train"]
        tokenizer = PreTrainedTokenizerFast.from_pretrained(Path(folder) / "tokenizer")
    except (OSError, ValueError) as error:
        raise SystemExit(f"{folder} holds no finished data ({error}). Run prepare_data.py first.") from None
    sources = np.array(data["source"])
    for source in dict.fromkeys(sources.tolist()):
        for place in np.flatnonzero(sources == source)[:number].tolist():
            row = data[place]
            ids, mask = row["input_ids"], np.array(row["assistant_masks"])
            print(f"\n---- {source}, sequence {place}: {len(ids)} tokens, {mask.sum()} trained ----")
            edges = [0, *(np.flatnonzero(mask[1:] != mask[:-1]) + 1).tolist(), len(ids)]
            for begin, end in itertools.pairwise(edges):
                text = tokenizer.decode(ids[begin:end])
                print(f"\033[32m{text}\033[0m" if mask[begin] else text, end="")
    print()
