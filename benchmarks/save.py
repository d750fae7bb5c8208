"""How long does a save stop training? Written beside training against written while training waits, on two CPU ranks.

    python benchmarks/save.py            about 4 minutes on two CPU cores
    python benchmarks/save.py --quick    one short round with a tiny model, for a look

Each round trains the same steps twice, with ASYNC_SAVE on and off in turn. A stall is what the trainer reports of each
save: with "on" the copy of the state (and the wait for an earlier save, if one is still being written), with "off" all
of it. The last save of a run doesn't count: training always waits for it. stall_ratio is the quotient of the median
stalls; run_ratio that of the times of all steps and stalls, for on a CPU the write takes its time from the cores that
train.
"""

import re
import shutil
import statistics
import tempfile

import common

from sft import settings

# ---- Runs ----
ROUNDS = 2  # of both ways in turn
SAVES = 5  # of each run, and one more at its end
SAVE_EVERY = 5  # optimizer steps; long enough that a write ends before the next one begins
SEQUENCES_PER_STEP = 4  # of LENGTH tokens
LENGTH = 64  # tokens
QUICK = False  # one round of 2 saves

SHAPE = common.TINY | {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "vocab_size": 8192}
SAVED = re.compile(r"^saved \S+ in ([\d.]+) s; training stood still for ([\d.]+) s$", re.MULTILINE)


def train(folder, way, saves, save_every):
    """Train one run with ASYNC_SAVE `way`; return (stalls, writes, seconds of its steps): two lists, a number."""
    output = folder / way
    arguments = common.trainer_arguments(
        folder / "data", folder / "base", output, (saves + 1) * save_every, async_save=way, save_every=save_every,
        keep_checkpoints=1, sequences_per_step=SEQUENCES_PER_STEP, compute_dtype="float32", device="cpu",
    )  # fmt: skip
    printed = common.run(*common.TORCHRUN, 2, "sft_v1.py", *arguments, env={"OMP_NUM_THREADS": "1"})
    found = [(float(stall), float(write)) for write, stall in SAVED.findall(printed)][:-1]
    if len(found) != saves:
        raise SystemExit(f"The run reported {len(found)} saves instead of {saves}:\n{printed[-3000:]}")
    seconds = sum(line["step_seconds"] for line in common.steps_of(output))
    shutil.rmtree(output)
    stalls, writes = zip(*found, strict=True)
    return stalls, writes, seconds + sum(stalls)


def main():
    common.machine()
    rounds, saves, save_every, shape = ROUNDS, SAVES, SAVE_EVERY, SHAPE
    if QUICK:
        rounds, saves, save_every, shape = 1, 2, 10, common.TINY
    stalls, writes, seconds = ({"on": [], "off": []} for _ in range(3))
    common.WORK.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=common.WORK) as folder:
        folder = common.Path(folder)
        steps = (saves + 1) * save_every
        common.write_inputs(folder, shape, [LENGTH] * (steps * SEQUENCES_PER_STEP))
        for number in range(rounds):
            for way in ("on", "off"):
                found = train(folder, way, saves, save_every)
                for figures, value in zip((stalls, writes), found, strict=False):
                    figures[way] += value
                seconds[way].append(found[2])
                medians = statistics.median(found[0]), statistics.median(found[1])
                print(f"round {number + 1}, {way:3}: stall {medians[0]:.3f} s, write {medians[1]:.3f} s", flush=True)
    stall = {way: statistics.median(values) for way, values in stalls.items()}
    common.result(
        stall_ratio=round(stall["off"] / stall["on"], 1),
        stall_ms_on=round(1000 * stall["on"]),
        stall_ms_off=round(1000 * stall["off"]),
        write_ms_on=round(1000 * statistics.median(writes["on"])),
        run_ratio=round(sum(seconds["off"]) / sum(seconds["on"]), 3),
        saves=len(stalls["on"]),
    )


if __name__ == "__main__":
    settings.from_flags(globals())
    main()
