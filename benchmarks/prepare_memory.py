"""How much memory does prepare_data.py take? On a million generated conversations, in two sources.

    python benchmarks/prepare_memory.py            1,000,000 conversations
    python benchmarks/prepare_memory.py --quick    20,000, for a look

The conversations are sentences of ShareGPT in new combinations, the same ones every time: half as JSONL, half as a JSON
array. Every SAMPLE_SECONDS the PSS (/proc/PID/smaps_rollup) of prepare_data.py and all its descendants is added up; PSS
counts a page that several processes share once in all, and pages of mapped files as well. `peak_rss_gib` is the highest
sum. This process imports nothing heavy, so that it shares no library's pages with what it measures; another Python with
the same libraries, running meanwhile, would lower the figure. Reads and writes benchmarks/work/.
"""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import common

from sft import settings

# ---- Size ----
CONVERSATIONS = 1_000_000  # generated, half of them per source
QUICK = False  # 20,000 conversations
SAMPLE_SECONDS = 0.2  # between two looks at the memory
SEED = 0  # of the generated text

# ==== Constants ====

FOLDER = common.WORK / "memory"
SENTENCES = 200_000  # kept to draw from
LIMIT_GIB = 2  # the target


# ==== Generated conversations ====


def generate(source, number, files):
    """Write `number` different conversations, half as `messages` lines, half as a `conversations` array."""
    from sft.data import sources  # heavy; this runs in a child

    sentences = {}
    rows = sources.FileRows(source)
    for row, _ in rows.take(range(len(rows) - 1)):  # the last is cut off
        for text in [turn["value"] for turn in row["conversations"]]:
            sentences |= dict.fromkeys(s for s in re.split(r"(?<=[.!?])\s+", text) if 30 < len(s) < 250)
        if len(sentences) >= SENTENCES:
            break
    sentences, draw = list(sentences), random.Random(SEED)

    def text(most):
        return " ".join(draw.choices(sentences, k=draw.randint(1, most)))

    for path, half in zip(files, (number // 2, number - number // 2), strict=True):
        array = path.suffix == ".json"
        key, role, content = ("conversations", "from", "value") if array else ("messages", "role", "content")
        with path.open("w", encoding="utf-8") as file:
            for index in range(half):
                turns = []
                for _ in range(draw.randint(1, 2)):
                    turns += [{role: "user", content: text(2)}, {role: "assistant", content: text(6)}]
                before = ("[" if index == 0 else ",\n") if array else ""
                file.write(before + json.dumps({key: turns}) + ("" if array else "\n"))
            file.write("]\n" if array else "")


# ==== Memory of a process tree ====


def tree(pid):
    """Return the process ids of `pid` and all its descendants that live now."""
    parents = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                stat = Path(entry.path, "stat").read_text()
            except OSError:  # it ended
                continue
            parents.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(entry.name))
    descendants = [pid]
    for process in descendants:  # grows while it is walked
        descendants += parents.get(process, [])
    return descendants


def pss_gib(pids):
    """Return the sum of the processes' PSS in GiB."""
    kib = 0
    for pid in pids:
        try:
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:  # it ended
            continue
        kib += sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
    return kib / 2**20


def watch(command, log):
    """Run `command` to its end, its output into `log`; return (peak GiB, most processes at once, seconds)."""
    peak, most, begin = 0.0, 0, time.perf_counter()
    with log.open("w") as output:
        environment = os.environ | common.OFFLINE
        process = subprocess.Popen(command, cwd=common.ROOT, env=environment, stdout=output, stderr=output)
        while process.poll() is None:
            pids = tree(process.pid)
            peak, most = max(peak, pss_gib(pids)), max(most, len(pids))
            time.sleep(SAMPLE_SECONDS)
    if process.returncode:
        raise SystemExit(f"prepare_data.py failed; the end of {log}:\n{log.read_text()[-3000:]}")
    return peak, most, time.perf_counter() - begin


# ==== Main ====


def main(args):
    """Generate, prepare, watch, check that no conversation is lost, print the RESULT line."""
    number = 20_000 if QUICK else CONVERSATIONS
    common.machine()
    base, source = common.base_folder(), common.sharegpt()
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    files, mixture, output = (FOLDER / "a.jsonl", FOLDER / "b.json"), FOLDER / "mixture.json", FOLDER / "prepared"
    begin = time.perf_counter()
    common.in_child(generate, source, number, files)
    size = sum(path.stat().st_size for path in files) / 2**30
    print(f"{number:,} conversations, {size:.2f} GiB, written in {time.perf_counter() - begin:.0f} s", flush=True)
    schemas = zip(files, ("messages", "conversations"), strict=True)
    rows = [{"name": p.stem, "path": str(p), "schema": schema, "examples": "all"} for p, schema in schemas]
    mixture.write_text(json.dumps(rows))
    command = [sys.executable, "prepare_data.py", "--base-model", str(base), "--mixture", str(mixture)]
    command += ["--data-dir", str(output), *common.DECONTAMINATION_OFF]
    peak, most, seconds = watch(command, FOLDER / "prepare.log")
    report = json.loads((output / "report.json").read_text(encoding="utf-8"))
    read, kept, rejected = (sum(line[key] for line in report["sources"]) for key in ("read", "kept", "rejected"))
    tokens = report["totals"]["tokens"]
    print(f"read {read:,} = kept {kept:,} + rejected {rejected:,}; {tokens:,} tokens, {tokens / kept:.0f} each")
    print(f"{seconds:.0f} s, at most {most} processes at once; the target is {LIMIT_GIB} GiB")
    if not read == kept + rejected == number:
        raise SystemExit(f"Of {number:,} conversations {read:,} were read, {kept:,} kept and {rejected:,} rejected.")
    common.result(conversations=number, peak_rss_gib=round(peak, 3))


if __name__ == "__main__":
    main(settings.from_flags(globals()))
