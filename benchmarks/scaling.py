"""Does the time of a step grow in a straight line? With its tokens, its micro-batches and the model's width.

    python benchmarks/scaling.py            about 6 minutes on two CPU cores
    python benchmarks/scaling.py --quick    three short runs per line

Small random Llamas on two CPU ranks through sft_v1.py. Each line varies one thing and keeps the rest:

tokens          the tokens of each rank's one micro-batch
micro-batches   their number, at fixed tokens in each; communication once per step and once per micro-batch
width           hidden and intermediate size, drawn against the weights of the matrices, which grow with their square

A point is the fastest step of a run after its first two: what else the machine does can only add to it. R^2 is that of
the least-squares line, of both ways to communicate the lower one. Writes benchmarks/work/scaling.png, scaling.json.
"""

import json
import statistics

import common

from sft import settings

# ---- Size ----
STEPS = 12  # optimizer steps of each point
POINTS = 6  # of each line
QUICK = False  # 3 points of 5 steps
# ---- Model and step ----
WIDTH = 256  # hidden size; a quarter of it is a head, the intermediate size is four times as large
LAYERS = 4  # blocks
VOCABULARY = 4096  # tokens
LENGTH = 128  # tokens of every sequence

# ==== Runs ====

FOLDER = common.WORK / "scaling"


def base(width):
    """Return (folder, weights in matrices) of a random Llama."""
    shape = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": LAYERS}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCABULARY, "tie_word_embeddings": True}
    common.write_base(FOLDER / f"width_{width}", **shape, max_position_embeddings=LENGTH)
    return FOLDER / f"width_{width}", width * VOCABULARY + LAYERS * 15 * width**2


def data(steps):
    """Return the folder of sequences enough for every run: one epoch is as long as the longest."""
    rows = common.random_rows([LENGTH] * steps * 4 * POINTS, VOCABULARY)
    return common.write_data(FOLDER / "data", rows, VOCABULARY)


def step_seconds(model, rows, steps, per_micro_batch, micro_batches, communicate):
    """Return the seconds of the fastest step; on each rank `micro_batches` of `per_micro_batch` sequences."""
    count = 2 * per_micro_batch * micro_batches
    size = {"sequences_per_step": count, "tokens_per_micro_batch": per_micro_batch * LENGTH, "communicate": communicate}
    lines = common.train(rows, model, 2, 1, steps, **size)
    if any(line["micro_batches"] != micro_batches for line in lines):
        raise SystemExit(f"{count} sequences are {lines[0]['micro_batches']} micro-batches, not {micro_batches}.")
    seconds = min(line["step_seconds"] for line in lines[2:])
    print(f"{model.name}, {micro_batches} x {per_micro_batch} sequences, {communicate}: {seconds:.3f} s", flush=True)
    return seconds


def measure(points, steps):
    """Return {line: [(x, seconds)]}."""
    model, rows = base(WIDTH)[0], data(steps)
    lines = {"tokens": [], "micro_batches per_step": [], "micro_batches per_micro_batch": [], "width": []}
    for n in range(1, points + 1):
        seconds = step_seconds(model, rows, steps, 2 * n, 1, "per_step")
        lines["tokens"].append((2 * 2 * n * LENGTH, seconds))
        for communicate in ("per_step", "per_micro_batch"):
            seconds = step_seconds(model, rows, steps, 1, 2 * n, communicate)
            lines[f"micro_batches {communicate}"].append((2 * n, seconds))
        wider, weights = base(WIDTH * n)
        lines["width"].append((weights / 1e6, step_seconds(wider, rows, steps, 2, 1, "per_step")))
    return lines


# ==== Lines ====


def fit(points):
    """Return (slope, intercept, R^2) of the least-squares line through (x, y) `points`."""
    slope, intercept = statistics.linear_regression(*zip(*points, strict=True))
    mean = statistics.fmean(y for _, y in points)
    rest = sum((y - slope * x - intercept) ** 2 for x, y in points)
    return slope, intercept, 1 - rest / sum((y - mean) ** 2 for _, y in points)


def draw(lines, fits, path):
    """Draw each line's points and its fit, one panel per quantity."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    titles = {"tokens": "tokens per step", "micro_batches": "micro-batches per rank", "width": "million weights"}
    panels = dict(zip(titles, figure.subplots(1, 3), strict=True))
    for name, points in lines.items():
        kind, _, communicate = name.partition(" ")
        x, y = zip(*points, strict=True)
        slope, intercept, r2 = fits[name]
        ends = (0, max(x))
        label = f"{communicate} R² {r2:.3f}".strip()
        (drawn,) = panels[kind].plot(ends, [slope * end + intercept for end in ends], label=label)
        panels[kind].plot(x, y, "o", color=drawn.get_color())
    for kind, panel in panels.items():
        panel.set(xlabel=titles[kind], ylabel="seconds per step", xlim=0, ylim=0)
        panel.legend()
    figure.savefig(path, dpi=120)


def main(args):
    """Measure the lines, fit them, draw them, print the RESULT line."""
    common.machine()
    lines = measure(3 if QUICK else POINTS, 5 if QUICK else STEPS)
    fits = {name: fit(points) for name, points in lines.items()}
    for name, (slope, intercept, r2) in fits.items():
        print(f"{name}: {intercept:.4f} s + {slope:.3g} s x, R^2 {r2:.4f}")
    (common.WORK / "scaling.json").write_text(json.dumps(lines))
    draw(lines, fits, common.WORK / "scaling.png")
    print(f"drawn: {(common.WORK / 'scaling.png').relative_to(common.ROOT)}")
    common.result(
        r2_tokens=round(fits["tokens"][2], 4),
        r2_micro_batches=round(min(fits[f"micro_batches {way}"][2] for way in ("per_step", "per_micro_batch")), 4),
        r2_width=round(fits["width"][2], 4),
    )


if __name__ == "__main__":
    main(settings.from_flags(globals()))
