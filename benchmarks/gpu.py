"""What do your cards do with Genesis 1B's shape? The plan against what is measured, before any data exists.

    python benchmarks/gpu.py            all CUDA cards of this machine; needs 30 GB of disk
    python benchmarks/gpu.py --peers    also TRL (if .venv-benchmarks exists; train.py makes it) and the padded recipe
    python benchmarks/gpu.py --quick    a tiny shape on the CPU, to see that the benchmark itself runs

Random weights, 32 generated sequences per step with the lengths of Genesis's data (mean 716, cut at 2048), bfloat16
compute with float32 weights and moments. First the links between the cards (link_speed.py), then sft_v1.py under
torchrun: with its own choices, with a save in mid-run, and with one choice changed at a time; the deterministic run
twice, to see whether losses and gradient norms have the same bits. A run is a process of its own: one that fails or
takes longer than ROW_SECONDS is a row that says why. The second half of a run's steps is timed, and only real tokens
count.

The plan's side of the table: its bytes; the tokens/s behind its hours; for two RTX 4090 the bound of MFU by count at
the measured link (symbolic_gpu.py); for a save the copy of a rank's state to host memory. MFU is the trainer's own; a
peer's follows from its tokens/s, since the sequences are the same. Reads and writes benchmarks/work/.
"""

import itertools
import json
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import common
import numpy as np
import save
import torch

import sft_v1
from sft import settings, system
from sft.training import memory_plan

# ---- Runs ----
RANKS = 0  # cards, one rank on each; 0 = all
STEPS = 20  # optimizer steps of a run
SEQUENCES_PER_STEP = 32  # sequences
PEERS = False  # run TRL and the padded recipe, too
ROW_SECONDS = 300  # after which a run is ended
QUICK = False  # a tiny shape on two CPU ranks, 4 steps of 8 sequences, the first two runs only
# ---- What the plan assumes ----
COPY_GB_PER_SECOND = 10.0  # 1e9 bytes/s from a card to host memory, over PCIe 4.0 x8
GENESIS_STEPS = 15_955  # of the whole run, for the hours at the end

# ==== Runs ====

FOLDER = common.WORK / "gpu"
OURS = {  # name -> flags of sft_v1.py
    "its own choices": {},
    "a save in mid-run": {"save_every": 8, "max_steps": 12},
    "compile off": {"compile": "off"},
    "checkpointing on": {"activation_checkpointing": "on"},
    "per micro-batch": {"communicate": "per_micro_batch"},
    "deterministic": {"deterministic": "on"},
    "deterministic, again": {"deterministic": "on"},
}
FORMS = {"tokens_per_s": ",.0f", "mfu": ".1%", "allocated_gib": ".1f", "reserved_gib": ".1f"}


def links(size):
    """Return link_speed.py's figures."""
    chosen = {"--device": size["device"], "--parameters": size["block"]}
    command = (*common.TORCHRUN, size["ranks"], "benchmarks/link_speed.py", *common.flags(chosen))
    printed = common.run(*command, timeout=ROW_SECONDS)
    return json.loads(next(line for line in printed.splitlines() if line.startswith('{"gather')))


def ours(size, chosen):
    """Return the figures (dict) of a run of sft_v1.py with the flags `chosen` over its own choices."""
    auto = {"activation_checkpointing": "auto", "communicate": "auto", "compile": sft_v1.COMPILE}
    auto["device"] = size["device"]
    auto |= {"sequences_per_step": size["sequences"], "tokens_per_micro_batch": size["tokens_per_micro_batch"]}
    auto |= {"keep_checkpoints": 1, "max_steps": size["steps"]} | chosen
    with tempfile.TemporaryDirectory(dir=common.WORK) as output:
        arguments = common.trainer_arguments(FOLDER / "data", FOLDER / "base", output, size["steps"], **auto)
        env = {"OMP_NUM_THREADS": str(max(1, common.CORES // size["ranks"]))}
        command = (*common.TORCHRUN, size["ranks"], "sft_v1.py", *arguments)
        printed = common.run(*command, env=env, timeout=ROW_SECONDS)
        lines, record = common.steps_of(output), system.read_json(Path(output) / "run.json")
    timed, stalls = lines[len(lines) // 2 :], [float(seconds) for _, seconds in save.SAVED.findall(printed)]
    figures = {
        "ranks": size["ranks"],
        "step_seconds": statistics.fmean(line["step_seconds"] for line in timed),
        "tokens_per_s": sum(line["tokens"] for line in timed) / sum(line["step_seconds"] for line in timed),
        "mfu": statistics.fmean(line["mfu"] for line in timed),
        "curve": [(line["loss"], line["grad_norm"]) for line in lines],
        "stall_s": statistics.median(stalls[:-1]) if len(stalls) > 1 else None,  # training always waits for the last
        "plan": memory_plan.Plan(**record["plan"]),
    }
    for name in ("allocated_gib", "reserved_gib"):
        figures[name] = max((line[name] for line in lines if line.get(name)), default=None)
    return figures


def peer(size, recipe, checkpointing):
    """Return the figures of a run of peer_train.py: TRL on all cards, the padded recipe on one."""
    ranks = size["ranks"] if recipe == "trl" else 1
    chosen = {
        "--recipe": recipe,
        "--data-dir": FOLDER / "data",
        "--resized-model": FOLDER / "base",
        "--steps": size["steps"],
        "--accumulation": size["sequences"] // 2 // ranks,
        "--pad-to": size["cut"],
        "--device": size["device"],
    }
    python = common.PEERS / "bin" / "python" if recipe == "trl" else sys.executable
    figures = common.peer(python, ranks, chosen, *["--checkpointing"] * checkpointing, timeout=ROW_SECONDS)
    seconds = figures["step_seconds"][size["steps"] // 2 :]
    speed = sum(size["lengths"][size["steps"] // 2 * size["sequences"] :]) / sum(seconds)
    return {"ranks": ranks, "tokens_per_s": speed, "allocated_gib": figures["peak_gib"]}


def contenders(size):
    """Yield (name, function that returns the figures) of every run."""
    names = list(OURS)[:2] if QUICK else OURS
    for name in names:
        chosen = dict(OURS[name])
        if QUICK and "save_every" in chosen:
            chosen = {"save_every": 2}
        yield name, lambda chosen=chosen: ours(size, chosen)
    if not PEERS:
        return
    recipes = ["padded", "trl"] if (common.PEERS / "bin" / "python").exists() else ["padded"]
    for recipe, on in itertools.product(recipes, (False, True)):
        yield f"{recipe}, checkpointing {'on' if on else 'off'}", lambda r=recipe, c=on: peer(size, r, c)


def attempt(name, function):
    """Return function()'s figures (dict), or {"failed": why} if its process failed or took too long."""
    print(f"{name} ...", flush=True)
    try:
        return function()
    except subprocess.TimeoutExpired:
        reason = f"not finished after {ROW_SECONDS} s"
    except SystemExit as error:
        words = str(error)
        print(words[-1500:], flush=True)
        reason = "memory ran out" if "out of memory" in words.lower() else "see above"
    return {"failed": reason}


# ==== The plan against the measurement ====


def bound_by_count(size, link):
    """Return the bound of MFU that symbolic_gpu.py counts for two RTX 4090 at `link` GB/s, or None for others."""
    if link is None or size["ranks"] != 2 or "RTX 4090" not in size["card"]:
        return None
    printed = common.run(sys.executable, "benchmarks/symbolic_gpu.py", timeout=ROW_SECONDS)
    pairs = re.findall(r"mfu_bound_(\d+)=([\d.]+)", printed.splitlines()[-1])
    speeds, bounds = zip(*sorted((float(speed), float(bound)) for speed, bound in pairs), strict=True)
    return float(np.interp(link, speeds, bounds))


def shown(value, form):
    """Return a figure as text; a text as it is."""
    if value is None:
        return "unknown"
    return value if isinstance(value, str) else format(value, form)


def comparison(size, rows):
    """Yield the lines of the table of the plan against the measurement. rows: {name: figures}."""
    first, saving, link = rows["its own choices"], rows["a save in mid-run"], rows["links"]
    plan, speeds = first.get("plan"), (link.get("gather_gb_per_s"), link.get("reduce_gb_per_s"))
    slower = min((speed for speed in speeds if speed), default=None)
    bound = attempt("the bound by count", lambda: {"mfu": bound_by_count(size, slower)})
    reserved = plan.total / memory_plan.GIB if plan else None
    allocated = (plan.total - plan.gaps) / memory_plan.GIB if plan else None
    copy = (plan.masters + plan.moments) / 1e9 / COPY_GB_PER_SECOND if plan else None
    planned = {
        "tokens/s": (float(sft_v1.EXPECTED_TOKENS_PER_SECOND), first.get("tokens_per_s"), ",.0f"),
        "MFU": (bound.get("mfu"), first.get("mfu"), ".1%"),
        "allocated on a card, GiB": (allocated, first.get("allocated_gib"), ".1f"),
        "reserved on a card, GiB": (reserved, first.get("reserved_gib"), ".1f"),
        "gather, GB/s": ("6 to 22", speeds[0], ".2f"),
        "reduction, GB/s": ("6 to 22", speeds[1], ".2f"),
        "a save stops training, s": (copy, saving.get("stall_s"), ".2f"),
    }
    yield "| | planned | measured |\n|---|---:|---:|"
    for name, (plan_says, measured, form) in planned.items():
        yield f"| {name} | {shown(plan_says, form)} | {shown(measured, form)} |"


def table(rows):
    """Yield the lines of the table of all runs. rows: {name: figures}."""
    yield "| run | ranks | tokens/s | MFU | allocated, GiB | reserved, GiB |\n|---|---:|---:|---:|---:|---:|"
    for name, figures in rows.items():
        if "failed" in figures:
            yield f"| {name} | failed: {figures['failed']} | | | | |"
        elif "tokens_per_s" in figures:
            cells = [shown(figures.get(key), form) for key, form in FORMS.items()]
            yield f"| {name} | {figures['ranks']} | {' | '.join(cells)} |"


# ==== Main ====


def sizes():
    """Return what this machine is measured with (dict). Raises: SystemExit without a CUDA GPU, or with too few."""
    shape = common.TINY if QUICK else common.GENESIS
    size = {"steps": STEPS, "sequences": SEQUENCES_PER_STEP, "device": "cuda", "tokens_per_micro_batch": 0}
    size |= {"block": 29_000_000, "shape": shape, "cut": shape["max_position_embeddings"]}
    if QUICK:
        size |= {"steps": 4, "sequences": 8, "device": "cpu", "tokens_per_micro_batch": 256, "block": 100_000}
        return size | {"ranks": RANKS or 2, "card": "CPU"}
    system.choose_device("cuda", "--quick tries the benchmark itself there")
    cards = torch.cuda.device_count()
    if cards < RANKS:
        raise SystemExit(f"RANKS is {RANKS}, and this machine has {cards} GPUs. Lower it.")
    return size | {"ranks": RANKS or cards, "card": torch.cuda.get_device_name()}


def per_rank(figures):
    return figures["tokens_per_s"] / figures["ranks"]


def summary(rows):
    """Return the figures of the RESULT line; None is unknown. rows: {name: figures}."""
    first, twice = rows["its own choices"], [rows.get(name, {}) for name in ("deterministic", "deterministic, again")]
    figures = {name: first.get(name) for name in FORMS}
    figures |= {name: rows["links"].get(name) for name in ("gather_gb_per_s", "reduce_gb_per_s")}
    figures["save_stall_s"] = rows["a save in mid-run"].get("stall_s")
    figures["mfu_checkpointing"] = rows.get("checkpointing on", {}).get("mfu")
    if all("curve" in run for run in twice):
        figures["deterministic"] = twice[0]["curve"] == twice[1]["curve"]
    for recipe in ("trl", "padded"):
        speeds = [per_rank(run) for name, run in rows.items() if name.startswith(recipe) and "failed" not in run]
        figures[f"{recipe}_ratio"] = per_rank(first) / max(speeds) if speeds and "failed" not in first else None
    figures["failed"] = sum("failed" in run for run in rows.values())
    return figures


def main(args):
    """Measure all runs, print both tables and the RESULT line."""
    size = sizes()
    common.machine()
    size["lengths"] = common.genesis_lengths(size["steps"] * size["sequences"], size["cut"])
    common.in_child(common.write_inputs, FOLDER, size["shape"], size["lengths"])
    rows = {"links": attempt("links", lambda: links(size))}
    for name, function in contenders(size):
        rows[name] = attempt(name, function)
    known = rows["its own choices"]
    for figures in rows.values():
        if "tokens_per_s" in figures and "mfu" not in figures and "mfu" in known:
            figures["mfu"] = known["mfu"] * per_rank(figures) / per_rank(known)
    print("\n".join([*table(rows), "", *comparison(size, rows)]), flush=True)
    if "step_seconds" in known:
        hours = known["step_seconds"] * GENESIS_STEPS / 3600
        print(f"\nAt this speed {GENESIS_STEPS:,} steps take {hours:.1f} h.", flush=True)
    result = {}
    for name, value in summary(rows).items():
        result[name] = "unknown" if value is None else round(value, 3) if isinstance(value, float) else value
    common.result(**result)


if __name__ == "__main__":
    main(settings.from_flags(globals()))
