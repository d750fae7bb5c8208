"""Read what an evaluation wrote, and refuse a pair that was measured differently.

A run is a folder written by `run_eval.sh`: lm_eval's results JSON and logged samples, all in one place or a place for
each task, and `run.json`. Used by compare_evals.py.
"""

import json
import operator
import os
from pathlib import Path

from sft import system

# ==== Facts ====

# What must have which shape, where it is there: a type, {key: shape} with "*" for every other key, [shape of each].
RESULTS = {"results": {"*": {"alias": str}}, "configs": {"*": {"metric_list": ([{"metric": str}], type(None))}}}
RESULTS |= {"higher_is_better": {"*": {}}, "group_subtasks": {"*": [str]}, "config": {"model_args": (str, {})}}
RESULTS |= {"versions": {}, "n-shot": {}, "task_hashes": {}}
BY_TASK = ("results", "configs", "versions", "n-shot", "task_hashes", "higher_is_better", "group_subtasks")
FACTS = {"files_sha256": {}, "versions": {}}  # of run.json


# ==== Reading one run ====


def fits(value, shape):
    """Return whether a JSON value has a shape (see RESULTS); a tuple gives several."""
    if isinstance(shape, tuple):
        return any(fits(value, one) for one in shape)
    if isinstance(shape, list):
        return isinstance(value, list) and all(fits(part, shape[0]) for part in value)
    if isinstance(shape, dict):
        parts = value.items() if isinstance(value, dict) else ()
        return isinstance(value, dict) and all(fits(part, shape.get(k, shape.get("*", object))) for k, part in parts)
    return isinstance(value, shape)


def finite(value):
    """Return whether a JSON value is a number to calculate with: JSON in Python knows NaN, and integers of any size."""
    return isinstance(value, int | float) and abs(value) < 1e100


def read_json(path, shapes):
    """Parse a JSON file, an object. Raises: SystemExit naming the file when it is not whole or has another shape."""
    value = system.read_json(path, "run_eval.sh")
    if wrong := [key for key, shape in shapes.items() if key in value and not fits(value[key], shape)]:
        raise SystemExit(f"{path}: its {wrong[0]} has not the form that lm_eval 0.4 writes. Run run_eval.sh again.")
    return value


def read_run(folder):
    """Read the results of a run folder: one file of lm_eval's, or one for each task.

    Returns: lm_eval's results dict with three more keys: `folder` (Path), `file_of` ({task: Path of its results}) and
    `run` (run.json or {}).
    Raises: SystemExit for a missing folder, no results, broken JSON, a JSON that is not lm_eval's, a task that was
    measured twice, or parts that were measured differently.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise SystemExit(f"There is no folder {folder}. `bash run_eval.sh before` and `after` write the two runs.")
    found = sorted(folder.rglob("results_*.json"))  # lm_eval writes into a folder named after the model
    if not found:
        raise SystemExit(f"No results_*.json under {folder}: lm_eval did not finish there. Run run_eval.sh again.")
    parts = {file: read_json(file, RESULTS) for file in found}
    first = parts[found[0]]
    run = first | {"folder": folder, "file_of": {}} | {key: {} for key in BY_TASK}
    for file, part in parts.items():
        missing = [key for key in (*BY_TASK[:4], "config", "lm_eval_version") if key not in part]
        if missing:
            raise SystemExit(f"{file} is not a results file of lm_eval 0.4: it has no {', '.join(missing)}.")
        twice = [task for task, entry in part["results"].items() if run["results"].get(task, entry) != entry]
        if twice:
            other = run["file_of"][twice[0]]
            raise SystemExit(f"{folder} holds two results of {twice[0]}: {other} and {file}. Move one of them away.")
        if apart := differences(conditions(first), conditions(part), "there", "here"):
            raise SystemExit(
                f"{found[0]} and {file} are parts of one run that were measured differently: {'; '.join(apart)}. Move "
                "one of them away."
            )
        run["file_of"] = dict.fromkeys(part["results"], file) | run["file_of"]
        run |= {key: run[key] | part.get(key, {}) for key in BY_TASK}
    run["config"] = first["config"] | {"batch_sizes": [part["config"].get("batch_sizes") for part in parts.values()]}
    facts = folder / "run.json"
    return run | {"run": read_json(facts, FACTS) if facts.exists() else {}}


def read_samples(run, task):
    """Read the logged questions of one task: {(filter, doc_id): sample}. Raises: SystemExit if missing or broken."""
    results = run["file_of"].get(task, run["folder"] / "results_.json")
    path = results.parent / (results.name.replace("results_", f"samples_{task}_") + "l")
    if not os.path.isfile(path):  # Path.is_file raises for a name that is too long
        raise SystemExit(
            f"The logged questions of {task} are missing: {path}. Run lm_eval with --log_samples, as run_eval.sh does."
        )
    samples = {}
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                sample = json.loads(line.decode())
                samples[sample["filter"], operator.index(sample["doc_id"])] = sample
                # lm_eval takes the first choice for a model that answers NaN, and calls it right or wrong.
                broken = any(answer[0] == "nan" for answer in sample["filtered_resps"] if isinstance(answer, list))
            except (ValueError, LookupError, TypeError, RecursionError):
                raise SystemExit(f"{path}, line {number}, is not a logged question of lm_eval.") from None
            if broken:
                raise SystemExit(f"{path}, line {number}: the model answered NaN; its weights or its dtype are broken.")
    return samples


# ==== The gate: were the two runs measured alike? ====


def conditions(part):
    """What must be equal in all results that are compared, whatever their task: {what: value}."""
    config = part["config"]
    arguments = config.get("model_args", {})
    if isinstance(arguments, str):
        arguments = dict(pair.partition("=")[::2] for pair in arguments.split(","))
    must = {"lm_eval": part["lm_eval_version"]}
    must["model arguments"] = {name: value for name, value in arguments.items() if name != "pretrained"}
    for name in ("limit", "model_dtype", "gen_kwargs", "random_seed", "numpy_seed", "torch_seed", "fewshot_seed"):
        must[name] = config.get(name)
    for name in ("chat_template_sha", "system_instruction_sha", "fewshot_as_multiturn", "max_length"):
        must[name] = part.get(name)
    return must


def how_measured(run):
    """Two dicts {what: value}: what must be equal in both runs of a comparison, and what may move scores a little."""
    config, facts = run["config"], run["run"]
    must = {"tasks": ", ".join(sorted(run["results"]))} | conditions(run)
    if "adds_bos" in facts:
        must["BOS put before each prompt"] = facts["adds_bos"]
    # The task hash covers every question, prompt and target, so also few-shot examples and templates.
    for name, key in (("version", "versions"), ("few-shot", "n-shot"), ("hash of the prompts", "task_hashes")):
        must |= {f"{name} of {task}": value for task, value in run[key].items()}
    may = {name: config.get(name) for name in ("batch_size", "batch_sizes")}
    may |= {"transformers": run.get("transformers_version"), "device's name": facts.get("device")}
    may["torch"] = facts.get("versions", {}).get("torch")
    return must, may


def differences(first, second, here="before", there="after"):
    """Phrases that say where two dicts {what: value} differ, for what both know."""
    return [
        f"{name}: {value} {here}, {second[name]} {there}"
        for name, value in first.items()
        if name in second and value != second[name]
    ]


def agree(before, after):
    """Compare how two runs were measured.

    Returns: list of sentences: what differs and may move scores a little, and what looks wrong with a run.
    Raises: SystemExit listing the differences that make the scores incomparable.
    """
    (must, may), (other_must, other_may) = how_measured(before), how_measured(after)
    if apart := differences(must, other_must):
        more = [f"and {len(apart) - 8} more"] if len(apart) > 8 else []
        raise SystemExit(
            f"{before['folder']} and {after['folder']} were measured differently, so they cannot be compared:\n  "
            + "\n  ".join(apart[:8] + more)
            + "\nMeasure one of them again with the settings of the other."
        )
    notes = [
        f"{name} differs ({value} before, {other_may[name]} after); scores can move slightly with it."
        for name, value in may.items()
        if value != other_may[name]
    ]
    weights = [
        {name: digest for name, digest in run["run"].get("files_sha256", {}).items() if name.endswith(".safetensors")}
        for run in (before, after)
    ]
    if weights[0] and weights[0] == weights[1]:
        notes.append("both runs measured the very same weights.")
    for side, run in (("before", before), ("after", after)):
        perplexity = run["results"].get("lambada_openai", {}).get("perplexity,none")
        if finite(perplexity) and perplexity > 10_000:
            notes.append(
                f"{side}: Lambada's perplexity is that of a model that cannot read plain text. Such a model is usually "
                "a broken import or export (rotary layout, key names, tokenizer), not a weak one."
            )
    return notes


# ==== Scores ====


def value_of(run, task, key):
    """The metric's value and its standard error (None if lm_eval gives none). Raises: SystemExit if missing or NaN."""
    name, _, kind = key.partition(",")
    value = run["results"][task].get(key)
    if not finite(value) or (name == "perplexity" and value <= 0):
        found = "is missing" if value is None else f"is {value}"
        raise SystemExit(
            f"The metric {name} of {task} {found} in {run['file_of'][task]}. A model with broken weights gives NaN or "
            "infinity; a task that stopped half way leaves it out. Measure it again."
        )
    stderr = run["results"][task].get(f"{name}_stderr,{kind}")
    return value, stderr if finite(stderr) else None


def leaves(run, task, above=()):
    """The tasks below a group, in order; a task itself. Raises: SystemExit if a group is below itself."""
    if task in above:
        raise SystemExit(f"{run['folder']}: the group {task} is a part of itself. Run run_eval.sh again.")
    below = run["group_subtasks"].get(task)
    return [leaf for child in below for leaf in leaves(run, child, (*above, task))] if below else [task]


def pairs_of(before, after, tasks, kind, cache):
    """Pair the logged questions of both runs: list of (task, sample before, sample after), for one filter (`kind`)."""
    pairs = []
    for task in tasks:
        if task not in cache:
            cache[task] = read_samples(before, task), read_samples(after, task)
        first, second = ({doc: s for (k, doc), s in side.items() if k == kind} for side in cache[task])
        if set(first) != set(second):
            raise SystemExit(f"The logged questions of {task} differ between the runs; a file was cut or edited.")
        pairs += [(task, first[doc], second[doc]) for doc in sorted(first)]
    return pairs
