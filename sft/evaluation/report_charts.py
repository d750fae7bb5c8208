"""The charts of report.html, as SVG text to put into the page. Used by report_page.py.

Lines and words have the colour of the page's text, so they are readable on light and on dark ground. The words of
others stay text: matplotlib escapes them.
"""

import io
import re
import textwrap
import warnings

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from sft.text import one_line

# ==== Constants ====

TEXT = "#010203"  # stands for the page's text colour, which CSS knows
# Each has a contrast of at least 3 with the page's light and dark ground; white words on a source's colour, 4.5.
BEFORE, AFTER, CHANCE = "#6b7684", "#2f6fde", "#cf4a4a"
SOURCES = ("#2f6fde", "#b85b0b", "#1b8250", "#a24fc9", "#c43f79", "#7a7209", "#0c7d8c", "#5f6f86")
MARKERS = "os^DvPX*"  # for those who see no difference between two colours
WIDTH = 4.4  # inches: 317 points, about the width of a phone, so that the words keep their size there
INTERVAL = 1.96  # standard errors on both sides of a score
LOG_FROM = 20  # quotient of the largest and the smallest value from which an axis is logarithmic
STYLE = {
    "svg.fonttype": "none",  # words stay words
    "text.parse_math": False,  # a label with two "$" is no formula
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "legend.handlelength": 1.6,
    "legend.columnspacing": 1.2,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
}
STYLE |= dict.fromkeys(
    ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color"), TEXT
)

# ==== From a figure to SVG ====


def svg(height, draw, title):
    """Return the SVG (text) of what draw(axes) makes on axes `height` inches high. title: for readers who can't see.

    Charts of one page need different titles: the ids inside them follow from the title.
    """
    output = io.StringIO()
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": title}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # the browser has its own fonts
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        draw(figure.add_subplot())
        figure.savefig(output, format="svg", metadata={"Title": title, "Date": None})
    text = output.getvalue()
    text = text[text.index("<svg") :].replace(TEXT, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", text)  # of groups, the same in each chart
    text = re.sub(r'<svg ([^>]*?)width="[^"]*"', r"<svg \1", text, count=1)
    text = re.sub(r'(<svg [^>]*?)height="[^"]*"', r"\1", text, count=1)
    return text.replace("<svg ", '<svg role="img" ', 1)


def shorten(text, length):
    """Return `text` as one printable line of at most `length` characters, which matplotlib takes as a label."""
    line = one_line(text)
    line = line if len(line) <= length else line[: length - 1] + "…"
    return f" {line}" if line.startswith("_") else line  # matplotlib hides a label that begins with "_"


# ==== Scores ====


def shown_as_score(row):
    """Return whether both values of a comparison's row are scores between 0 and 1, of which more is better."""
    scores = (row["before"]["value"], row["after"]["value"])
    return row["higher_is_better"] and not row["log_scale"] and all(0 <= score <= 1 for score in scores)


def score_labels(rows):
    """Return a label of at most two lines for each row; it has the metric only where a task has several."""
    labels, names = [], [row["label"] for row in rows]
    for row in rows:
        words = row["label"] if names.count(row["label"]) == 1 else f"{row['label']} · {row['metric']}"
        labels.append("\n".join(textwrap.wrap(shorten(words, 46), 26)))
    return labels


def scores(rows, title):
    """Return the chart of scores between 0 and 1 before and after, with 95% intervals and chance, or "" without any."""
    rows = [row for row in rows if shown_as_score(row)]
    if not rows:
        return ""

    def draw(axes):
        for side, color, shift, marker in (("before", BEFORE, -0.14, "s"), ("after", AFTER, 0.14, "o")):
            values = [row[side]["value"] for row in rows]
            heights = [index + shift for index in range(len(rows))]
            errors = [INTERVAL * (row[side]["stderr"] or 0) for row in rows]
            axes.errorbar(
                values, heights, xerr=errors, fmt=marker, color=color, label=side, markersize=4, linewidth=1.4
            )
        chances = [(index, row["chance"]) for index, row in enumerate(rows) if row["chance"] is not None]
        bottoms, tops = [index - 0.35 for index, _ in chances], [index + 0.35 for index, _ in chances]
        if chances:
            axes.vlines([chance for _, chance in chances], bottoms, tops, CHANCE, label="chance", linewidth=1.2)
        axes.set_yticks(range(len(rows)), score_labels(rows))
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlabel("score, with 95% interval")
        axes.grid(axis="x")
        axes.legend(loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=3)

    return svg(0.9 + 0.34 * len(rows), draw, title)


# ==== Curves ====


def curves(lines, title, unit):
    """Return the chart of lines over the optimizer steps, or "" without any.

    lines: at most as many as there are colours, [(name, steps, values, whether single points)]; one without values
    keeps its colour. unit: of the values.
    """
    shown = [(index, line) for index, line in enumerate(lines) if line[1]]
    if not shown:
        return ""
    values = [value for _, line in shown for value in line[2]]
    legend_rows = -(-len(shown) // 2) if len(shown) > 1 else 0
    log_scale = 0 < LOG_FROM * min(values) < max(values)

    def draw(axes):
        for index, (name, steps, values, points) in shown:
            color, style = SOURCES[index], f"{MARKERS[index]}-" if points else "-"
            axes.plot(steps, values, style, color=color, label=shorten(name, 22), linewidth=1.2, markersize=4)
        if log_scale:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter("{x:g}")  # matplotlib's own is a formula
        axes.set(xlabel="optimizer step", ylabel=unit)
        axes.set_title(title, loc="left", fontsize=9, pad=6 + 12 * legend_rows)
        axes.grid(axis="y")
        if legend_rows:
            axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 0.98), ncols=2, borderaxespad=0)

    return svg(2.3 + 0.16 * legend_rows, draw, title)


# ==== The mixture ====


def merge_small(sources):
    """Return at most as many sources as there are colours: the largest in their order, the others added up in one.

    sources: list of dicts of report.json, with `name`, counts and `lengths`.
    """
    if len(sources) <= len(SOURCES):
        return sources
    by_size = sorted(sources, key=lambda source: -source["trainable_tokens"])
    kept, small = by_size[: len(SOURCES) - 1], by_size[len(SOURCES) - 1 :]
    counts = ("conversations", "tokens", "trainable_tokens")
    others = {count: sum(source[count] for source in small) for count in counts}
    others["lengths"] = [sum(bins) for bins in zip(*(source["lengths"] for source in small), strict=True)]
    return [source for source in sources if source in kept] + [others | {"name": f"{len(small)} smaller sources"}]


def shares(sources, columns):
    """Return the bars of each source's share. sources: list of dicts of report.json; columns: {its number: label}."""

    def draw(axes):
        for row, column in enumerate(columns):
            total, left = sum(source[column] for source in sources), 0
            for index, source in enumerate(sources):
                share = source[column] / total if total else 0
                label = shorten(source["name"], 22) if row == 0 else None
                axes.barh(row, share, left=left, color=SOURCES[index], label=label, height=0.7)
                if share > 0.08:
                    axes.text(
                        left + share / 2, row, f"{share:.0%}", ha="center", va="center", color="white", fontsize=8
                    )
                left += share
        axes.set_yticks(range(len(columns)), columns.values())
        axes.set(xlim=(0, 1), ylim=(len(columns) - 0.5, -0.5), xticks=[])
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.tick_params(length=0)
        axes.set_title("share of the mixture", loc="left", fontsize=9)
        axes.legend(loc="upper left", bbox_to_anchor=(-0.02, 0), ncols=2)

    return svg(0.6 + 0.3 * len(columns) + 0.18 * -(-len(sources) // 2), draw, "Each source's share of the mixture")


def lengths(sources, window):
    """Return the histogram of the sequences' lengths. sources: of report.json; window: tokens of the longest."""
    bins = len(sources[0]["lengths"])
    starts = [index * window / bins for index in range(bins)]

    def draw(axes):
        bottom = [0] * bins
        for index, source in enumerate(sources):
            axes.bar(starts, source["lengths"], window / bins, bottom, align="edge", color=SOURCES[index])
            bottom = [low + count for low, count in zip(bottom, source["lengths"], strict=True)]
        axes.set(xlabel=f"tokens of a sequence, at most {window:,}", ylabel="sequences", xlim=(0, window))
        axes.set_title("lengths of the sequences, in the colours of the shares", loc="left", fontsize=9)
        axes.grid(axis="y")

    return svg(2.3, draw, "Lengths of the sequences")
