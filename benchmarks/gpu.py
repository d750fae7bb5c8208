"""What does one GPU do with Genesis 1B's shape? tokens/s, MFU and peak memory, against TRL and the padded recipe.

    python benchmarks/gpu.py            needs a CUDA GPU; without 48 GB some rows will say that memory ran out
    python benchmarks/gpu.py --quick    a tiny shape on the CPU, to see that the benchmark itself runs

Random weights, 32 generated sequences per step with the lengths of Genesis's data (mean 716, cut at 2048), bfloat16
compute with float32 weights and moments. sft_v1.py under torchrun with torch.compile on and off and activation
checkpointing on and off; the peers of peer_train.py with checkpointing on and off: TRL (if .venv-benchmarks exists;
train.py makes it) and the plain padded recipe, both at micro-batch 2 x accumulation 16. The second half of each run's
steps is timed, and only real tokens count. MFU is the trainer's own; a peer's follows from its tokens/s, since the
sequences are the same. RESULT has the best run of each kind. Reads and writes benchmarks/work/.
"""

import itertools
import sys

import common
import torch

from sft import settings

# ---- Runs ----
STEPS = 20  # optimizer steps of a run
SEQUENCES_PER_STEP = 32  # sequences
TOKENS_PER_MICRO_BATCH = 0  # of ours; 0 = the trainer's own choice
QUICK = False  # a tiny shape on the CPU, 4 steps of 8 sequences

# ==== Runs ====

FOLDER = common.WORK / "gpu"


def ours(size, compiled, checkpointing):
    """Return {"seconds": list, "peak_gib", "mfu"} of a run of sft_v1.py; MFU and memory if the trainer reports them."""
    chosen = {"compile": compiled, "activation_checkpointing": checkpointing, "device": size["device"]}
    chosen |= {"sequences_per_step": size["sequences"], "tokens_per_micro_batch": size["tokens_per_micro_batch"]}
    lines = common.train(FOLDER / "data", FOLDER / "base", 1, common.CORES, size["steps"], **chosen)
    timed = lines[len(lines) // 2 :]
    shares = [line["mfu"] for line in timed if line.get("mfu")]
    peaks = [line["peak_gib"] for line in lines if line.get("peak_gib")]
    return {
        "seconds": [line["step_seconds"] for line in lines],
        "peak_gib": max(peaks, default=None),
        "mfu": sum(shares) / len(shares) if shares else None,
    }


def peer(size, python, recipe, checkpointing):
    """Return {"seconds": list, "peak_gib", "mfu": None} of a run of peer_train.py."""
    chosen = {
        "--recipe": recipe,
        "--data-dir": FOLDER / "data",
        "--resized-model": FOLDER / "base",
        "--steps": size["steps"],
        "--accumulation": size["sequences"] // 2,
        "--pad-to": size["cut"],
        "--device": size["device"],
    }
    further = ["--checkpointing"] * (checkpointing == "on")
    figures = common.peer([python], common.CORES, chosen, *further)
    return {"seconds": figures["step_seconds"], "peak_gib": figures["peak_gib"], "mfu": None}


def contenders(size):
    """Yield (kind, name, checkpointing, function) of every run."""
    for compiled, checkpointing in itertools.product(("on", "off"), ("off", "on")):
        yield "ours", f"ours, compile {compiled}", checkpointing, lambda c=compiled, k=checkpointing: ours(size, c, k)
    pythons = {"padded": sys.executable, "trl": common.PEERS / "bin" / "python"}
    for (recipe, python), checkpointing in itertools.product(pythons.items(), ("off", "on")):
        if recipe != "trl" or python.exists():
            yield recipe, recipe, checkpointing, lambda p=python, r=recipe, k=checkpointing: peer(size, p, r, k)


# ==== Main ====


def measure(size, lengths):
    """Run every contender; return a list of its figures, without those that failed."""
    timed = sum(lengths[size["steps"] // 2 * size["sequences"] :])
    rows = []
    for kind, name, checkpointing, function in contenders(size):
        try:
            figures = function()
        except SystemExit as error:
            words = str(error)
            reason = "memory ran out" if "out of memory" in words.lower() else words[-1500:]
            print(f"{name}, checkpointing {checkpointing}: failed, {reason}", flush=True)
            continue
        figures["tokens_per_s"] = timed / sum(figures["seconds"][size["steps"] // 2 :])
        rows.append({"kind": kind, "name": name, "checkpointing": checkpointing} | figures)
    known = next((figures for figures in rows if figures["mfu"]), None)
    for figures in rows:
        if known and not figures["mfu"]:
            figures["mfu"] = known["mfu"] * figures["tokens_per_s"] / known["tokens_per_s"]
    return rows


def table(rows):
    """Return the lines of a Markdown table."""
    yield "| run | checkpointing | tokens/s | MFU | peak memory, GiB |\n|---|---|---:|---:|---:|"
    for figures in rows:
        mfu = f"{figures['mfu']:.1%}" if figures["mfu"] else "unknown"
        peak = f"{figures['peak_gib']:.1f}" if figures["peak_gib"] else "unknown"
        yield f"| {figures['name']} | {figures['checkpointing']} | {figures['tokens_per_s']:,.0f} | {mfu} | {peak} |"


def main(args):
    """Measure on the GPU, print the table and the RESULT line."""
    if not QUICK and not torch.cuda.is_available():
        raise SystemExit("gpu.py measures a CUDA GPU, and torch sees none. --quick tries the benchmark on the CPU.")
    shape = common.TINY if QUICK else common.GENESIS
    size = {"steps": 4, "sequences": 8} if QUICK else {"steps": STEPS, "sequences": SEQUENCES_PER_STEP}
    size |= {"device": "cpu" if QUICK else "cuda", "cut": shape["max_position_embeddings"]}
    size["tokens_per_micro_batch"] = 256 if QUICK else TOKENS_PER_MICRO_BATCH
    common.machine()
    lengths = common.genesis_lengths(size["steps"] * size["sequences"], size["cut"])
    common.in_child(common.write_inputs, FOLDER, shape, lengths)
    rows = measure(size, lengths)
    print("\n".join(table(rows)), flush=True)
    best = {}
    for figures in sorted(rows, key=lambda figures: figures["tokens_per_s"]):
        best[figures["kind"]] = best[figures["kind"], figures["checkpointing"]] = figures
    if "ours" not in best:
        raise SystemExit("No run of sft_v1.py came to its end; see above.")
    first, speed = best["ours"], best["ours"]["tokens_per_s"]
    result = {"tokens_per_s": round(speed), "mfu": first["mfu"], "peak_gib": first["peak_gib"]}
    result["mfu_checkpointing"] = best.get(("ours", "on"), {}).get("mfu")
    for kind in ("trl", "padded"):
        result[f"{kind}_ratio"] = speed / best[kind]["tokens_per_s"] if kind in best else None
    common.result(**{key: round(value, 3) if value else "unknown" for key, value in result.items()})


if __name__ == "__main__":
    main(settings.from_flags(globals()))
