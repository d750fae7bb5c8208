"""The charts of report.html, as SVG text to put into the page. Used by report_page.py.

Lines and words have the colour of the page's text, so they are readable on light and on dark ground. The words of
others stay text: matplotlib escapes them.
"""

import io
import re

import matplotlib
from matplotlib.figure import Figure

from sft.text import one_line

# ==== Constants ====

TEXT = "#010203"  # stands for the page's text colour, which CSS knows
BEFORE, AFTER, CHANCE = "#8a8f98", "#3b82f6", "#e05252"  # readable on white and on black
SOURCES = ("#3b82f6", "#e08a1e", "#2fa66a", "#b065d8", "#d6568b", "#7a8699", "#a3a514", "#21a9b5")
WIDTH = 5.0  # inches: 360 points, about the width of a phone, so that the words keep their size there
INTERVAL = 1.96  # standard errors on both sides of a score
STYLE = {
    "svg.fonttype": "none",  # words stay words
    "svg.hashsalt": "report",
    "text.parse_math": False,  # a label with two "$" is no formula
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "legend.frameon": False,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
}
STYLE |= dict.fromkeys(
    ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color"), TEXT
)

# ==== From a figure to SVG ====


def svg(height, draw, title):
    """Return the SVG (text) of what draw(axes) makes on axes `height` inches high. title: for readers who can't see."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        draw(figure.add_subplot())
        output = io.StringIO()
        figure.savefig(output, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = output.getvalue()
    text = text[text.index("<svg") :].replace(TEXT, "currentColor")
    text = re.sub(r'<svg ([^>]*?)width="[^"]*"', r"<svg \1", text, count=1)
    text = re.sub(r'(<svg [^>]*?)height="[^"]*"', r"\1", text, count=1)
    return text.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)


# ==== The charts ====


def shown_as_score(row):
    """Return whether both values of a comparison's row are scores between 0 and 1, of which more is better."""
    scores = (row["before"]["value"], row["after"]["value"])
    return row["higher_is_better"] and not row["log_scale"] and all(0 <= score <= 1 for score in scores)


def scores(rows):
    """Return the chart of scores between 0 and 1 before and after, with 95% intervals and chance, or "" without any."""
    rows = [row for row in rows if shown_as_score(row)]
    if not rows:
        return ""

    def draw(axes):
        for side, color, shift in (("before", BEFORE, -0.13), ("after", AFTER, 0.13)):
            values = [row[side]["value"] for row in rows]
            heights = [index + shift for index in range(len(rows))]
            errors = [INTERVAL * (row[side]["stderr"] or 0) for row in rows]
            axes.errorbar(values, heights, xerr=errors, fmt="o", color=color, label=side, markersize=4, linewidth=1.4)
        chances = [(index, row["chance"]) for index, row in enumerate(rows) if row["chance"] is not None]
        bottoms, tops = [index - 0.35 for index, _ in chances], [index + 0.35 for index, _ in chances]
        if chances:
            axes.vlines([chance for _, chance in chances], bottoms, tops, CHANCE, label="chance", linewidth=1.2)
        labels = [shorten(f"{row['label']} · {row['metric']}", 34) for row in rows]
        axes.set_yticks(range(len(rows)), labels)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlabel("score, with 95% interval")
        axes.grid(axis="x")
        axes.legend(loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=3)

    return svg(0.9 + 0.28 * len(rows), draw, "Scores before and after, by task")


def curves(lines, label, log_scale=False):
    """Return the chart of lines over the optimizer steps. lines: [(name, steps, values, whether single points)]."""
    lines = [line for line in lines if line[1]]
    if not lines:
        return ""

    def draw(axes):
        for index, (name, steps, values, points) in enumerate(lines):
            color, style = SOURCES[index % len(SOURCES)], "o-" if points else "-"
            axes.plot(steps, values, style, color=color, label=shorten(name, 30), linewidth=1.2, markersize=3)
        if log_scale:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")  # matplotlib's own is a formula
            axes.yaxis.set_minor_formatter("")
        axes.set(xlabel="optimizer step", ylabel=label)
        axes.grid(axis="y")
        if len(lines) > 1:
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2, fontsize=8)

    return svg(2.6 + 0.09 * len(lines), draw, label)


def shares(sources, columns):
    """Return the bars of each source's share. sources: list of dicts of report.json; columns: {its number: label}."""

    def draw(axes):
        for row, column in enumerate(columns):
            total, left = sum(source[column] for source in sources), 0
            for index, source in enumerate(sources):
                share = source[column] / total if total else 0
                label = shorten(source["name"], 30) if row == 0 else None
                axes.barh(row, share, left=left, color=SOURCES[index % len(SOURCES)], label=label, height=0.7)
                if share > 0.08:
                    axes.text(left + share / 2, row, f"{share:.0%}", ha="center", va="center", color="white")
                left += share
        axes.set_yticks(range(len(columns)), columns.values())
        axes.set(xlim=(0, 1), ylim=(len(columns) - 0.5, -0.5), xticks=[])
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.tick_params(length=0)
        axes.legend(loc="upper left", bbox_to_anchor=(0, 0), ncols=2, fontsize=8)

    return svg(1.0 + 0.3 * len(columns) + 0.1 * len(sources), draw, "Each source's share of the mixture")


def lengths(sources, window):
    """Return the histogram of the sequences' lengths. sources: of report.json; window: tokens of the longest."""
    bins = len(sources[0]["lengths"])
    starts = [index * window / bins for index in range(bins)]

    def draw(axes):
        bottom = [0] * bins
        for index, source in enumerate(sources):
            color = SOURCES[index % len(SOURCES)]
            axes.bar(starts, source["lengths"], window / bins, bottom, align="edge", color=color)
            bottom = [low + count for low, count in zip(bottom, source["lengths"], strict=True)]
        axes.set(xlabel=f"tokens of a sequence (window {window:,})", ylabel="sequences")
        axes.grid(axis="y")

    return svg(2.2, draw, "Lengths of the sequences")


def shorten(text, length):
    """Return `text` as one printable line of at most `length` characters."""
    line = one_line(text)
    return line if len(line) <= length else line[: length - 1] + "…"
