"""Which learning rate? Short runs of sft_v1.py, one after another, on a slice of an epoch, and one table.

    python benchmarks/sweep.py                                         2% of an epoch of data/sft_v1 for each rate
    python benchmarks/sweep.py --learning-rates 1e-5 5e-5 --slice 0.05 --trainer-flags "--weight-decay 0.1"
    python benchmarks/sweep.py --quick                                 short runs of a tiny random model, for a look

Every run sees the same sequences in the same steps; its schedule ends with the slice: a tenth of it is warm-up, then
a cosine to a tenth of the rate. After it, its model is exported and asked LIMIT questions of each task of the chat
pass, from the current folder, as run_eval.sh does; DEVICE, DTYPE and BATCH_SIZE in the environment are run_eval.sh's.
Writes SWEEP_DIR: a folder per rate without its checkpoints and its export, which are large and only by-products,
eval-results/ with the answers, and table.md.
"""

import math
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import common
import datasets
import torch

from sft import settings, system
from sft.evaluation import eval_results

# ---- Sweep ----
LEARNING_RATES = ("5e-6", "1e-5", "2e-5", "5e-5", "1e-4")  # peaks, one run each; docs/training.md has the reasons
SLICE = 0.02  # of an epoch's steps
DATA_DIR = "data/sft_v1"  # folder, from prepare_data.py
RESIZED_MODEL = "models/resized"  # folder, from resize_vocab.py
SWEEP_DIR = "checkpoints/sweep"  # folder to write; must be empty or missing
PROCESSES = 0  # ranks of torchrun; 0 = one per GPU, or two without any
SEQUENCES_PER_STEP = 32  # sequences
LIMIT = 100  # questions of each task of the chat pass after a run; 0 = no chat pass
TRAINER_FLAGS = ""  # further flags of sft_v1.py, as on a command line
QUICK = False  # a tiny random model and random data, without the chat pass

# ==== Runs ====

# The tasks of the chat pass, and the score of each that the table shows, by lm_eval's key.
CHAT_SCORES = {"ifeval": "prompt_level_strict_acc,none", "gsm8k": "exact_match,flexible-extract"}


def train(rate, steps, data, base, output):
    """Train one run; return its row of the table, or the last words of one that failed. Its checkpoints stay."""
    processes = PROCESSES or torch.cuda.device_count() or 2
    chosen = {"--data-dir": data, "--resized-model": base, "--checkpoint-dir": output, "--max-steps": steps}
    chosen |= {"--learning-rate": rate, "--min-learning-rate": float(rate) / 10, "--warmup-steps": steps // 10}
    chosen |= {"--sequences-per-step": SEQUENCES_PER_STEP, "--validate-every": steps, "--save-every": steps}
    command = [*common.TORCHRUN, str(processes), "sft_v1.py", *common.flags(chosen), *shlex.split(TRAINER_FLAGS)]
    with open(f"{output}.log", "w") as log:
        failed = subprocess.run(command, cwd=common.ROOT, stdout=log, stderr=log).returncode
    lines = system.read_lines(output / "metrics.jsonl")
    if failed and not lines:
        raise SystemExit(f"The run did not start; the end of {log.name}:\n{Path(log.name).read_text()[-2000:]}")
    last = max(lines, key=lambda line: line["step"], default={})
    skipped = len(system.read_lines(output / "skipped.jsonl"))
    row = [rate, last.get("validation_loss") or "not finite", last.get("loss"), skipped]
    if failed or last.get("step") != steps:
        row[1] = f"failed after step {last.get('step', 0)} of {steps}, see {output.name}.log"
    return row


def chat_pass(data, base, output):
    """Export the run in `output` and measure it through its chat template; return a cell for each of CHAT_SCORES."""
    export, results = output / "export", output.parent / "eval-results"
    name = output.name.replace(".", "_")
    folders = {"--checkpoint-dir": output, "--resized-model": base, "--export-dir": export}
    device = {"DEVICE": "gpus" if torch.cuda.is_available() else "cpu"}
    chosen = {"CHAT_TEMPLATE": "1", "LIMIT": str(LIMIT), "TASKS": ",".join(CHAT_SCORES), "EVAL_RESULTS": str(results)}
    chosen |= {"DATA_DIR": str(data), "CHECK_READING": "0"}  # a rate that broke the model has its score, too
    chosen["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = device | os.environ | chosen
    to_export = [sys.executable, common.ROOT / "export_hf.py", *common.flags(folders)]
    to_measure = ["bash", common.ROOT / "run_eval.sh", name, export]
    with open(f"{output}.log", "a") as log:
        failed = subprocess.run(to_export, env=environment, stdout=log, stderr=log).returncode
        failed = failed or subprocess.run(to_measure, env=environment, stdout=log, stderr=log).returncode
    shutil.rmtree(export, ignore_errors=True)
    if failed:
        return [f"failed, see {output.name}.log"] * len(CHAT_SCORES)
    scores = eval_results.read_run(results / f"{name}-chat")["results"]
    return [scores[task][key] for task, key in CHAT_SCORES.items()]


def cell(value):
    """Return a value of the table as it is shown."""
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def table(rows, tasks):
    """Return the Markdown table of the runs so far. tasks: names of the chat pass's, a column each."""
    titles = ["learning rate", "validation loss at the end", "training loss of the last step", "skipped steps", *tasks]
    lines = [titles, ["---"] + ["---:"] * (len(titles) - 1), *(map(cell, row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(args):
    """Run the sweep, print the table after each rate and the RESULT line of the lowest validation loss."""
    data, base, output = (Path(path).resolve() for path in (DATA_DIR, RESIZED_MODEL, SWEEP_DIR))
    rates, tasks = LEARNING_RATES, tuple(CHAT_SCORES) if LIMIT else ()
    if QUICK:
        shutil.rmtree(common.WORK / "sweep", ignore_errors=True)
        base, data = common.write_inputs(common.WORK / "sweep", common.TINY, [24] * 3200)
        output, rates, tasks = common.WORK / "sweep" / "runs", ("1e-3", "1e-2"), ()
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
        run = output / f"learning_rate_{rate}"
        rows.append(train(rate, steps, data, base, run))
        if tasks:
            rows[-1] += chat_pass(data, base, run)
        for checkpoint in run.glob("step_*"):
            shutil.rmtree(checkpoint)
        (output / "table.md").write_text(table(rows, tasks) + "\n")
        print(f"\n{table(rows, tasks)}", flush=True)
    best = min(rows, key=lambda row: row[1] if isinstance(row[1], float) else math.inf)
    scores = zip(("validation_loss", *tasks), (best[1], *best[4:]), strict=True)
    common.result(learning_rate=best[0], **{name: cell(score) for name, score in scores})


if __name__ == "__main__":
    main(settings.from_flags(globals()))
