"""How much plain text does fine-tuning forget, and how much less with replay or with a share of the base?

    python benchmarks/forgetting.py
    python benchmarks/forgetting.py --quick    a few steps, for a look

The demo's model is fine-tuned twice by sft_v1.py, for the same number of steps and with the same settings: on the
demo's conversations alone, and on these with documents that sample_base.py drew from the base itself, REPLAY_SHARE of
all tokens. The third model is the first one's export with BASE_SHARE of the base. The learning rate is one at which a
model forgets; a careful run forgets less.

Plain text is measured on documents that are neither: the docstrings of Python's standard library, one document per
file, cut at TEXT_TOKENS. The losses, in float32, are paired by document; an error is the standard error of the mean
difference over the documents. One seed: another order of the sequences moves the figures, too.

Writes benchmarks/work/forgetting/.
"""

import ast
import json
import shutil
import sys
import sysconfig
import warnings
from pathlib import Path

import common
import numpy as np
import torch
import transformers
from transformers import AutoTokenizer

from sft import hf_folder, settings
from sft.evaluation import assistant_check

# ---- Training ----
STEPS = 60  # optimizer steps of each run
SEQUENCES_PER_STEP = 4  # sequences
MAX_SEQ_LEN = 256  # tokens
LEARNING_RATE = 1e-3  # peak; 50 times the recipe's
COMPUTE_DTYPE = "bfloat16"  # "bfloat16" | "float32", for a CPU without bfloat16 instructions
RANKS = 2  # processes of torchrun
# ---- Against forgetting ----
REPLAY_SHARE = 0.05  # of the tokens of the training split with replay
BASE_SHARE = 0.5  # of the base in the third model's weights
# ---- Plain text ----
DOCUMENTS = 100  # that are measured, evenly from all; 0 = all
TEXT_TOKENS = 96  # tokens of a document at most, sampled or measured
START_TOKEN = "<|endoftext|>"  # what documents begin after in the base's pretraining
QUICK = False  # 4 steps and 12 documents

# ==== Texts ====

WORK = common.WORK / "forgetting"
LEAST_CHARACTERS = 600  # of a file's docstrings: about TEXT_TOKENS tokens


def docstrings():
    """Return the docstrings of each file of Python's standard library that has enough of them: list of str."""
    warnings.simplefilter("ignore", SyntaxWarning)  # of old escapes in these files
    library, texts = Path(sysconfig.get_paths()["stdlib"]), []
    for path in sorted(library.rglob("*.py")):
        if {"site-packages", "test", "tests", "idlelib"} & set(path.relative_to(library).parts):
            continue
        try:
            nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        except (SyntaxError, ValueError):  # samples of wrong code
            continue
        nodes = [node for node in nodes if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)]
        text = "\n\n".join(filter(None, map(ast.get_docstring, nodes)))
        if len(text) >= LEAST_CHARACTERS:
            texts.append(text)
    return texts


# ==== Runs ====


def prepare(name, sources):
    """Run prepare_data.py on the mixture `sources` (list of dict); return (its folder, its report)."""
    folder = WORK / name
    (WORK / f"{name}.json").write_text(json.dumps(sources))
    command = [sys.executable, "prepare_data.py", "--base-model", common.BASE, "--data-dir", folder]
    command += ["--mixture", WORK / f"{name}.json", "--max-seq-len", MAX_SEQ_LEN, "--validation-conversations", 6]
    common.run(*command, *common.DECONTAMINATION_OFF)
    return folder, json.loads((folder / "report.json").read_text())


def sample_replay(tokens):
    """Sample documents of about so many `tokens` together from the base; return their source, a dict."""
    path = WORK / "replay.jsonl"
    documents = round(tokens / TEXT_TOKENS * 1.5) + 12  # some end early, and the validation takes a few
    command = [sys.executable, "sample_base.py", "--base-model", common.BASE, "--output", path]
    command += ["--documents", documents, "--max-tokens", TEXT_TOKENS, "--start-token", START_TOKEN]
    common.run(*command, "--dtype", "float32")
    lengths = [json.loads(line)["tokens"] for line in path.read_text().splitlines()]
    examples = max(1, round(tokens / np.mean(lengths)))
    return {"name": "replay", "path": str(path), "schema": "text", "examples": examples}


def train(data, name, steps):
    """Fine-tune the resized base on the folder `data`; return the run's folder."""
    output = WORK / f"checkpoints-{name}"
    chosen = {"learning_rate": LEARNING_RATE, "min_learning_rate": LEARNING_RATE / 10, "warmup_steps": steps // 10}
    chosen |= {"sequences_per_step": SEQUENCES_PER_STEP, "compute_dtype": COMPUTE_DTYPE, "tokens_per_micro_batch": 1024}
    arguments = common.trainer_arguments(data, WORK / "resized", output, steps, **chosen, prompts="")
    common.run(*common.TORCHRUN, RANKS, "sft_v1.py", *arguments, env={"OMP_NUM_THREADS": "1"})
    return output


def export(run, name, *further):
    """Export the run's last checkpoint in float32 with `further` flags; return the folder."""
    folder = WORK / name
    command = [sys.executable, "export_hf.py", "--checkpoint-dir", run, "--resized-model", WORK / "resized"]
    common.run(*command, "--export-dir", folder, "--dtype", "float32", *further)
    return folder


# ==== Measuring ====


def losses(folder, texts, rows, dtype=torch.float32):
    """Return (mean loss of each text, of each held-out conversation's answers), float64 arrays in nats per token."""
    model = hf_folder.load_model(folder, "Run the benchmark again.", dtype)
    tokenizer, means = AutoTokenizer.from_pretrained(common.BASE), []
    start = tokenizer.convert_tokens_to_ids(START_TOKEN)
    for text in texts:
        ids = torch.tensor([start, *tokenizer(text, add_special_tokens=False).input_ids[:TEXT_TOKENS]])
        means.append(assistant_check.losses(model, ids, torch.ones(len(ids), dtype=torch.bool)).mean().item())
    return np.array(means), np.array(assistant_check.conversation_losses(model, rows))


def paired(difference):
    """Return the mean of paired differences (array) and its standard error."""
    return float(difference.mean()), float(difference.std(ddof=1) / np.sqrt(len(difference)))


def table(measured):
    """Return the lines of the table. measured: {name: what `losses` returns}, the base first."""
    lines = [
        "| model | plain text | change | against no replay | held-out answers | change |",
        "|---|---:|" + "---:|" * 4,
    ]
    text_before, answers_before = measured["base"]
    for name, (text, answers) in measured.items():
        cells = [f"{text.mean():.4f}", "", "", f"{answers.mean():.4f}", ""]
        if name != "base":
            cells[1] = "{:+.4f} ± {:.4f}".format(*paired(text - text_before))
            cells[4] = "{:+.4f} ± {:.4f}".format(*paired(answers - answers_before))
        if name not in ("base", "no replay"):
            cells[2] = "{:+.4f} ± {:.4f}".format(*paired(text - measured["no replay"][0]))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


# ==== Main ====


def main(args):
    """Fine-tune, export, measure; print the table and the RESULT line."""
    transformers.utils.logging.disable_progress_bar()
    common.machine()
    common.base_folder()
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    steps, texts = (4 if args["QUICK"] else STEPS), docstrings()
    number = 12 if args["QUICK"] else min(DOCUMENTS or len(texts), len(texts))
    texts = [texts[index * len(texts) // number] for index in range(number)]
    demo = common.ROOT / "demo"
    sources = json.loads((demo / "mixture.json").read_text())
    sources = [source | {"path": str(demo / source["path"])} for source in sources]
    plain, report = prepare("data-no-replay", sources)
    replay_tokens = REPLAY_SHARE / (1 - REPLAY_SHARE) * report["totals"]["tokens"]
    mixed, report = prepare("data-replay", [*sources, sample_replay(replay_tokens)])
    shares = {name: report["plain_text"][name] / report["totals"][name] for name in ("tokens", "trainable_tokens")}
    print(
        f"replay: {report['plain_text']['sequences']} documents, {shares['tokens']:.1%} of the tokens, "
        f"{shares['trainable_tokens']:.1%} of the trained ones; measured: {len(texts)} documents",
        flush=True,
    )
    command = [sys.executable, "resize_vocab.py", "--base-model", common.BASE, "--data-dir", plain]
    common.run(*command, "--resized-model", WORK / "resized")
    without = train(plain, "no-replay", steps)
    folders = {"base": WORK / "resized", "no replay": export(without, "no-replay")}
    folders["replay"] = export(train(mixed, "replay", steps), "replay")
    folders["base share"] = export(without, "base-share", "--base-share", BASE_SHARE)
    rows = assistant_check.load_rows(plain)
    measured = {name: losses(folder, texts, rows) for name, folder in folders.items()}
    print("\n".join(["", *table(measured), ""]))
    figures = {"steps": steps, "documents": len(texts)}
    for name in ("no replay", "replay", "base share"):
        figures[f"forgot_{name}".replace(" ", "_")] = "{:.4f}±{:.4f}".format(
            *paired(measured[name][0] - measured["base"][0])
        )
    saved, error = paired(measured["no replay"][0] - measured["replay"][0])
    common.result(**figures, replay_saves=f"{saved:.4f}±{error:.4f}", replay_z=round(saved / error, 1))


if __name__ == "__main__":
    main(settings.from_flags(globals()))
