"""What several test files use. Nothing heavy is imported before a function needs it."""

import contextlib
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PASSAGE = ROOT / "sft" / "evaluation" / "plain_text.txt"

# ==== Model folders ====


def args_of(script, **changes):
    """Return the settings of an imported script as `settings.from_flags` gives them, with `changes`."""
    from sft import settings

    args = {name: getattr(script, name) for _, name, _ in settings.constants(script.__file__)}
    assert changes.keys() <= args.keys(), changes.keys() - args.keys()
    return args | changes


def run_python(folder, *command, ok=True):
    """Run Python with the arguments `command` in `folder`, to success or (ok=False) not. Returns: stdout or stderr."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, command)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=env, timeout=600)
    assert (result.returncode == 0) is ok, result.stdout + result.stderr
    assert "Traceback" not in result.stderr, result.stderr
    return result.stdout if ok else result.stderr


def run_torchrun(folder, processes, script, *flags):
    """Run the Python file `script` in `folder` by torchrun with this number of processes. Returns: stdout."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", processes]
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    return run_python(folder, *launcher, *rendezvous, script, *flags)


def read_weights(folder):
    """Return {name: tensor} of all safetensors in `folder`."""
    from safetensors.torch import load_file

    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def edit_json(path, **changes):
    """Set some keys of the JSON object in the file `path`."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@contextlib.contextmanager
def full_disk(size):
    """Let no file of this process grow beyond `size` bytes within the block: what a full disk does to a write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def train_sentencepiece(folder, **options):
    """Train a SentencePiece model on the passage and some code; return the path of its tokenizer.model."""
    import sentencepiece

    text = [line for line in PASSAGE.read_text().splitlines() if line] + ["def f(x):", "    return x"] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_prefix=str(folder / "tokenizer"), minloglevel=2, **options
    )
    return folder / "tokenizer.model"


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


# ==== Evaluation ====
