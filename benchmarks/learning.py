"""How soon does a model learn? sft_v1.py against TRL: the same base, data, order and cores, for the same time.

    python benchmarks/learning.py            about 95 minutes on two quiet CPU cores
    python benchmarks/learning.py --quick    one seed for a minute, for a look

SmolLM2-135M-Instruct learns problems with one right answer (benchmarks/peer_problems.py: sums, legs of animals,
families, sorting, reversing, filtering) beside conversations of ShareGPT, decontaminated against the held-out problems.
Each contender trains for MINUTES from its first step, at one fixed rate, on the same sequences in the same order:

ours         sft_v1.py, in the faster of OURS
TRL          SFTTrainer in .venv-benchmarks at its default: micro-batch 8 x accumulation 2, activation checkpointing
TRL best     the fastest of TRL_SETTINGS

CALIBRATION_STEPS steps of each find the fastest. A seed is an order of the sequences; the contenders of a seed run in
turn. Each saves SNAPSHOTS times, ours whole checkpoints, to continue from, TRL the weights alone; the time for which a
save stops training counts, the start of the programs does not. Afterwards lm_eval scores every snapshot by exact match
of its greedy answers to the held-out problems; its loss is measured on held-out conversations and on plain text.

minutes_to_trl_quality_ratio is the time at which our exact match, the mean of the seeds, reaches that of TRL best at
its end, divided by that end. loss_gap is the mean difference of the training losses at equal steps, relative to ours.
Reads and writes benchmarks/work/learning/.
"""

import contextlib
import functools
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import common
import numpy as np

from sft import settings

# ---- Size ----
MINUTES = 8.0  # of training, for each contender and seed
SEEDS = 3  # orders of the sequences
DEFAULT_SEEDS = 1  # of TRL at its default, the slowest
SNAPSHOTS = 4  # of each run that are scored, evenly over its steps
CALIBRATION_STEPS = 2  # optimizer steps of each setting; all but the first are timed
PROBLEMS = 1500  # of each generator to train on
HELD_OUT = 50  # of each generator to be scored on
CHATS = 400  # conversations of ShareGPT
VALIDATION = 12  # conversations of each source, for the held-out loss
DOCUMENTS = 12  # of plain text, docstrings of Python's standard library
QUICK = False  # one minute, one seed, two snapshots, 8 problems of each generator
# ---- What is trained ----
SEQUENCES_PER_STEP = 16  # sequences
MAX_SEQ_LEN = 512  # tokens
TOKENS_PER_MICRO_BATCH = 4096  # of ours
LEARNING_RATE = 3e-4  # fixed, of all
COMPUTE_DTYPE = "bfloat16"  # "bfloat16" | "float32", for a CPU without bfloat16 instructions

# ==== Contenders ====

WORK = common.WORK / "learning"
OURS = {"ours, 2 ranks": (2, 1), "ours, 1 rank": (1, 2)}  # (ranks, threads of each)
TRL_DEFAULT = "TRL"
TRL_SETTINGS = {  # (processes, sequences per forward, activation checkpointing)
    TRL_DEFAULT: (1, 8, True),
    "TRL, micro-batch 1": (1, 1, False),
    "TRL, micro-batch 2": (1, 2, False),
    "TRL, micro-batch 4": (1, 4, False),
    "TRL, micro-batch 2, 2 processes": (2, 2, False),
}
LARGEST_GAP = 0.01  # of a loss, relative, up to which a contender does the same training
STALL = re.compile(r"^saved step_(\d+) in [\d.]+ s; training stood still for ([\d.]+) s$", re.MULTILINE)


def trainer_flags():
    """Return the flags of sft_v1.py in every run (dict), besides common.TRAINER's."""
    return {
        "sequences_per_step": SEQUENCES_PER_STEP,
        "tokens_per_micro_batch": TOKENS_PER_MICRO_BATCH,
        "learning_rate": LEARNING_RATE,
        "min_learning_rate": LEARNING_RATE,
        "compute_dtype": COMPUTE_DTYPE,
    }


def first_step_began(process, output):
    """Wait for a run's first step; return when it began, by time.monotonic()."""
    while process.poll() is None:
        with contextlib.suppress(OSError, IndexError):
            return time.monotonic() - common.steps_of(output)[0]["step_seconds"]
        time.sleep(0.2)
    raise SystemExit(f"sft_v1.py ended before its first step; see {output}.err.")


def train_ours(data, steps, name, layout, seconds, save_every):
    """Train for `seconds`, `steps` at most.

    Returns: {"minutes": of each step's end, "losses": of each, "snapshots": {step: checkpoint}}.
    """
    output, (ranks, threads) = WORK / f"run-{name}", layout
    chosen = trainer_flags() | {"save_every": save_every, "keep_checkpoints": 2 * SNAPSHOTS}
    arguments = common.trainer_arguments(data, WORK / "base", output, steps, **chosen)
    command = [*common.TORCHRUN, str(ranks), "sft_v1.py", *arguments]
    environment = os.environ | common.OFFLINE | {"OMP_NUM_THREADS": str(threads)}
    with Path(f"{output}.log").open("w") as log, Path(f"{output}.err").open("w") as errors:
        process = subprocess.Popen(command, cwd=common.ROOT, env=environment, stdout=log, stderr=errors)
        began = first_step_began(process, output)
        time.sleep(max(0.0, began + seconds - time.monotonic()))
        (output / "STOP").touch()
        if process.wait():
            raise SystemExit(f"sft_v1.py failed; see {output}.err.")
    lines = common.steps_of(output)
    stalls = {int(step): float(stall) for step, stall in STALL.findall(Path(f"{output}.log").read_text())}
    spent = [line["step_seconds"] + stalls.get(line["step"] - 1, 0.0) for line in lines]
    snapshots = {int(path.name.removeprefix("step_")): str(path) for path in sorted(output.glob("step_*"))}
    return {"minutes": minutes(spent), "losses": [line["loss"] for line in lines], "snapshots": snapshots}


def export(checkpoint):
    """Export a checkpoint of ours in float32 and remove it, for the disk; return the HF folder (str)."""
    run, folder = Path(checkpoint).parent, f"{checkpoint}-exported"
    common.run(
        sys.executable, "export_hf.py", "--checkpoint-dir", run, "--resized-model", WORK / "base",
        "--export-dir", folder, "--checkpoint", Path(checkpoint).name, "--dtype", "float32",
    )  # fmt: skip
    shutil.rmtree(checkpoint)
    return folder


def train_trl(python, data, steps, name, layout, seconds, save_every):
    """Train for `seconds`; return what train_ours does, with HF folders as snapshots."""
    output = WORK / f"run-{name}"
    figures = peer(
        python, data, layout, steps, "--max-seconds", seconds, "--save-every", save_every, "--output", output
    )
    snapshots = {int(folder.name.removeprefix("checkpoint-")): str(folder) for folder in output.glob("checkpoint-*")}
    return {"minutes": minutes(figures["step_seconds"]), "losses": figures["losses"], "snapshots": snapshots}


def peer(python, data, layout, steps, *further):
    """Return the figures of a run of peer_train.py."""
    processes, micro_batch, checkpointing = layout
    chosen = {
        "--data-dir": data,
        "--resized-model": WORK / "base",
        "--steps": steps,
        "--micro-batch": micro_batch,
        "--accumulation": SEQUENCES_PER_STEP // micro_batch // processes,
        "--learning-rate": LEARNING_RATE,
        "--pad-to": MAX_SEQ_LEN,
        "--compute-dtype": COMPUTE_DTYPE,
    }
    further = [*further, "--checkpointing"] if checkpointing else further
    return common.peer(python, processes, chosen, *further)


def minutes(seconds):
    """Return the minutes from the first step's begin to each step's end. seconds: of each step."""
    return (np.cumsum(seconds) / 60).tolist()


def calibrate(python, data):
    """Return {contender: (setting's name, layout, seconds of a step)} of ours, TRL and TRL best."""
    timed, reference = {}, None
    settings_of_all = OURS | TRL_SETTINGS
    for name, layout in settings_of_all.items():
        if name in OURS:
            lines = common.train(data, WORK / "base", *layout, CALIBRATION_STEPS, **trainer_flags())
            seconds, losses = [line["step_seconds"] for line in lines], [line["loss"] for line in lines]
        else:
            figures = peer(python, data, layout, CALIBRATION_STEPS)
            seconds, losses = figures["step_seconds"], figures["losses"]
        reference = reference or losses
        gap = max(abs(loss / right - 1) for loss, right in zip(losses, reference, strict=True))
        print(f"{name}: {np.mean(seconds[1:]):.2f} s a step, losses differ by up to {gap:.2%}", flush=True)
        if gap <= LARGEST_GAP or name == TRL_DEFAULT:
            timed[name] = float(np.mean(seconds[1:]))
    best = [min(set(names) & set(timed), key=timed.get) for names in (OURS, TRL_SETTINGS)]
    chosen = {"ours": best[0], "TRL": TRL_DEFAULT, "TRL best": best[1]}
    return {who: (name, settings_of_all[name], timed[name]) for who, name in chosen.items()}


# ==== Inputs ====

TASK = """\
task: held_out
dataset_path: json
dataset_kwargs:
  data_files:
    test: {path}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  until: ["<|im_end|>"]
  do_sample: false
  max_gen_toks: 24
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


def prepare(python, args):
    """Write the problems, the prepared data and the resized base with the suite's own scripts."""
    chosen = {"--output": WORK, "--problems": PROBLEMS, "--held-out": 8 if args["QUICK"] else HELD_OUT}
    common.run(python, "benchmarks/peer_problems.py", *common.flags(chosen))
    held_out = WORK / "held_out"
    (held_out / "held_out.yaml").write_text(TASK.format(path=held_out / "held_out.jsonl"))
    mixture = [
        {"name": "problems", "path": str(WORK / "problems.jsonl"), "schema": "messages", "examples": "all"},
        {"name": "sharegpt", "path": str(common.sharegpt()), "schema": "conversations", "examples": CHATS},
    ]
    (WORK / "mixture.json").write_text(json.dumps(mixture))
    against = ["--decontaminate-against", "held_out", "--tasks-include-path", held_out]
    files = WORK / "mixture.json", WORK / "data", WORK / "base"
    common.prepare(*files, MAX_SEQ_LEN, "--validation-conversations", VALIDATION, *against)


def write_order(seed):
    """Write WORK/order-SEED, the training split in this seed's order; return (folder, steps of one pass)."""
    import datasets

    rows = datasets.load_from_disk(WORK / "data")["train"].with_format("numpy")
    report = json.loads((WORK / "data" / "report.json").read_text())
    order = np.random.default_rng(seed).permutation(len(rows))
    sequences = [(rows[int(i)]["input_ids"].astype(np.int64), rows[int(i)]["assistant_masks"]) for i in order]
    folder = WORK / f"order-{seed}"
    common.write_data(folder, sequences, report["vocab_size"], WORK / "data" / "tokenizer", MAX_SEQ_LEN)
    return folder, len(sequences) // SEQUENCES_PER_STEP


# ==== Scores ====


def score(folders, documents, dtype):
    """Return {folder: its scores} by lm_eval and the losses, of models in HF folders; runs in its own process.

    Scores: "exact_match" of all held-out problems, "by_task" (dict), "held_out_loss" and "plain_text_loss", nats per
    token, means of conversations and of `documents` of Python's docstrings. dtype: str, in which the models compute.
    """
    import datasets
    import forgetting
    import lm_eval
    import torch
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from sft.evaluation import assistant_check

    os.environ |= common.OFFLINE
    datasets.disable_progress_bars()
    tasks = TaskManager(include_path=str(WORK / "held_out"))
    rows, texts = assistant_check.load_rows(WORK / "data"), forgetting.docstrings()
    texts = texts[:: len(texts) // documents][:documents]
    scores = {}
    for folder in folders:
        model = HFLM(str(folder), device="cpu", dtype=dtype, batch_size=100)
        result = lm_eval.simple_evaluate(model, tasks=["held_out"], task_manager=tasks, apply_chat_template=True)
        by_task = {}
        for sample in result["samples"]["held_out"]:
            by_task.setdefault(sample["doc"]["task"], []).append(sample["exact_match"])
        text, answers = forgetting.losses(folder, texts, rows, getattr(torch, dtype))
        scores[folder] = {
            "exact_match": float(np.mean(np.concatenate(list(by_task.values())))),
            "by_task": {name: float(np.mean(hits)) for name, hits in by_task.items()},
            "held_out_loss": float(answers.mean()),
            "plain_text_loss": float(text.mean()),
        }
        print(f"{Path(folder).name}: {scores[folder]}", flush=True)
    return scores


def score_all(folders):
    """Return {folder: its scores}; each core scores its share of `folders`, in a process with one thread."""
    os.environ["OMP_NUM_THREADS"] = "1"
    score_share = functools.partial(score, documents=DOCUMENTS, dtype=COMPUTE_DTYPE)
    with ProcessPoolExecutor(common.CORES, mp_context=multiprocessing.get_context("spawn")) as pool:
        shares = pool.map(score_share, [folders[core :: common.CORES] for core in range(common.CORES)])
        return {folder: scores for share in shares for folder, scores in share.items()}


def curve(run, scores, before, key):
    """Return (minutes, values) of a run's snapshots, the base first. scores: by folder; before: the base's."""
    steps = sorted(run["snapshots"])
    values = [before[key], *(scores[run["snapshots"][step]][key] for step in steps)]
    return [0.0, *(run["minutes"][step - 1] for step in steps)], values


def mean_curve(curves):
    """Return (minutes, mean, lowest, highest value) of several curves on one grid, up to the shortest one's end."""
    grid = np.linspace(0, min(at[-1] for at, _ in curves), 241)
    values = np.array([np.interp(grid, at, found) for at, found in curves])
    return grid, values.mean(0), values.min(0), values.max(0)


def minutes_to(target, grid, values):
    """Return the first of `grid` at which `values` reach `target` from below, nan if they never do."""
    reached = np.flatnonzero(values >= target)
    return float(grid[reached[0]]) if len(reached) else float("nan")


def draw(curves, path):
    """Draw exact match and held-out loss against minutes. curves: {key: {contender: list of (minutes, values)}}."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    titles = {"exact_match": "held-out problems answered exactly", "held_out_loss": "loss on held-out conversations"}
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for panel, (key, title) in zip(panels, titles.items(), strict=True):
        for (name, found), colour in zip(curves[key].items(), ("C0", "C1", "C3"), strict=True):
            grid, mean, low, high = mean_curve(found)
            panel.plot(grid, mean, color=colour, label=name)
            panel.fill_between(grid, low, high, color=colour, alpha=0.15, linewidth=0)
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("minutes of training")
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylim(bottom=0)
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=110)


# ==== Main ====


def race(python, args, chosen):
    """Train every contender with every seed, in turn; return {contender: list of runs}."""
    seeds, seconds = (1, 60) if args["QUICK"] else (SEEDS, 60 * MINUTES)
    snapshots = 2 if args["QUICK"] else SNAPSHOTS
    runs = {who: [] for who in chosen}
    for seed in range(1, seeds + 1):
        data, steps = write_order(seed)
        for who, (_, layout, step_seconds) in chosen.items():
            if who == "TRL" and seed > DEFAULT_SEEDS:
                continue
            save_every = max(1, round(seconds / step_seconds / snapshots))
            name = f"{who}-{seed}".replace(" ", "-")
            if who == "ours":
                run = train_ours(data, steps, name, layout, seconds, save_every)
                run["snapshots"] = {step: export(checkpoint) for step, checkpoint in run["snapshots"].items()}
            else:
                run = train_trl(python, data, steps, name, layout, seconds, save_every)
            runs[who].append(run)
            print(f"seed {seed}, {who}: {len(run['losses'])} steps in {run['minutes'][-1]:.2f} min", flush=True)
        shutil.rmtree(data)
    (WORK / "runs.json").write_text(json.dumps(runs))
    return runs


def loss_gaps(ours, theirs):
    """Return (mean, largest) relative difference of the training losses at equal steps, over all seeds."""
    gaps = []
    for one, other in zip(ours, theirs, strict=True):
        gaps += [abs(b / a - 1) for a, b in zip(one["losses"], other["losses"], strict=False)]
    return float(np.mean(gaps)), max(gaps)


def summary(runs, scores, before):
    """Print the table of the last snapshots, draw the curves and return the figures of the RESULT line."""
    keys = ("exact_match", "held_out_loss", "plain_text_loss")
    curves = {key: {w: [curve(run, scores, before, key) for run in found] for w, found in runs.items()} for key in keys}
    draw({key: curves[key] for key in keys[:2]}, WORK / "learning.png")
    means = {key: {who: mean_curve(found) for who, found in curves[key].items()} for key in keys}
    print("\n| | steps | exact match | of each seed | held-out loss | plain text loss |\n|---|---:|---:|---|---:|---:|")
    print(f"| before | 0 | {before['exact_match']:.3f} | | {before[keys[1]]:.3f} | {before[keys[2]]:.3f} |")
    for who, found in runs.items():
        each = " ".join(f"{values[-1]:.3f}" for _, values in curves["exact_match"][who])
        last = [means[key][who][1][-1] for key in keys]
        steps = np.mean([len(run["losses"]) for run in found])
        print(f"| {who} | {steps:.0f} | {last[0]:.3f} | {each} | {last[1]:.3f} | {last[2]:.3f} |")
    figures = {}
    for who, name in (("TRL best", "trl_quality"), ("TRL", "trl_default_quality")):
        grid, mean, *_ = means["exact_match"][who]
        reached = minutes_to(mean[-1], *means["exact_match"]["ours"][:2])
        figures[f"minutes_to_{name}_ratio"] = round(reached / grid[-1], 3)
        grid, mean, *_ = means["held_out_loss"][who]
        ours_grid, ours_mean, *_ = means["held_out_loss"]["ours"]
        figures[f"minutes_to_{name.replace('quality', 'loss')}_ratio"] = round(
            minutes_to(-mean[-1], ours_grid, -ours_mean) / grid[-1], 3
        )
    final = {who: round(float(means["exact_match"][who][1][-1]), 3) for who in runs}
    gap, largest = loss_gaps(runs["ours"], runs["TRL best"])
    change = means["plain_text_loss"]["ours"][1][-1] - before["plain_text_loss"]
    return figures | {
        "exact_match_before": round(before["exact_match"], 3),
        "ours": final["ours"],
        "trl": final["TRL best"],
        "trl_default": final["TRL"],
        "plain_text_loss_change": round(float(change), 3),
        "loss_gap": round(gap, 4),
        "largest_loss_gap": round(largest, 4),
    }


def main(args):
    """Prepare, calibrate, train in turn, score every snapshot, print the RESULT line."""
    common.machine()
    python = common.peers_python()
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    prepare(python, args)
    data, _ = write_order(0)
    chosen = calibrate(python, data)
    shutil.rmtree(data)
    print("chosen:", ", ".join(f"{who}: {name}" for who, (name, *_) in chosen.items()), flush=True)
    runs = race(python, args, chosen)
    folders = [folder for found in runs.values() for run in found for folder in run["snapshots"].values()]
    scores = score_all([str(WORK / "base"), *folders])
    (WORK / "scores.json").write_text(json.dumps(scores))
    common.result(**summary(runs, scores, scores[str(WORK / "base")]))


if __name__ == "__main__":
    main(settings.from_flags(globals()))
