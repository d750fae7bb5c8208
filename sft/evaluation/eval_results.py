"""Read what an evaluation wrote, and check that two runs are comparable.

A run is a folder written by `run_eval.sh`: lm_eval's results JSON and logged samples, all in one folder or a folder for
each task, and `run.json`. compare_evals.py uses it.
"""

import json
import math
import operator
import os
from pathlib import Path

from sft import system

# ==== Constants ====

# The shape that a part of results_*.json must have if it is there. A shape is a type, {key: shape} with "*" for every
# other key, [shape of each element], or a tuple of alternatives.
RESULTS = {
    "results": {"*": {"alias": str}},
    "configs": {"*": {"metric_list": ([{"metric": str}], type(None))}},
    "higher_is_better": {"*": {}},
    "group_subtasks": {"*": [str]},
    "config": {"model_args": (str, {})},
    "versions": {},
    "n-shot": {},
    "task_hashes": {},
}
RECORD = {"files_sha256": {}, "versions": {}, "not_decontaminated": [str]}  # likewise of run.json
ALWAYS_THERE = ("results", "configs", "versions", "n-shot", "config", "lm_eval_version")
BY_TASK = ("results", "configs", "versions", "n-shot", "task_hashes", "higher_is_better", "group_subtasks")
CANNOT_READ = 10_000  # Lambada's perplexity above this is that of a model that cannot read plain text
SHOWN_DIFFERENCES = 8  # of two runs that were measured differently

# ==== Reading one run ====


def fits(value, shape):
    """Return whether a JSON value has a shape (see RESULTS)."""
    if isinstance(shape, tuple):
        return any(fits(value, one) for one in shape)
    if isinstance(shape, list):
        return isinstance(value, list) and all(fits(element, shape[0]) for element in value)
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return False
        return all(fits(element, shape.get(key, shape.get("*", object))) for key, element in value.items())
    return isinstance(value, shape)


def finite(value):
    """Return whether a JSON value is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def read_json(path, shapes):
    """Parse a JSON file, an object. Raises: SystemExit naming the file when it is not whole or has another shape."""
    value = system.read_json(path, "run_eval.sh")
    for key, shape in shapes.items():
        if key in value and not fits(value[key], shape):
            raise SystemExit(f"{path}: its {key} doesn't have the form that lm_eval 0.4 writes. Run run_eval.sh again.")
    return value


def read_parts(folder):
    """Return {Path of a results file: its dict} of the run in `folder`, in order.

    Raises: SystemExit for a missing folder, no results, broken JSON, or a JSON that is not lm_eval's.
    """
    if not folder.is_dir():
        raise SystemExit(f"There is no folder {folder}. `bash run_eval.sh before` and `after` write the two runs.")
    files = sorted(folder.rglob("results_*.json"))  # lm_eval writes into a folder named after the model
    if not files:
        raise SystemExit(f"No results_*.json under {folder}: lm_eval did not finish there. Run run_eval.sh again.")
    parts = {}
    for file in files:
        part = read_json(file, RESULTS)
        missing = [key for key in ALWAYS_THERE if key not in part]
        if missing:
            raise SystemExit(
                f"{file} is not a results file of lm_eval 0.4: it has no {', '.join(missing)}. Run run_eval.sh again."
            )
        parts[file] = part
    return parts


def read_run(folder):
    """Read the results of a run folder: one file of lm_eval's, or one for each task.

    Returns: lm_eval's results dict with three more keys: `folder` (Path), `file_of` ({task: Path of its results}) and
    `record` (run.json or {}).
    Raises: SystemExit if `read_parts` does, if a task was measured twice, or if parts were measured differently.
    """
    folder = Path(folder)
    parts = read_parts(folder)
    first_file = min(parts)
    first = parts[first_file]
    run = {**first, "folder": folder, "file_of": {}}
    for key in BY_TASK:
        run[key] = {}
    for file, part in parts.items():
        for task, entry in part["results"].items():
            other = run["file_of"].setdefault(task, file)
            if run["results"].get(task, entry) != entry:
                raise SystemExit(f"{folder} holds two results of {task}: {other} and {file}. Move one of them away.")
        different = shared_differences(conditions(first), conditions(part), "there", "here")
        if different:
            raise SystemExit(
                f"{first_file} and {file} are parts of one run that were measured differently: "
                f"{'; '.join(different)}. Move one of them away."
            )
        for key in BY_TASK:
            run[key].update(part.get(key, {}))
    batch_sizes = [part["config"].get("batch_sizes") for part in parts.values()]
    run["config"] = {**first["config"], "batch_sizes": batch_sizes}
    record = folder / "run.json"
    run["record"] = read_json(record, RECORD) if record.exists() else {}
    return run


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
                raise SystemExit(
                    f"{path}, line {number}, is not a logged question of lm_eval. Run run_eval.sh again."
                ) from None
            if broken:
                raise SystemExit(
                    f"{path}, line {number}: the model answered NaN; its weights or its dtype are broken. Check the "
                    "model, then measure it again; DTYPE=float32 shows whether the dtype is the cause."
                )
    return samples


# ==== Were the two runs measured in the same way? ====


def shared_differences(first, second, first_label, second_label):
    """Return the phrases of `system.differences` for the names that both dicts have."""
    names = [name for name in first if name in second]
    return system.differences(
        {name: first[name] for name in names}, {name: second[name] for name in names}, first_label, second_label
    )


def conditions(part):
    """Return {what: value} of what must be equal in all results that are compared, whatever their task."""
    config = part["config"]
    arguments = config.get("model_args", {})
    if isinstance(arguments, str):
        arguments = dict(pair.partition("=")[::2] for pair in arguments.split(","))
    values = {
        "lm_eval": part["lm_eval_version"],
        "model arguments": {name: value for name, value in arguments.items() if name != "pretrained"},
    }
    for name in ("limit", "model_dtype", "gen_kwargs", "random_seed", "numpy_seed", "torch_seed", "fewshot_seed"):
        values[name] = config.get(name)
    for name in ("chat_template_sha", "system_instruction_sha", "fewshot_as_multiturn", "max_length"):
        values[name] = part.get(name)
    return values


def must_match(run):
    """Return {what: value} of what must be equal in both runs of a comparison."""
    values = {"tasks": ", ".join(sorted(run["results"])), **conditions(run)}
    if "adds_bos" in run["record"]:
        values["BOS put before each prompt"] = run["record"]["adds_bos"]
    if "ids_sha256" in run["record"]:
        values["digest of the token ids of a text"] = run["record"]["ids_sha256"]
    # The task hash covers every question, prompt and target, so also few-shot examples and templates.
    for name, key in (("version", "versions"), ("few-shot", "n-shot"), ("hash of the prompts", "task_hashes")):
        for task, value in run[key].items():
            values[f"{name} of {task}"] = value
    return values


def may_differ(run):
    """Return {what: value} of what may differ between two runs, but can move scores a little."""
    return {
        "batch_size": run["config"].get("batch_size"),
        "batch_sizes": run["config"].get("batch_sizes"),
        "transformers": run.get("transformers_version"),
        "device's name": run["record"].get("device"),
        "torch": run["record"].get("versions", {}).get("torch"),
    }


def weights_of(run):
    """Return {file name: SHA-256} of the weights that a run measured, {} if it doesn't say."""
    files = run["record"].get("files_sha256", {})
    return {name: digest for name, digest in files.items() if name.endswith(".safetensors")}


def check_comparable(before, after):
    """Compare how two runs were measured.

    Returns: list of sentences: what differs and may move scores a little, and what looks wrong with a run.
    Raises: SystemExit listing the differences that make the scores incomparable.
    """
    different = shared_differences(must_match(before), must_match(after), "before", "after")
    if different:
        lines = different[:SHOWN_DIFFERENCES]
        if len(different) > SHOWN_DIFFERENCES:
            lines.append(f"and {len(different) - SHOWN_DIFFERENCES} more")
        raise SystemExit(
            f"{before['folder']} and {after['folder']} were measured differently, so they cannot be compared:\n  "
            + "\n  ".join(lines)
            + "\nMeasure one of them again with the settings of the other."
        )
    notes = []
    other = may_differ(after)
    for name, value in may_differ(before).items():
        if value != other[name]:
            notes.append(f"{name} differs ({value} before, {other[name]} after); scores can move slightly with it.")
    if weights_of(before) and weights_of(before) == weights_of(after):
        notes.append("both runs measured the very same weights.")
    if names := after["record"].get("not_decontaminated"):
        notes.append(
            f"the data was not decontaminated against {', '.join(names)}: their scores may count answers that were "
            "trained on."
        )
    for side, run in (("before", before), ("after", after)):
        perplexity = run["results"].get("lambada_openai", {}).get("perplexity,none")
        if finite(perplexity) and perplexity > CANNOT_READ:
            notes.append(
                f"{side}: Lambada's perplexity is that of a model that cannot read plain text. Such a model is usually "
                "a broken import or export (rotary layout, key names, tokenizer), not a weak one."
            )
    return notes


# ==== Scores ====


def value_of(run, task, key):
    """Return the metric's value and its standard error, None if lm_eval gives none. key: "metric,filter".

    Raises: SystemExit if the value is missing or no number that a score can have.
    """
    metric, _, filter_name = key.partition(",")
    value = run["results"][task].get(key)
    if not finite(value) or (metric == "perplexity" and value <= 0):
        problem = "is missing" if value is None else f"is {value}"
        raise SystemExit(
            f"The metric {metric} of {task} {problem} in {run['file_of'][task]}. A model with broken weights gives NaN "
            "or infinity; a task that stopped half way leaves it out. Measure it again."
        )
    stderr = run["results"][task].get(f"{metric}_stderr,{filter_name}")
    return value, stderr if finite(stderr) else None


def leaves(run, task):
    """Return the tasks below a group, in order; a task itself."""
    children = run["group_subtasks"].get(task)
    if not children:
        return [task]
    return [leaf for child in children for leaf in leaves(run, child)]


def pair_questions(before, after, tasks, filter_name, cache):
    """Return the logged questions of both runs in pairs, list of (task, sample before, sample after), for one filter.

    cache: {task: both runs' samples}, filled here. Raises: SystemExit if the runs answered different questions.
    """
    pairs = []
    for task in tasks:
        if task not in cache:
            cache[task] = read_samples(before, task), read_samples(after, task)
        first, second = ({doc: s for (name, doc), s in side.items() if name == filter_name} for side in cache[task])
        if set(first) != set(second):
            raise SystemExit(
                f"The logged questions of {task} differ between the runs; a file was cut or edited. Run run_eval.sh "
                "again."
            )
        for doc in sorted(first):
            pairs.append((task, first[doc], second[doc]))
    return pairs
