"""What several test files use. Nothing heavy is imported before a function needs it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PASSAGE = ROOT / "sft" / "evaluation" / "plain_text.txt"

# ==== Model folders ====


def make_reader(tokenizer, folder, tied=True):
    """Write a tiny Llama, float32, that knows plain_text.py's passage by heart in the ids of an HF `tokenizer`."""
    import torch
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=400, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2,
        rope_parameters={"rope_theta": 10_000.0, "rope_type": "default"},
    )  # fmt: skip
    torch.manual_seed(0)
    model, ids = transformers.LlamaForCausalLM(config), tokenizer(PASSAGE.read_text(), return_tensors="pt").input_ids
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(120):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# ==== Training ====

RUN = {  # the settings of the small runs of sft_v1.py: they save at steps 10, 20 and 30
    "MAX_STEPS": 30,
    "SAVE_EVERY": 10,
    "VALIDATE_EVERY": 10,
    "WARMUP_STEPS": 3,
    "COMPUTE_DTYPE": "float32",
    "TOKENS_PER_MICRO_BATCH": 256,
    "ACTIVATION_CHECKPOINTING": "on",
    "PROMPTS": (),
    "LEARNING_RATE": 1e-3,
    "DEVICE": "cpu",
}
TIMING = ("step_seconds", "tokens_per_second", "trainable_tokens_per_second", "micro_batches", "idle_share")
TIMING += ("data_seconds", "mfu", "peak_gib")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
TORCHRUN += ["--master-port", "0", "--nproc-per-node"]


def tiny_config(kind=None, vocab_size=515, tied=True, **more):
    """Return the config of a model that trains in seconds. kind: a config class of transformers, by default Llama's."""
    import transformers

    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "max_position_embeddings": 256}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    kind = kind or transformers.LlamaConfig
    return kind(vocab_size=vocab_size, tie_word_embeddings=tied, **(sizes | more))


def write_base(folder, config):
    """Write a random model of `config` with a tokenizer of one word as the HF folder `folder`; return it."""
    import torch
    import transformers
    from common import write_tokenizer

    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def sequences(number, vocab_size, seed=0):
    """Counting sequences with a stride of 7 from a random start: learnable; about two thirds is trained."""
    import numpy as np

    rng = np.random.default_rng(seed)
    lengths = rng.integers(8, 64, number)
    ids = [((np.arange(n) * 7 + rng.integers(0, 50)) % vocab_size).astype(np.uint16) for n in lengths]
    return ids, [np.arange(n) > n // 3 for n in lengths]


def write_data(folder, vocab_size=515, train=None, digest="a", tokenizer=None):
    """Write `folder` as prepare_data.py would; return it.

    train: (ids, masks) of the training split; tokenizer: a transformers tokenizer instead of the one of one word.
    """
    import datasets
    from common import write_tokenizer

    from sft import system

    lists = {
        "input_ids": datasets.List(datasets.Value("uint16")),
        "assistant_masks": datasets.List(datasets.Value("bool")),
    }
    features = datasets.Features(lists | {"source": datasets.Value("string")})
    split = {}
    for name, (ids, masks) in {
        "train": train or sequences(200, vocab_size),
        "validation": sequences(20, 515, seed=1),
    }.items():
        columns = {"input_ids": ids, "assistant_masks": masks, "source": ["x"] * len(ids)}
        split[name] = datasets.Dataset.from_dict(columns, features=features)
    datasets.DatasetDict(split).save_to_disk(folder)
    if tokenizer:
        tokenizer.save_pretrained(folder / "tokenizer")
    else:
        write_tokenizer(folder / "tokenizer")
    report = {
        "tokenizer_sha256": system.sha256(folder / "tokenizer" / "tokenizer.json"),
        "vocab_size": vocab_size,
        "max_seq_len": 64,
        "digest": {"train": digest, "validation": "b"},
    }
    (folder / "report.json").write_text(json.dumps(report))
    return folder


def run_settings(work, name, **changes):
    """Return RUN with the folders of the run `work`/`name`, and `changes`."""
    folders = {"DATA_DIR": work / "data", "RESIZED_MODEL": work / "base", "CHECKPOINT_DIR": work / name}
    return RUN | {setting: str(folder) for setting, folder in folders.items()} | changes


def default_settings():
    """Return every setting of sft_v1.py with its default."""
    import sft_v1
    from sft import settings

    return {name: getattr(sft_v1, name) for _, name, _ in settings.constants(ROOT / "sft_v1.py")}


def run_alone(mesh, work, name, **changes):
    """Run `work`/`name` to its end in this process, the only rank: without torchrun and its imports."""
    import contextlib

    import torch

    import sft_v1

    args = default_settings() | run_settings(work, name, **changes)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    sft_v1.validate_settings(args)
    try:
        with contextlib.ExitStack() as locks:
            sft_v1.run(args, torch.device("cpu"), mesh, locks)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def train_command(work, name, ranks, *flags, **changes):
    """Return the torchrun command of the run `work`/`name`. flags: more of torchrun's, changes: more settings."""
    arguments = []
    for setting, value in run_settings(work, name, **changes).items():
        text = ",".join(value) if isinstance(value, tuple) else str(value)
        arguments += [f"--{setting.lower().replace('_', '-')}", text]
    return [*TORCHRUN, str(ranks), *flags, str(ROOT / "sft_v1.py"), *arguments]


def torchrun(line, timeout=300):
    """Run a torchrun command to its end; return the CompletedProcess."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    result = subprocess.run(line, capture_output=True, text=True, env=env, timeout=timeout)
    if re.search(r"DistNetworkError|DistStoreError|Rendezvous\w*Error|[Gg]loo connect", result.stderr):
        # The processes did not find each other on a loaded machine; the script itself had not started.
        result = subprocess.run(line, capture_output=True, text=True, env=env, timeout=timeout)
    return result


def trained(work, name, ranks, **changes):
    """Run `work`/`name` on `ranks` processes to its end; return what it printed."""
    result = torchrun(train_command(work, name, ranks, **changes))
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def metrics(run):
    """Return the lines of a run's metrics.jsonl without what a clock or the layout decides."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMING} for line in lines]


def stored(checkpoint):
    """Return every tensor of a checkpoint as a dict."""
    import torch
    import torch.distributed.checkpoint as dcp

    entries = dcp.FileSystemReader(str(checkpoint)).read_metadata().state_dict_metadata
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()}
    dcp.load(tensors, checkpoint_id=str(checkpoint))
    return tensors


def go_back(run, copy, step):
    """Copy a run as it was after `step`; return the copy's Path."""
    from sft.training import checkpoints

    shutil.copytree(run, copy)
    for path in checkpoints.listed(copy):
        if path.name != checkpoints.checkpoint_name(step):
            shutil.rmtree(path)
    return copy


def assert_same_run(ours, theirs):
    """Assert that two runs have the same metrics and the same last checkpoint, bit for bit."""
    import torch

    assert metrics(ours) == metrics(theirs)
    ours, theirs = stored(ours / "step_000030"), stored(theirs / "step_000030")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def assert_same_steps(ours, theirs):
    """Assert that two runs have the same metrics but for the rounding of another order of sums."""
    import math

    lines = zip(metrics(ours), metrics(theirs), strict=True)
    for line, expected in lines:
        assert line.keys() == expected.keys()
        for name, value in line.items():
            assert math.isclose(value, expected[name], rel_tol=2e-5), (line, expected)


# ==== Evaluation ====
