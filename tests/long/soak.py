"""Train 300 steps with a save every 5 on two CPU processes and measure what grows: memory, open files, threads, time.

    python tests/long/soak.py                   300 steps, 60 saves, about a minute on two CPU cores
    python tests/long/soak.py --quick           60 steps, 12 saves

Each rank is sampled at each save. A growth is the median of the last quarter of the samples minus the median of the
second quarter, the largest of both ranks; the drift of the step time is the quotient of these medians minus 1.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
import common  # puts the suite on the path
import faults

from sft import settings
from sft.training import checkpoints

# ---- Soak ----
STEPS = 300  # optimizer steps
SAVE_EVERY = 5  # optimizer steps
QUICK = False  # 60 steps

# ==== Samples ====


def sample(pid):
    """Return {"rss_mib", "fds", "threads"} of a running process."""
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    fds = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return {"rss_mib": int(status["VmRSS"].split()[0]) / 1024, "fds": fds, "threads": int(status["Threads"])}


def follow(launcher, run, steps, save_every):
    """Sample both ranks as each checkpoint of `run` gets its name; return one list of samples per rank."""
    samples = [[] for _ in launcher.ranks]
    for step in range(save_every, steps, save_every):
        while not (run / checkpoints.checkpoint_name(step)).exists():
            if not faults.running(launcher.pid):
                raise SystemExit(f"The run ended before step {step}: {launcher.log.read_text()[-3000:]}")
            time.sleep(0.002)
        for pid, of_rank in zip(launcher.ranks, samples, strict=True):
            of_rank.append(sample(pid))
    return samples


def quarters(values):
    """Return the medians of the second and of the last quarter of `values`."""
    n = len(values)
    return statistics.median(values[n // 4 : n // 2]), statistics.median(values[3 * n // 4 :])


def main():
    steps = 60 if QUICK else STEPS
    common.machine()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        faults.in_a_child(lambda: faults.make_input(folder))
        arguments = faults.flags(folder, "soak", steps, SAVE_EVERY, keep=steps)
        launcher = faults.Launcher(arguments, folder / "log")
        samples = follow(launcher, folder / "soak", steps, SAVE_EVERY)
        if launcher.wait():
            raise SystemExit(f"The run failed: {launcher.log.read_text()[-3000:]}")
        lines = (folder / "soak" / "metrics.jsonl").read_text().splitlines()
        seconds = [line["step_seconds"] for line in map(faults.json.loads, lines) if "step_seconds" in line]
    growth = {}
    for name in ("rss_mib", "fds", "threads"):
        pairs = [quarters([entry[name] for entry in of_rank]) for of_rank in samples]
        growth[name] = max(last - second for second, last in pairs)
        print(f"{name:8} {'; '.join(f'rank {r}: {a:.1f} -> {b:.1f}' for r, (a, b) in enumerate(pairs))}")
    second, last = quarters(seconds)
    common.result(
        steps=steps,
        saves=steps // SAVE_EVERY,
        rss_growth_mib=round(growth["rss_mib"], 2),
        fd_growth=round(growth["fds"]),
        thread_growth=round(growth["threads"]),
        step_time_drift=round(last / second - 1, 3),
    )


if __name__ == "__main__":
    settings.from_flags(globals())
    main()
