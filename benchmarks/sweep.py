"""Which learning rate? Short runs of sft_v1.py, one after another, on a slice of an epoch, and one table.

    python benchmarks/sweep.py                                         2% of an epoch of data/sft_v1 for each rate
    python benchmarks/sweep.py --learning-rates 1e-5 5e-5 --slice 0.05 --trainer-flags "--weight-decay 0.1"
    python benchmarks/sweep.py --quick                                 two steps on a tiny random model, for a look

Every run sees the same sequences in the same steps; its schedule ends with the slice: a tenth of it is warm-up, then
a cosine to a tenth of the rate. Writes SWEEP_DIR: a folder per rate without its checkpoints, which are large and only
a by-product, and table.md.
"""

import json
import math
import shlex
import shutil
import subprocess
from pathlib import Path

import common
import datasets
import torch

from sft import settings, system

# ---- Sweep ----
LEARNING_RATES = ("5e-6", "1e-5", "2e-5", "5e-5", "1e-4")  # peaks, one run each; docs/training.md has the reasons
SLICE = 0.02  # of an epoch's steps
DATA_DIR = "data/sft_v1"  # folder, from prepare_data.py
RESIZED_MODEL = "models/resized"  # folder, from resize_vocab.py
SWEEP_DIR = "checkpoints/sweep"  # folder to write; must be empty or missing
PROCESSES = 0  # ranks of torchrun; 0 = one per GPU, or two without any
SEQUENCES_PER_STEP = 32  # sequences
TRAINER_FLAGS = ""  # further flags of sft_v1.py, as on a command line
QUICK = False  # a tiny random model and random data

# ==== Runs ====


def train(rate, steps, data, base, output):
    """Train one run; return its row of the table, or the last words of one that failed."""
    processes = PROCESSES or torch.cuda.device_count() or 2
    chosen = {"--data-dir": data, "--resized-model": base, "--checkpoint-dir": output, "--max-steps": steps}
    chosen |= {"--learning-rate": rate, "--min-learning-rate": float(rate) / 10, "--warmup-steps": steps // 10}
    chosen |= {"--sequences-per-step": SEQUENCES_PER_STEP, "--validate-every": steps, "--save-every": steps}
    command = [*common.TORCHRUN, str(processes), "sft_v1.py", *common.flags(chosen), *shlex.split(TRAINER_FLAGS)]
    with open(f"{output}.log", "w") as log:
        failed = subprocess.run(command, cwd=common.ROOT, stdout=log, stderr=log).returncode
    lines = [json.loads(line) for line in read(output / "metrics.jsonl")]
    if failed and not lines:
        raise SystemExit(f"The run did not start; the end of {log.name}:\n{Path(log.name).read_text()[-2000:]}")
    last = max(lines, key=lambda line: line["step"], default={})
    row = [rate, last.get("validation_loss") or "not finite", last.get("loss"), len(read(output / "skipped.jsonl"))]
    for checkpoint in output.glob("step_*"):
        shutil.rmtree(checkpoint)
    if failed or last.get("step") != steps:
        row[1] = f"failed after step {last.get('step', 0)} of {steps}, see {output.name}.log"
    return [f"{cell:.4f}" if isinstance(cell, float) else str(cell) for cell in row]


def read(path):
    """Return the lines of a file, none if there is no such file."""
    return path.read_text().splitlines() if path.exists() else []


def table(rows):
    """Return the Markdown table of the runs so far."""
    titles = ("learning rate", "validation loss at the end", "training loss of the last step", "skipped steps")
    return "\n".join(f"| {' | '.join(row)} |" for row in (titles, ["---"] + ["---:"] * 3, *rows))


def main(args):
    """Run the sweep, print the table after each rate and the RESULT line of the lowest validation loss."""
    data, base, output = (Path(path).resolve() for path in (DATA_DIR, RESIZED_MODEL, SWEEP_DIR))
    rates = LEARNING_RATES
    if QUICK:
        shutil.rmtree(common.WORK / "sweep", ignore_errors=True)
        base, data = common.write_inputs(common.WORK / "sweep", common.TINY, [24] * 3200)
        output, rates = common.WORK / "sweep" / "runs", ("1e-3", "1e-2")
    system.refuse_unless_empty(output, "--sweep-dir")
    try:
        sequences = len(datasets.load_from_disk(data)["train"])
        rates = {rate: float(rate) for rate in rates}
    except (OSError, KeyError) as error:
        raise SystemExit(f"{data} holds no finished data ({error}). Run prepare_data.py.") from None
    except ValueError as error:
        raise SystemExit(f"LEARNING_RATES: {error}. Name numbers, such as 1e-5 2e-5.") from None
    output.mkdir(parents=True, exist_ok=True)
    steps, rows = max(1, int(SLICE * sequences / SEQUENCES_PER_STEP)), []
    print(f"{len(rates)} runs of {steps:,} steps, {SLICE:.1%} of {sequences:,} sequences", flush=True)
    for rate in rates:
        rows.append(train(rate, steps, data, base, output / f"learning_rate_{rate}"))
        (output / "table.md").write_text(table(rows) + "\n")
        print(f"\n{table(rows)}", flush=True)
    best = min(rows, key=lambda row: float(row[1]) if row[1][0].isdigit() else math.inf)
    common.result(learning_rate=best[0], validation_loss=best[1])


if __name__ == "__main__":
    main(settings.from_flags(globals()))
