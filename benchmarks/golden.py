"""Do sft_v1.py and TRL follow the same loss curve? Stored in golden.json, with which tests/test_golden.py compares.

    python benchmarks/golden.py            about 45 minutes on two CPU cores; writes golden.json and golden.png
    python benchmarks/golden.py --quick    a few steps, for a look; writes neither

The demo's model (SmolLM2-135M) is fine-tuned on the demo's conversations, from the same weights, on the same sequences
in the same steps at the same learning rates, a warm-up and a cosine. Every run has float32 weights and moments; its
forward and backward compute in float32 or in bfloat16:

ours    sft_v1.py under torchrun, two gloo ranks
TRL     SFTTrainer in .venv-benchmarks, MICRO_BATCH sequences per forward, padded to the longest of them

loss_gap is the largest relative difference of a step's loss between the two, mean_gap its mean over the steps;
dtype_gap is the largest between ours in bfloat16 and in float32. In bfloat16 the trainers round differently: ours
computes all of a block in bfloat16, TRL's autocast only the matmuls. WEIGHT_DECAY is far above the recipe's, so that
the first steps show what it falls on.

The losses do not depend on time: the machine may do other work. Writes benchmarks/work/golden/.
"""

import hashlib
import importlib.metadata
import itertools
import json
import shutil
from pathlib import Path

import common
import numpy as np

from sft import settings, system

# ---- Size ----
STEPS = 200  # optimizer steps
QUICK = False  # WARMUP_STEPS + 1 steps
# ---- Training ----
SEQUENCES_PER_STEP = 4  # sequences
MAX_SEQ_LEN = 192  # tokens; a longer conversation is cut
LEARNING_RATE = 2e-4  # peak
MIN_LEARNING_RATE = 2e-5  # end of the cosine
WARMUP_STEPS = 3  # optimizer steps; up to the one after them a shorter run has the same rates
WEIGHT_DECAY = 1.0  # decoupled, on matrices and embeddings
MICRO_BATCH = 2  # sequences per forward of TRL
SHUFFLE_SEED = 0  # of the conversations' order

# ==== Inputs ====

GOLDEN = Path(__file__).with_name("golden.json")
DTYPES = ("float32", "bfloat16")
OURS, TRL = CONTENDERS = ("ours", "TRL")
RECIPE = (
    *("STEPS", "SEQUENCES_PER_STEP", "MAX_SEQ_LEN", "LEARNING_RATE", "MIN_LEARNING_RATE", "WARMUP_STEPS"),
    *("WEIGHT_DECAY", "MICRO_BATCH", "SHUFFLE_SEED"),
)


def recipe():
    """Return the settings (dict) that a curve depends on."""
    return {name: globals()[name] for name in RECIPE}


def prepare(folder):
    """Write folder/prepared and folder/base from the demo's conversations and model, with the suite's own scripts.

    Returns: the sequences of STEPS steps, in order, [(int64 ids, bool mask)]; the conversations repeat.
    """
    import datasets

    folders = folder / "prepared", folder / "base"
    common.prepare("demo/mixture.json", *folders, MAX_SEQ_LEN, *common.DECONTAMINATION_OFF)
    rows = datasets.load_from_disk(folder / "prepared")["train"].shuffle(seed=SHUFFLE_SEED).with_format("numpy")
    rows = [(row["input_ids"].astype(np.int64), row["assistant_masks"]) for row in rows]
    return list(itertools.islice(itertools.cycle(rows), STEPS * SEQUENCES_PER_STEP))


def describe(rows):
    """Return what identifies the sequences `rows` (dict): their numbers, and a SHA-256 over ids and masks in order."""
    digest = hashlib.sha256()
    for ids, mask in rows:
        digest.update(len(ids).to_bytes(8, "little") + ids.astype("<i8").tobytes() + mask.astype("u1").tobytes())
    return {
        "sequences": len(rows),
        "tokens": sum(len(ids) for ids, _ in rows),
        "trainable_tokens": sum(int(mask[1:].sum()) for _, mask in rows),
        "sha256": digest.hexdigest(),
    }


def write_steps(folder, rows, steps):
    """Write folder/steps, on which a run of `steps` steps trains: the first of `rows`."""
    vocabulary = json.loads((folder / "prepared" / "report.json").read_text())["vocab_size"]
    rows = rows[: steps * SEQUENCES_PER_STEP]
    common.write_data(folder / "steps", rows, vocabulary, folder / "prepared" / "tokenizer", MAX_SEQ_LEN)


# ==== Curves ====


def ours(folder, dtype, steps):
    """Return the loss of each of `steps` steps of sft_v1.py on folder/steps, on two ranks with a thread each."""
    chosen = {"learning_rate": LEARNING_RATE, "min_learning_rate": MIN_LEARNING_RATE, "warmup_steps": WARMUP_STEPS}
    chosen |= {"weight_decay": WEIGHT_DECAY, "sequences_per_step": SEQUENCES_PER_STEP, "compute_dtype": dtype}
    chosen |= {"tokens_per_micro_batch": SEQUENCES_PER_STEP * MAX_SEQ_LEN, "device": "cpu", "prompts": ""}
    lines = common.train(folder / "steps", folder / "base", 2, 1, steps, **chosen)
    return [line["loss"] for line in lines]


def trl(folder, dtype, steps):
    """Return the loss of each of `steps` steps of TRL on folder/steps, in one process."""
    chosen = {
        "--data-dir": folder / "steps",
        "--resized-model": folder / "base",
        "--steps": steps,
        "--micro-batch": MICRO_BATCH,
        "--accumulation": SEQUENCES_PER_STEP // MICRO_BATCH,
        "--learning-rate": LEARNING_RATE,
        "--min-learning-rate": MIN_LEARNING_RATE,
        "--warmup-steps": WARMUP_STEPS,
        "--weight-decay": WEIGHT_DECAY,
        "--pad-to": MAX_SEQ_LEN,
        "--compute-dtype": dtype,
    }
    return common.peer(common.peers_python(), 1, chosen)["losses"]


def measure(folder, steps):
    """Run all contenders in both dtypes, one after the other; return {"float32: TRL": losses, ...}."""
    curves = {}
    for dtype in DTYPES:
        for name in CONTENDERS:
            losses = (ours if name == OURS else trl)(folder, dtype, steps)
            curves[f"{dtype}: {name}"] = [round(loss, 6) for loss in losses]
            shown = " ".join(f"{loss:.4f}" for loss in (losses[0], *losses[9::10], losses[-1]))
            print(f"{dtype}: {name}: {shown}", flush=True)
    return curves


# ==== Comparison ====


def gaps(losses, reference):
    """Return the relative difference of each step's loss, a float64 array, from a curve of as many steps."""
    return np.abs(np.subtract(losses, reference) / reference)


def figures(curves):
    """Return how far the curves of `measure` lie apart (dict), as the docstring of this file says."""
    values = {}
    for dtype in DTYPES:
        between = gaps(*(curves[f"{dtype}: {name}"] for name in CONTENDERS))
        values[f"loss_gap_{dtype}"], values[f"mean_gap_{dtype}"] = between.max(), between.mean()
    values["dtype_gap"] = gaps(*(curves[f"{dtype}: {OURS}"] for dtype in reversed(DTYPES))).max()
    return {name: float(f"{value:.2g}") for name, value in values.items()}


def draw(curves, path):
    """Draw the curves of ours and TRL and, below, their relative difference, as the PNG file `path`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    above, below = figure.subplots(2, sharex=True, height_ratios=(3, 2))
    for dtype, color in zip(DTYPES, ("tab:blue", "tab:orange"), strict=True):
        losses, peer = curves[f"{dtype}: {OURS}"], curves[f"{dtype}: {TRL}"]
        steps = range(1, len(losses) + 1)
        above.plot(steps, losses, color=color, linewidth=1, label=f"sft_v1.py, {dtype}")
        above.plot(steps, peer, ".", color=color, markersize=3, label=f"TRL, {dtype}")
        below.semilogy(steps, gaps(losses, peer), color=color, linewidth=1, label=dtype)
    above.set(ylabel="cross-entropy per trainable token (nats)")
    below.set(xlabel="optimizer step", ylabel="relative difference")
    above.legend()
    below.legend()
    figure.savefig(path, dpi=120)


# ==== Main ====


def cpu_flags():
    """Return the vector and matrix instructions of this CPU, sorted; [] where /proc/cpuinfo names none."""
    lines = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")]
    return sorted(flag for flag in (lines or [""])[0].split() if flag.startswith(("avx", "amx", "fma")))


def peer_versions():
    """Return {package: version} of the packages in .venv-benchmarks that train."""
    (library,) = common.PEERS.glob("lib/python*/site-packages")
    wanted = {"trl", "transformers", "accelerate", "torch"}
    found = importlib.metadata.distributions(path=[str(library)])
    return {package.name: package.version for package in found if package.name in wanted}


def store(record, path):
    """Write the dict `record` as JSON, a line for each of its keys."""
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in record.items())
    system.write_whole(path, f"{{\n{lines}\n}}\n")


def main(args):
    """Train all contenders, store and draw their curves, print the RESULT line."""
    record = {"machine": common.machine() | {"cpu_flags": cpu_flags()}}
    common.peers_python()
    record["peer_versions"] = peer_versions()
    folder, steps = common.WORK / "golden", WARMUP_STEPS + 1 if QUICK else STEPS
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rows = prepare(folder)
    record |= {"settings": recipe(), "data": describe(rows)}
    print("data:", json.dumps(record["data"]), flush=True)
    write_steps(folder, rows, steps)
    curves = measure(folder, steps)
    if not QUICK:
        store(record | curves, GOLDEN)
        draw(curves, GOLDEN.with_suffix(".png"))
    common.result(steps=steps, **figures(curves))


if __name__ == "__main__":
    main(settings.from_flags(globals()))
