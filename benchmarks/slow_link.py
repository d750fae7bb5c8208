"""What does communication once per step save where the link is slow? Two ranks in two network namespaces.

    python benchmarks/slow_link.py            about 3 minutes on two CPU cores; needs Linux, root, ip and tc
    python benchmarks/slow_link.py --quick    one round of 3 steps each, for a look

A veth pair joins the namespaces; `tc tbf` limits it in both directions to a rate at which a micro-batch's compute and
its traffic are to each other as they are for Genesis 1B on two RTX 4090s without peer-to-peer (GENESIS below):

    link       2 ranks shard 1.0e9 parameters. In each micro-batch a rank receives the other's half twice in bfloat16
               (forward, backward) and sends half of the gradients in float32: 1.0e9 x (2 x 2 + 4) / 2 = 4 GB each way,
               at 8 GB/s through host memory (PCIe 4.0 x8 each, two copies; an assumption) 0.50 s
    compute    2 sequences of 716 tokens at 9,500 tokens/s a GPU, its pretraining speed: 0.15 s

compute_to_link is 0.30. Here compute is the step of a once-per-step run without a limit, divided by its micro-batches;
traffic is what the kernel counts at the veth in a per-micro-batch step (gloo sends more than the formula). The limit
follows from the first of each. Then, in each round, compute is measured again without the limit, and both ways
train on the limited link. once_per_step_ratio is that of their median steps; compute_to_link is the one that was met.
"""

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys

import common

from sft import settings

# ---- Runs ----
ROUNDS = 2  # of both ways of communication in turn; the median of all timed steps counts
STEPS = 5  # optimizer steps of a run; the first is not timed
QUICK = False  # one round of 3 steps
# ---- Genesis on two RTX 4090s ----
PARAMETERS = 1.0e9  # number
LINK_GB_PER_SECOND = 8.0  # 1e9 bytes/s in each direction through host memory; 6 to 10 are seen
GPU_TOKENS_PER_SECOND = 9_500.0  # of one GPU
TOKENS_PER_MICRO_BATCH = 1432.0  # the recipe's 2 sequences at the mean length
# ---- Here ----
ACCUMULATION = 8  # micro-batches per rank and step
LENGTH = 128  # tokens of every sequence; 2 are a micro-batch

# ==== Two namespaces ====

FOLDER = common.WORK / "slow_link"
SHAPE = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8, "vocab_size": 5120}  # 14.6M parameters
SHAPE |= {"num_attention_heads": 6, "num_key_value_heads": 2, "tie_word_embeddings": True}
NAMES = [f"sft{os.getpid()}_{rank}" for rank in (0, 1)]
ADDRESSES = ("10.213.77.1", "10.213.77.2")  # seen in the two namespaces alone
LINK, PORT = "veth0", 29_511  # in both namespaces; on rank 0


def refuse():
    """Raise SystemExit where no network namespaces can be made."""
    missing = [tool for tool in ("ip", "tc") if not shutil.which(tool)]
    if sys.platform != "linux" or missing or os.geteuid():
        seen = f"{sys.platform}, user {os.geteuid()}"
        if missing:
            seen = f"no {' and no '.join(missing)}"
        raise SystemExit(f"slow_link.py makes network namespaces: it needs Linux, root, ip and tc. Here: {seen}.")


def join_namespaces():
    """Make two namespaces joined by a veth pair, named LINK in both."""
    for name in NAMES:
        common.run("ip", "netns", "add", name)
        common.run("ip", "-n", name, "link", "set", "lo", "up")
    ends = (("name", LINK, "netns", name) for name in NAMES)
    common.run("ip", "link", "add", *next(ends), "type", "veth", "peer", *next(ends))
    for name, address in zip(NAMES, ADDRESSES, strict=True):
        common.run("ip", "-n", name, "address", "add", f"{address}/24", "dev", LINK)
        common.run("ip", "-n", name, "link", "set", LINK, "up")


def limit(bytes_per_second):
    """Limit both directions of the link; None ends the limit."""
    if bytes_per_second is None:
        for name in NAMES:
            common.run("tc", "-n", name, "qdisc", "delete", "dev", LINK, "root")
        return
    bits = round(8 * bytes_per_second)
    burst = max(bits // 8 // 50, 2 * 65_536)  # 20 ms, and at least two of the kernel's large segments
    for name in NAMES:
        shaping = ("root", "tbf", "rate", f"{bits}bit", "burst", burst, "latency", "200ms")
        common.run("tc", "-n", name, "qdisc", "replace", "dev", LINK, *shaping)


def remove_namespaces():
    for name in NAMES:
        subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def sent():
    """Return the bytes that the kernel has sent over the link, the larger of both directions."""
    shown = [common.run("ip", "-json", "-statistics", "-n", name, "link", "show", LINK) for name in NAMES]
    return max(json.loads(text)[0]["stats64"]["tx"]["bytes"] for text in shown)


# ==== Runs ====


def train(communicate, steps):
    """Train on both ranks, each in its namespace; return (seconds of each step but the first, bytes sent per step)."""
    output, logs, ranks = FOLDER / "run", [], []
    shutil.rmtree(output, ignore_errors=True)
    size = {"sequences_per_step": 4 * ACCUMULATION, "tokens_per_micro_batch": 2 * LENGTH, "communicate": communicate}
    arguments = common.trainer_arguments(FOLDER / "data", FOLDER / "base", output, steps, **size)
    before = sent()
    for rank, name in enumerate(NAMES):
        # As torchrun would start two ranks of one machine: sharded over both.
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "GROUP_WORLD_SIZE": 1}
        variables |= {"GROUP_RANK": 0, "MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": PORT, "GLOO_SOCKET_IFNAME": LINK}
        variables |= {"OMP_NUM_THREADS": 1}
        environment = os.environ | common.OFFLINE | {key: str(value) for key, value in variables.items()}
        logs.append(FOLDER / f"rank_{rank}.log")
        command = ["ip", "netns", "exec", name, sys.executable, "sft_v1.py", *arguments]
        with logs[-1].open("w") as log:
            ranks.append(subprocess.Popen(command, cwd=common.ROOT, env=environment, stdout=log, stderr=log))
    try:
        failed = [rank.wait() for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    if any(failed):
        raise SystemExit("".join(f"{log}:\n{log.read_text()[-2000:]}\n" for log in logs))
    traffic = (sent() - before) / steps
    lines = common.steps_of(output)
    shutil.rmtree(output)
    if any(line["micro_batches"] != ACCUMULATION for line in lines):
        raise SystemExit(f"A step has {lines[0]['micro_batches']} micro-batches per rank, not {ACCUMULATION}.")
    seconds = [line["step_seconds"] for line in lines[1:]]
    print(f"{communicate}: {statistics.median(seconds):.2f} s a step, {traffic / 1e6:.0f} MB each way", flush=True)
    return seconds, traffic


def main(args):
    """Make the link, find its rate, race both ways, print the RESULT line."""
    refuse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the namespaces are removed then, too
    steps = 3 if QUICK else STEPS
    common.machine()
    gigabytes = PARAMETERS * (2 * 2 + 4) / 2 / 1e9
    link, worked = gigabytes / LINK_GB_PER_SECOND, TOKENS_PER_MICRO_BATCH / GPU_TOKENS_PER_SECOND
    wanted = worked / link
    print(f"Genesis, 2x RTX 4090, a micro-batch: {gigabytes:.1f} GB each way in {link:.2f} s, compute {worked:.2f} s")
    common.in_child(common.write_inputs, FOLDER, SHAPE, [LENGTH] * 4 * ACCUMULATION * steps)
    try:
        join_namespaces()
        print("no limit:")
        compute = train("per_step", steps)[0]
        _, traffic = train("per_micro_batch", steps)
        rate = traffic * wanted / statistics.median(compute)
        seconds = {"per_micro_batch": [], "per_step": []}
        for number in range(1 if QUICK else ROUNDS):
            if number:
                limit(None)
                print("no limit:")
                compute += train("per_step", steps)[0]
            limit(rate)
            print(f"link limited to {rate / 1e6:.1f} MB/s each way:")
            for communicate, measured in seconds.items():
                measured += train(communicate, steps)[0]
    finally:
        remove_namespaces()
    middle = {communicate: statistics.median(measured) for communicate, measured in seconds.items()}
    common.result(
        once_per_step_ratio=round(middle["per_micro_batch"] / middle["per_step"], 2),
        compute_to_link=round(statistics.median(compute) / (traffic / rate), 2),
    )


if __name__ == "__main__":
    main(settings.from_flags(globals()))
