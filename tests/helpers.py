"""What several test files use. Nothing heavy is imported before a function needs it."""

import contextlib
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PASSAGE = ROOT / "sft" / "evaluation" / "plain_text.txt"

# ==== The machine ====


def fake_card(folder, driver):
    """Write an nvidia-smi that answers with the version `driver` into `folder`, for the PATH."""
    folder.mkdir(exist_ok=True)
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\necho {driver}\n")
    (folder / "nvidia-smi").chmod(0o755)


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
    """Write a tiny Llama, float32, that knows reading_check.py's passage by heart in the ids of an HF `tokenizer`."""
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


# ==== Data ====


def prepare_args(**changes):
    """Return prepare_data.py's settings (dict): no decontamination, a window of 256 tokens, and `changes`."""
    import prepare_data

    return args_of(prepare_data, **{"MAX_SEQ_LEN": 256, "DECONTAMINATE_AGAINST": ()} | changes)


def chat(*texts, first="user"):
    """Return a `messages` row whose roles alternate from `first`."""
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return {"messages": [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]}


def source(**fields):
    """Return a Source with the name "s", the schema `messages` and all of its rows unless `fields` say otherwise."""
    from sft.data.sources import Source

    location = {} if "hub" in fields else {"path": "s.jsonl"}
    return Source(**({"name": "s", "schema": "messages", "examples": "all"} | location | fields))


class Rows(list):
    """Rows in memory, for a Work."""

    damage = None

    def take(self, numbers):
        return [(self[number], None) for number in numbers]


def work_of(encoder, rows, args=None, **fields):
    """Return the Work of a source whose `rows` are in memory. args: settings; fields: of the Source."""
    from sft.data import workers

    return workers.Work(source(**fields), Rows(rows), encoder, None, args or prepare_args())


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
TIMING += ("data_seconds", "mfu", "allocated_gib", "reserved_gib", "allocation_retries")
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


def write_data(folder, vocab_size=515, train=None, tokenizer=None):
    """Write `folder` as prepare_data.py would; return it.

    train: (ids, masks) of the training split; tokenizer: a transformers tokenizer instead of the one of one word.
    """
    import datasets
    from common import write_report, write_tokenizer

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
    write_report(folder, vocab_size, max_seq_len=64)
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
        texts = (value or ("",)) if isinstance(value, tuple) else (str(value),)
        arguments += [f"--{setting.lower().replace('_', '-')}", *texts]
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


class Attack:
    """An object whose pickle runs a command when it is read."""

    def __reduce__(self):
        return os.system, ("touch broken-into",)


def poison(checkpoint, change):
    """Rewrite the `.metadata` of a checkpoint with `change(its bytes)`, and its manifest to match, as an attacker."""
    from sft import system

    path, manifest = checkpoint / ".metadata", checkpoint / "manifest.json"
    path.write_bytes(change(path.read_bytes()))
    edit_json(manifest, **{".metadata": [path.stat().st_size, system.sha256(path)]})


def bytes_for_a_tensor(name):
    """Return a change for `poison` that declares the tensor `name` to be bytes, which DCP unpickles as they are."""
    import pickle

    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    def change(content):
        metadata = pickle.loads(content)
        entry = BytesStorageMetadata()
        entry.__dict__ |= vars(metadata.state_dict_metadata[name])  # its size and dtype
        metadata.state_dict_metadata[name] = entry
        return pickle.dumps(metadata)

    return change


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


def write_dataset(root, name, configs):
    """Write configs = {config: {split: rows}} as a folder that load_dataset(name, config) reads."""
    lines = ["---", "configs:"]
    for config, splits in configs.items():
        lines += [f"- config_name: {config}", "  data_files:"]
        for split, rows in splits.items():
            file = root / name / config / f"{split}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
            lines += [f"  - split: {split}", f"    path: {config}/{split}.jsonl"]
    (root / name / "README.md").write_text("\n".join([*lines, "---", ""]))


def copy_lm_eval(folder, tasks):
    """Copy lm_eval into `folder`, of its 14,000 task definitions (12 s at each start) only the subfolders `tasks`."""
    from importlib.util import find_spec

    package = Path(find_spec("lm_eval").submodule_search_locations[0])
    shutil.copytree(package, folder / "lm_eval", ignore=shutil.ignore_patterns("__pycache__", "tasks"))
    (folder / "lm_eval/tasks").mkdir()
    for path in (package / "tasks").glob("*.py"):
        shutil.copyfile(path, folder / "lm_eval/tasks" / path.name)
    for name in tasks:
        shutil.copytree(package / "tasks" / name, folder / "lm_eval/tasks" / name)


def write_chat_data(root):
    """Write three of IFEval's instructions and of GSM8K's problems, and nltk's punkt_tab without any abbreviation."""
    instructions = [
        ("punctuation:no_comma", {}),
        ("length_constraints:number_sentences", {"relation": "at least", "num_sentences": 1}),
        ("change_case:english_capital", {}),
    ]
    rows = []
    for i, (name, arguments) in enumerate(instructions):
        kwargs = {field: arguments.get(field) for field in ("relation", "num_sentences")}
        rows.append({"key": i, "prompt": f"Answer {i}.", "instruction_id_list": [name], "kwargs": [kwargs]})
    write_dataset(root, "google/IFEval", {"default": {"train": rows}})
    problem = {"question": "Tom has 2 apples and buys 3. How many?", "answer": "Tom has 2+3=<<2+3=5>>5 apples.\n#### 5"}
    write_dataset(root, "openai/gsm8k", {"main": {"train": [problem], "test": [problem] * 3}})
    punkt = root / "nltk_data/tokenizers/punkt_tab/english"
    punkt.mkdir(parents=True)
    for name in ("abbrev_types.txt", "collocations.tab", "ortho_context.tab", "sent_starters.txt"):
        (punkt / name).write_text("")


CONVERSATIONS = [  # (source, turns)
    ("a", [("user", "Who are you?"), ("assistant", "I am Genesis.")]),
    ("a", [("system", "Be brief."), ("user", "Say yes"), ("assistant", "yes"), ("user", "No?"), ("assistant", "no")]),
    ("b", [("user", "1 + 1"), ("assistant", "<think>\none and one\n</think>\n\ntwo")]),
    ("b", [("user", "2 + 2"), ("assistant", "four")]),
]


def write_tokenizer(folder):
    """Write a byte-level tokenizer without chat markers, as a base has it. Returns: the folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(["the cat sat on the mat"], trainer)
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)
    return folder


def write_conversations(folder, base):
    """Write CONVERSATIONS as prepare_data.py does, with the tokenizer in `base` extended. Returns: that tokenizer."""
    import datasets

    from sft.data import chatml

    tokenizer, _ = chatml.extend_tokenizer(base, True, False)
    tokenizer.save_pretrained(folder / "tokenizer")
    rows = []
    for source, turns in CONVERSATIONS:
        messages = [{"role": role, "content": content} for role, content in turns]
        row = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        masks = [bool(mask) for mask in row["assistant_masks"]]
        rows.append({"input_ids": row["input_ids"], "assistant_masks": masks, "source": source})
    split = datasets.Dataset.from_list(rows)
    datasets.DatasetDict({"train": split, "validation": split}).save_to_disk(folder)
    return tokenizer


def write_model(folder, tokenizer, seed, rows=None, context=512):
    """Write a tiny Llama, bfloat16; with `rows` (of the data) it is trained until it knows them by heart."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    names = {"bos_token_id": 0, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=context, **names, **shape))
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    for _ in range(60 if rows else 0):
        for row in rows:
            ids, mask = torch.tensor(row["input_ids"]), torch.tensor(row["assistant_masks"])
            model(input_ids=ids[None], labels=ids.where(mask, -100)[None]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.generation_config = GenerationConfig(**names)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


RESULTS_TIME = "2026-01-02T03-04-05.678901"


def write_run(folder, tasks, groups=None, change=None, choices=4, time=RESULTS_TIME):
    """Write a run like lm_eval's: tasks = {task: {metric: scores per question}}, groups = {group: [tasks]}.

    choices: number of answers to choose from, for all tasks or {task: number}; 0 for a task without.
    `change(results)` edits the results JSON before it is written.
    """
    model = folder / "models__x"
    model.mkdir(parents=True, exist_ok=True)
    results, configs = {}, {}
    for task, metrics in tasks.items():
        (n,) = {len(scores) for scores in metrics.values()}
        offered = choices.get(task, 4) if isinstance(choices, dict) else choices
        entry = results[task] = {"name": task, "alias": task, "sample_len": n}
        for metric, scores in metrics.items():
            mean = sum(scores) / n
            stderr = math.sqrt(sum((s - mean) ** 2 for s in scores) / (n - 1) / n)
            if metric == "perplexity":
                mean, stderr = math.exp(-mean), math.exp(-mean) * stderr
            entry |= {f"{metric},none": mean, f"{metric}_stderr,none": stderr}
        with (model / f"samples_{task}_{time}.jsonl").open("w") as file:
            for i in range(n):
                sample = {"doc_id": i, "doc": {"q": i}, "filter": "none", "filtered_resps": [["-1.0", "False"]]}
                sample["arguments"] = {f"gen_args_{c}": {} for c in range(offered or 1)}
                file.write(json.dumps(sample | {metric: scores[i] for metric, scores in metrics.items()}) + "\n")
        output_type = "multiple_choice" if offered else "loglikelihood"
        configs[task] = {"output_type": output_type, "metric_list": [{"metric": metric} for metric in metrics]}
    for group, members in (groups or {}).items():
        scores = [s for task in leaf_tasks(groups, members) for s in tasks[task]["acc"]]
        results[group] = {"alias": group, "acc,none": sum(scores) / len(scores), "acc_stderr,none": 0.0036}
    document = {
        "results": results,
        "group_subtasks": groups or {},
        "configs": configs,
        "versions": dict.fromkeys(results, 1.0),
        "n-shot": dict.fromkeys(results, 0),
        "higher_is_better": {task: {m: m != "perplexity" for m in metrics} for task, metrics in tasks.items()},
        "config": {
            "model_args": {"pretrained": str(folder), "dtype": "bfloat16"},
            "model_dtype": "torch.bfloat16",
            "batch_size": "auto:2",
            "limit": None,
        },
        "lm_eval_version": "0.4.13",
        "model_name": folder.name,
        "task_hashes": dict.fromkeys(tasks, "same"),
    }
    if change:
        change(document)
    (model / f"results_{time}.json").write_text(json.dumps(document))
    (folder / "run.json").write_text(
        json.dumps({"adds_bos": False, "files_sha256": {"model.safetensors": folder.name.removesuffix("-chat")}})
    )


def leaf_tasks(groups, members):
    """Return the tasks below a group's `members`, in order."""
    return [leaf for m in members for leaf in (leaf_tasks(groups, groups[m]) if m in groups else [m])]


def share(right, n):
    """Return the scores of n answers, the first `right` of them right."""
    return [1.0] * right + [0.0] * (n - right)


def write_pair(folder, before, after, **options):
    """Write two runs, see `write_run`, as the folders eval-results/before and after in `folder`."""
    write_run(folder / "eval-results/before", before, **options)
    write_run(folder / "eval-results/after", after, **options)


def compare_in(capsys):
    """Return a function that runs compare_evals.py with some settings changed and returns what is printed."""
    from sft.evaluation import compare_evals

    def compare(**changes):
        compare_evals.main(args_of(compare_evals, **changes))
        return capsys.readouterr().out

    return compare


MINE = {"mine": {"acc": share(3, 9)}}


def children(pid):
    """Return the ids of all processes below `pid`."""
    pids = [int(n) for n in subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split()]
    return pids + [below for child in pids for below in children(child)]
