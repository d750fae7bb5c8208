"""What was generated, for reading: the figures, report.md, report.png, and rows for the terminal."""

import itertools
import re
from collections import Counter

from sft.generation.constitution import CATEGORIES
from sft.generation.constraints import bare
from sft.generation.records import STAGES
from sft.text import one_line, printable, table_cell

# ==== The plan ====


def money(value):
    """Return money as text, or "" if it is unknown."""
    return "" if value is None else f"{value:,.2f}"


def plan_table(planner, cost):
    """Return the plan as a table. cost(tokens): money for (tokens in, tokens out), or None."""
    lines = [f"{'stage':<12}{'on disk':>10}{'to ask':>10}{'tokens in':>14}{'tokens out':>14}{'cost':>12}"]
    sums = Counter()
    for stage in STAGES:
        missing, used = planner.missing[stage], len(planner.used[stage])
        tokens = [sum(pair[side] for pair in missing.values()) for side in (0, 1)]
        sums.update(used=used, calls=len(missing), tokens_in=tokens[0], tokens_out=tokens[1])
        lines.append(
            f"{stage:<12}{used:>10,}{len(missing):>10,}{tokens[0]:>14,}{tokens[1]:>14,}{money(cost(tokens)):>12}"
        )
    total = cost((sums["tokens_in"], sums["tokens_out"]))
    lines.append(
        f"{'all':<12}{sums['used']:>10,}{sums['calls']:>10,}{sums['tokens_in']:>14,}{sums['tokens_out']:>14,}"
        f"{money(total):>12}"
    )
    return "\n".join(lines)


# ==== Figures ====


def figures(items):
    """Return {category: {figure: value}} of the kept Items."""
    table = {}
    for category in CATEGORIES:
        answers = [bare(answer) for item in items if item.category.id == category for answer in item.answers]
        if not answers:
            continue
        words = [re.findall(r"\w+", answer.lower()) for answer in answers]
        lengths = sorted(len(answer) for answer in words)
        opening, count = Counter(tuple(answer[:3]) for answer in words).most_common(1)[0]
        pairs = [pair for answer in words for pair in itertools.pairwise(answer)]
        table[category] = {
            "rows": sum(item.category.id == category for item in items),
            "answers": len(answers),
            "think": sum(item.form.think for item in items if item.category.id == category),
            "commonest opening": " ".join(opening),
            "its share": count / len(answers),
            "distinct-2": len(set(pairs)) / max(1, len(pairs)),
            "median words": lengths[len(lengths) // 2],
            "longest": lengths[-1],
            "lengths": lengths,
        }
    return table


def ledger_lines(ledger, journal, unsettled, priced):
    """Return the lines of the table of calls, tokens and money.

    journal: of the batches; unsettled: money at most, of what is lost and of the batches still out; priced: whether
    prices are known.
    """
    lines = ["| stage | calls | refused | lost | tokens in | tokens out | cost |", "|---|" + "---:|" * 6]
    total = Counter()
    for stage, line in [*ledger.items(), ("all", total)]:
        cells = [f"{line[name]:,}" for name in ("calls", "errors", "lost", "input_tokens", "output_tokens")]
        cost = f"{line['cost']:,.4f}" if priced and not line["unpriced"] else ""
        lines.append(f"| {stage} | {' | '.join(cells)} | {cost} |")
        if stage != "all":
            total.update(line)
    if total["lost"]:
        lines += ["", "lost: sent before a kill, answered to nobody; they may have been paid."]
    if out := len(journal.open_batches()):
        lines += ["", f"{out:,} batches are still out; a run with another constitution or settings asked for them."]
    if priced and unsettled:
        lines += ["", f"What is lost or still out costs {unsettled:,.4f} at most, on top of the table."]
    if total["unpriced"]:
        lines += ["", f"{total['unpriced']:,} calls were made without known prices; they are missing in the cost."]
    return lines


def markdown(items, kept, goals, money, held_out):
    """Return report.md.

    items: all; kept: those written; goals: {category: rows wanted}; money: ledger_lines; held_out: number of rows.
    """
    lines = ["# The constitutional conversations", ""]
    lines += [f"{len(kept):,} rows of {sum(goals.values()):,} wanted, {held_out:,} of them held out.", ""]
    asked = Counter(item.category.id for item in items)
    kept_of = Counter(item.category.id for item in kept)
    lines += ["| category | wanted | asked | rejected | spare | kept |", "|---|" + "---:|" * 5]
    for category, goal in goals.items():
        rejected = sum(bool(item.reason) for item in items if item.category.id == category)
        spare = asked[category] - rejected - kept_of[category]
        cells = [f"{number:,}" for number in (goal, asked[category], rejected, spare, kept_of[category])]
        lines.append(f"| {category} | {' | '.join(cells)} |")
    reasons = Counter((item.category.id, item.reason) for item in items if item.reason)
    lines += [
        "",
        *(f"- {category}: {count:,} rejected: {reason}" for (category, reason), count in reasons.most_common()),
    ]
    names = ("rows", "answers", "think", "commonest opening", "its share", "distinct-2", "median words", "longest")
    lines += ["", f"| category | {' | '.join(names)} |", "|---|" + "---:|" * len(names)]
    for category, row in figures(kept).items():
        cells = [row[name] for name in names]
        shown = [f"{cell:.3f}" if isinstance(cell, float) else table_cell(str(cell)) for cell in cells]
        lines.append(f"| {category} | {' | '.join(shown)} |")
    lines += [
        "",
        "distinct-2: different pairs of neighbouring words, as a share of all pairs; larger is more varied.",
        "",
    ]
    return "\n".join([*lines, *money]) + "\n"


def draw(items, kept, path):
    """Write report.png: lengths per category, the share of the commonest opening and distinct-2, reasons to reject."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    lengths, variety, reasons = figure.subplots(1, 3, width_ratios=(3, 2, 3))
    table = figures(kept)
    if table:
        lengths.hist([row["lengths"] for row in table.values()], bins=30, stacked=True, label=list(table))
        lengths.legend(fontsize=8)
    lengths.set(xlabel="words of an answer, without reasoning", ylabel="answers")
    for offset, name in enumerate(("its share", "distinct-2")):
        values = [row[name] for row in table.values()]
        label = "commonest three-word opening" if offset == 0 else name
        variety.barh([index + 0.4 * offset for index in range(len(table))], values, 0.4, label=label)
    variety.set(yticks=range(len(table)), yticklabels=list(table), xlabel="share")
    variety.legend(fontsize=8)
    counts = Counter(item.reason for item in items if item.reason).most_common(10)
    reasons.barh([reason for reason, _ in counts], [count for _, count in counts], color="C3")
    reasons.set(xlabel="conversations rejected")
    reasons.invert_yaxis()
    figure.savefig(path, dpi=120)


def sample(items, number):
    """Return `number` of the Items, spread over all of them, as text for the terminal."""
    lines = []
    for item in items[:: max(1, len(items) // number)][:number] if items else []:
        lines.append(f"\n---- {item.id}: {one_line(item.ask.topic)} ----")
        for message in item.messages:
            lines.append(f"{message['role']}: {printable(message['content'])}")
    return "\n".join(lines)
