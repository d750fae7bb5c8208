"""How fast does sft_v1.py train? Against TRL, the plain padded recipe and the machine's own rate, on the same steps.

    python benchmarks/train.py            three rounds on real conversations, about an hour on two quiet CPU cores
    python benchmarks/train.py --quick    one round of 4 short sequences per step, for a look

SmolLM2-135M, bfloat16 compute with float32 weights and moments, no activation checkpointing (TRL's default is on and
would only slow it), the same sequences in the same steps at one fixed learning rate, two cores for each, in turn:

ours     sft_v1.py under torchrun: two gloo ranks with a thread each, and one rank with two; the faster one counts
TRL      SFTTrainer in .venv-benchmarks at its default, micro-batch 2 x accumulation 16, padded to the longer one
TRL best the fastest of TRL_SETTINGS whose losses are right: without padding, in one process and in two
padded   plain PyTorch at micro-batch 2, padded to 2048, logits at all positions; on sequences with the lengths of
         Genesis's data (mean 716, cut at 2048), cut from the same conversations

A run is SHORT_STEPS steps of sequences cut to SHORT_CUT tokens, for the loss curve, and LONG_STEPS whole ones; only
these are timed, and only real tokens count. A quarter of the last short step has MAX_SEQ_LEN tokens: a process gets its
memory from the kernel once in a run of hours, here before its time counts. loss_gap is the largest relative difference
of a step's loss from ours, of every contender. machine_share is our FLOP/s over the rate at which the same cores do
nothing but bfloat16 matmuls of the step's own shapes. Reads and writes benchmarks/work/.
"""

import json
import multiprocessing
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor

import common

from sft import settings

# ---- Size ----
ROUNDS = 3  # all in turn, after the first only the best of ours and of TRL; the medians of the rounds' ratios count
PADDED_ROUNDS = 1  # of ours and padded on Genesis's lengths, the slowest part, in the first rounds
SHORT_STEPS = 2  # optimizer steps before the timed ones
SHORT_CUT = 64  # tokens
LONG_STEPS = 1  # timed optimizer steps
CONVERSATIONS = 1500  # of ShareGPT that are prepared; the steps are drawn from them
QUICK = False  # one round, 4 sequences of at most 256 tokens per step
MATMUL_SECONDS = 0.2  # for which each shape is timed
# ---- What is trained ----
SEQUENCES_PER_STEP = 32  # sequences
MAX_SEQ_LEN = 2048  # tokens
TOKENS_PER_MICRO_BATCH = 4096  # of ours; 8192 would need 16 GB in two ranks

# ==== Contenders ====

FOLDER = common.WORK / "train"
OURS = {"ours, 2 ranks": (2, 1), "ours, 1 rank": (1, 2)}  # (ranks, threads of each)
TRL_DEFAULT = "TRL"
TRL_SETTINGS = {  # (processes, sequences per forward, further flags)
    TRL_DEFAULT: (1, 2, []),
    "TRL, micro-batch 1": (1, 1, []),
    "TRL, micro-batch 1, 2 processes": (2, 1, []),
}
LARGEST_GAP = 0.01  # of a loss, relative, up to which a contender does the same training


def ours(data, size, ranks, threads):
    """Return the lines of a run of sft_v1.py."""
    budget = {"tokens_per_micro_batch": TOKENS_PER_MICRO_BATCH, "sequences_per_step": size["sequences"]}
    return common.train(data, FOLDER / "base", ranks, threads, size["steps"], **budget)


def peer(python, data, size, processes, micro_batch, further):
    """Return the figures of a run of peer_train.py."""
    chosen = {
        "--data-dir": data,
        "--resized-model": FOLDER / "base",
        "--steps": size["steps"],
        "--micro-batch": micro_batch,
        "--accumulation": size["sequences"] // micro_batch // processes,
        "--pad-to": size["cut"],
        "--short-cut": SHORT_CUT,
    }
    return common.peer(python, processes, chosen, *further)


# ==== Inputs ====


def prepare():
    """Write FOLDER/prepared and FOLDER/base with the suite's own scripts."""
    source = {"name": "sharegpt", "schema": "conversations", "examples": CONVERSATIONS, "path": str(common.sharegpt())}
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "mixture.json").write_text(json.dumps([source]))
    for old in ("prepared", "base"):
        shutil.rmtree(FOLDER / old, ignore_errors=True)
    folders = FOLDER / "prepared", FOLDER / "base"
    validation = ["--validation-conversations", 1]
    common.prepare(FOLDER / "mixture.json", *folders, MAX_SEQ_LEN, *validation, *common.DECONTAMINATION_OFF)


def write_steps(size):
    """Write FOLDER/real and FOLDER/genesis: SHORT_STEPS steps of short sequences, then LONG_STEPS whole ones, each.

    Returns: {"real" | "genesis": (lengths, trainable tokens) of the timed sequences}.
    """
    import datasets
    import numpy as np

    rows = datasets.load_from_disk(FOLDER / "prepared")["train"].shuffle(seed=0).with_format("numpy")
    rows = [(row["input_ids"].astype(np.int64), row["assistant_masks"]) for row in rows]
    rows = [(ids, mask) for ids, mask in rows if mask[1:SHORT_CUT].any()]
    n_short, n_long = size["short_steps"] * size["sequences"], LONG_STEPS * size["sequences"]
    short = [(ids[:SHORT_CUT], mask[:SHORT_CUT]) for ids, mask in rows[:n_short]]
    rows = rows[n_short:]
    stream, trained = (np.concatenate(parts) for parts in zip(*rows, strict=True))
    for number in range(size["sequences"] // 4):
        part = slice(len(stream) - (number + 1) * size["cut"], len(stream) - number * size["cut"])
        short[-size["sequences"] + number] = stream[part], trained[part]
    ends = np.cumsum(common.genesis_lengths(n_long, size["cut"]))
    cuts = list(zip(ends - np.diff(ends, prepend=0), ends, strict=True))
    steps = {
        "real": [(ids[: size["cut"]], mask[: size["cut"]]) for ids, mask in rows[:n_long]],
        "genesis": [(stream[begin:end], trained[begin:end]) for begin, end in cuts],
    }
    vocabulary = json.loads((FOLDER / "prepared" / "report.json").read_text())["vocab_size"]
    for name, timed in steps.items():
        common.write_data(FOLDER / name, short + timed, vocabulary, FOLDER / "prepared" / "tokenizer", MAX_SEQ_LEN)
    return {n: ([len(i) for i, _ in timed], sum(int(m[1:].sum()) for _, m in timed)) for n, timed in steps.items()}


# ==== The machine's own rate ====


def matmuls(config, lengths, trained, rows):
    """Return [(FLOPs, (batch, m, k, n))] of the matmuls of forward and backward of `lengths`; together all that count.

    config: config.json of the model; rows: tokens of a micro-batch. A linear layer is three matmuls. Causal attention
    is six of half the square of each length, here at the mean length of a token's sequence. The head sees `trained`.
    """
    h, i, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    heads, d = config["num_attention_heads"], config.get("head_dim") or h // config["num_attention_heads"]
    q, kv, tokens = heads * d, config["num_key_value_heads"] * d, sum(lengths)
    products = []
    for k, n in ((h, q), (h, kv), (h, kv), (q, h), (h, i), (h, i), (i, h)):
        flops = 2 * tokens * k * n * layers
        products += [(flops, (1, *shape)) for shape in ((rows, k, n), (rows, n, k), (n, rows, k))]
    chunk, vocabulary = min(trained, 1024), config["vocab_size"]
    shapes = ((chunk, h, vocabulary), (chunk, vocabulary, h), (vocabulary, chunk, h))
    products += [(2 * trained * h * vocabulary, (1, *shape)) for shape in shapes]
    squares = sum(length**2 for length in lengths)
    mean = round(squares / tokens)
    products += [(2 * squares * q * layers, (heads, mean, d, mean)), (4 * squares * q * layers, (heads, mean, mean, d))]
    return products


BARRIER = None  # where the processes of a measurement wait for each other


def wait_at(barrier):
    global BARRIER
    BARRIER = barrier


def seconds_of(shapes, threads, seconds):
    """Return {shape: seconds of one bfloat16 matmul}; runs in its own process, at the same time as the other ranks."""
    import torch

    torch.set_num_threads(threads)
    measured = {}
    for batch, m, k, n in shapes:
        left, right = (torch.randn(batch, *size, dtype=torch.bfloat16).squeeze(0) for size in ((m, k), (n, k)))
        right = right.transpose(-2, -1)  # as a linear layer has it
        left @ right
        BARRIER.wait()
        begin, calls = time.perf_counter(), 0
        while (spent := time.perf_counter() - begin) < seconds:
            left @ right
            calls += 1
        measured[batch, m, k, n] = spent / calls
    return measured


def machine_rate(work, ranks, threads, seconds):
    """Return the FLOP/s of `ranks` processes that share the matmuls of `work` and do nothing else."""
    shapes = sorted({shape for _, shape in work})
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        ranks, mp_context=context, initializer=wait_at, initargs=(context.Barrier(ranks),)
    ) as pool:
        measured = [pool.submit(seconds_of, shapes, threads, seconds) for _ in range(ranks)]
        measured = [future.result() for future in measured]

    def rate(shape):  # of all ranks together
        batch, m, k, n = shape
        return sum(2 * batch * m * k * n / times[shape] for times in measured)

    return sum(flops for flops, _ in work) / sum(flops / rate(shape) for flops, shape in work)


# ==== Rounds ====


def speed(seconds, tokens):
    """Return tokens/s of the timed steps, the last ones of `seconds`."""
    return tokens / sum(seconds[-LONG_STEPS:])


def gap(losses, reference):
    """Return the largest relative difference of two loss curves."""
    return max(abs(a / b - 1) for a, b in zip(losses, reference, strict=True))


def race(data, size, tokens, layouts, peers):
    """Run ours in `layouts`, then `peers` ({name: arguments of peer()}), on one folder.

    Returns: (tokens/s by name, loss gap by name, (name of the fastest of ours, its lines of metrics.jsonl)).
    """
    speeds, gaps, best, reference = {}, {}, None, None

    def note(name, seconds, losses):
        speeds[name], gaps[name] = speed(seconds, tokens), gap(losses, reference or losses)
        shown = " ".join(f"{loss:.4f}" for loss in losses)
        print(f"{data.name}: {name}: {speeds[name]:,.1f} tokens/s, losses {shown}", flush=True)

    for name, layout in layouts.items():
        lines = ours(data, size, *layout)
        losses = [line["loss"] for line in lines]
        note(name, [line["step_seconds"] for line in lines], losses)
        reference = reference or losses
        if speeds[name] == max(speeds.values()):
            best = name, lines
    for name, arguments in peers.items():
        figures = peer(arguments[0], data, size, *arguments[1:])
        note(name, figures["step_seconds"], figures["losses"])
    return speeds, gaps, best


def one_round(python, size, timed, layouts, trl, with_padded):
    """Measure all once, in turn; return the figures of the RESULT line and the best layout's and setting's names."""
    lengths, trained = timed["real"]
    peers = {name: (python, *setting) for name, setting in trl.items()}
    speeds, gaps, (best, lines) = race(FOLDER / "real", size, sum(lengths), layouts, peers)
    ranks, threads = OURS[best]
    config = json.loads((FOLDER / "base" / "config.json").read_text())
    work = matmuls(config, lengths, trained, round(sum(lengths) / LONG_STEPS / ranks / lines[-1]["micro_batches"]))
    machine = machine_rate(work, ranks, threads, MATMUL_SECONDS)
    reached = speeds[best] / sum(lengths) * sum(flops for flops, _ in work)
    print(f"{best}: {reached / 1e9:.1f} GFLOP/s; the machine's own rate is {machine / 1e9:.1f}", flush=True)
    right = [name for name in trl if gaps[name] <= LARGEST_GAP or name == TRL_DEFAULT]
    trl_best = max(right, key=speeds.get)
    figures = {
        "trl_ratio": speeds[best] / speeds[TRL_DEFAULT],
        "trl_best_ratio": speeds[best] / speeds[trl_best],
        "machine_share": reached / machine,
        "loss_gap": max(gaps.values()),
    }
    if with_padded:
        recipe = {"padded": (sys.executable, 1, 2, ["--recipe", "padded"])}
        speeds, gaps, _ = race(FOLDER / "genesis", size, sum(timed["genesis"][0]), layouts, recipe)
        figures["padded_ratio"] = max(speeds[name] for name in layouts) / speeds["padded"]
        figures["loss_gap"] = max(figures["loss_gap"], *gaps.values())
    return figures, best, trl_best


def main(args):
    """Fetch the inputs, measure the rounds, print the medians and the RESULT line."""
    size = {"sequences": SEQUENCES_PER_STEP, "cut": MAX_SEQ_LEN, "short_steps": SHORT_STEPS}
    if QUICK:
        size = {"sequences": 4, "cut": 256, "short_steps": 1}
    size["steps"] = size["short_steps"] + LONG_STEPS
    common.machine()
    python = common.peers_python()
    prepare()
    timed = common.in_child(write_steps, size)
    for name, (lengths, trained) in timed.items():
        print(f"{name}: {len(lengths)} timed sequences, {sum(lengths):,} tokens, {trained:,} trained", flush=True)
    measured, layouts, trl = [], OURS, TRL_SETTINGS
    for number in range(1 if QUICK else ROUNDS):
        print(f"round {number + 1} of {1 if QUICK else ROUNDS}", flush=True)
        figures, best, trl_best = one_round(python, size, timed, layouts, trl, number < PADDED_ROUNDS)
        measured.append(figures)
        layouts, trl = {best: OURS[best]}, {name: TRL_SETTINGS[name] for name in (TRL_DEFAULT, trl_best)}
    middle = common.medians(measured)
    common.result(
        **{name: round(middle[name], 2) for name in ("trl_ratio", "trl_best_ratio", "padded_ratio", "machine_share")},
        loss_gap=round(max(figures["loss_gap"] for figures in measured), 4),
    )


if __name__ == "__main__":
    main(settings.from_flags(globals()))
