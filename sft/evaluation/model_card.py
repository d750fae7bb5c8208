"""The model card of an export: how the model was trained, on what, what that changed, and how to chat with it.

export_hf.py writes what `describe` returns into the export as training.json (`write_first`). `write` makes the
README.md from that file and the evaluation's results; run_eval.sh calls it again when the results are there.
"""

import json
from pathlib import Path

from sft import system, text

# ==== Constants ====

TRAINING = "training.json"  # what the card needs of the training run; a folder that holds it is an export
LICENCES = {  # as their pages state them; the licence of the base model and of your own files is yours to add
    "HuggingFaceTB/smoltalk": "Apache-2.0",
    "teknium/OpenHermes-2.5": "none stated; collected from sources with their own",
    "allenai/tulu-3-sft-mixture": "ODC-BY-1.0; parts have their own, one is CC-BY-NC-4.0",
    "meta-math/MetaMathQA": "MIT",
    "HuggingFaceTB/smol-smoltalk": "Apache-2.0",
    "allenai/tulu-3-sft-olmo-2-mixture-0225": "none stated; parts have their own, some of them non-commercial",
    "allenai/Dolci-Instruct-SFT": "ODC-BY-1.0",
}
RECIPE = (
    "SEQUENCES_PER_STEP",
    "EPOCHS",
    "MAX_STEPS",
    "LEARNING_RATE",
    "MIN_LEARNING_RATE",
    "WARMUP_STEPS",
    "ADAM_BETA1",
    "ADAM_BETA2",
    "WEIGHT_DECAY",
    "MAX_GRAD_NORM",
    "COMPUTE_DTYPE",
    "SEED",
)
CURVES = ("loss", "lr", "grad_norm", "tokens_per_second")  # of each step, kept for report.html
CURVE_POINTS = 300
CHAT = """## Chat

ChatML; the template is in the tokenizer, and generation stops at `<|im_end|>`.

```python
from transformers import pipeline
chat = pipeline("text-generation", model=".")
print(chat([{"role": "user", "content": "Who are you?"}], max_new_tokens=200)[0]["generated_text"][-1])
```

In a terminal: `python chat.py --export-dir FOLDER`, with this folder. For Ollama, see the first lines of `Modelfile`.
"""

# ==== What the export keeps of the training run ====


def describe(source, state, weights, parameters, dtype_name):
    """Return the content of training.json, a dict.

    source: what is exported, with `checkpoints` (Paths, latest first), `base_share` (0 to 1) and `resized` (folder that
    the run started from); state: dict of the latest checkpoint's state.json; weights: {file name: SHA-256} of the
    safetensors in `resized`; parameters: their number in the export; dtype_name: of the exported weights.
    """
    checkpoint = source.checkpoints[0]
    metrics = system.read_lines(checkpoint.parent / "metrics.jsonl")
    lines = [line for line in metrics if line["step"] <= state["step"]]  # the run may have gone on since
    return {
        "checkpoint": checkpoint.name,
        "averaged": [path.name for path in source.checkpoints],
        "base_share": source.base_share,
        "parameters": parameters,
        "dtype": dtype_name,
        "state": state,
        "losses": read_losses(lines),
        "curves": read_curves(lines),
        "run": read_run(lines, state),
        "data": read_data(state),
        "weights_sha256": read_base(Path(source.resized), weights),
    }


def read_base(resized, weights):
    """Return {"base" | "resized": {file name: SHA-256}} of the weights of the base, and of the folder made from it.

    resized: that folder; weights: its digests. "base" is None unless the resize.json there belongs to these weights and
    names the base's.
    """
    base = None
    if (resized / "resize.json").is_file():
        named = system.read_json(resized / "resize.json", "resize_vocab.py").get("weights_sha256")
        if isinstance(named, dict) and named.get("resized") == weights:
            base = named.get("base")
    return {"base": base, "resized": weights}


def is_own_file(path):
    """Return whether the Path is a file and no link: a link may lead to a private file, and an export is published."""
    return path.is_file() and not path.is_symlink()


def read_losses(lines):
    """Return a dict of the losses in `lines` of metrics.jsonl: `last_training`, `first_` and `last_validation`.

    `first_bits_per_byte` and `last_bits_per_byte` are those of the validation. What the lines don't have is None.
    """
    training = [line["loss"] for line in lines if line.get("loss") is not None]
    validated = [line for line in lines if line.get("validation_loss") is not None]
    first, last = (validated[0], validated[-1]) if validated else ({}, {})
    return {
        "last_training": training[-1] if training else None,
        "first_validation": first.get("validation_loss"),
        "last_validation": last.get("validation_loss"),
        "first_bits_per_byte": first.get("validation_bits_per_byte"),
        "last_bits_per_byte": last.get("validation_bits_per_byte"),
    }


def read_curves(lines):
    """Return {name: [[step, value], ...]} of what `lines` of metrics.jsonl have to draw, at most CURVE_POINTS each.

    A point stands for several steps and is their mean.
    """
    curves = {}
    for line in lines:
        for name, value in line.items():
            if (name in CURVES or name.startswith("validation_loss")) and value is not None:
                curves.setdefault(name, []).append((line["step"], value))
    for name, points in curves.items():
        size = -(-len(points) // CURVE_POINTS)
        groups = [points[start : start + size] for start in range(0, len(points), size)]
        curves[name] = [[group[-1][0], sum(value for _, value in group) / len(group)] for group in groups]
    return curves


def read_run(lines, state):
    """Return what a run took: `tokens`, `seconds` of its steps, and how often it was `continued` from a checkpoint."""
    return {
        "tokens": sum(line.get("tokens", 0) for line in lines),
        "seconds": round(sum(line.get("step_seconds", 0) for line in lines), 1),
        "continued": len(state["history"]),
    }


def read_data(state):
    """Return what is said about the data, a dict: `table` (Markdown), `sources` (dicts), `report` (its numbers).

    It is None if DATA_DIR no longer holds what the run was trained on, or a report is a link to a file elsewhere.
    """
    path = Path(state["settings"]["DATA_DIR"]) / "report.json"
    if not all(is_own_file(one) for one in (path, path.with_suffix(".md"))):
        return None
    report = system.read_json(path, "prepare_data.py")
    if state["fingerprints"]["data"] != json.dumps(report.get("digest"), sort_keys=True):
        return None
    return {
        "table": path.with_suffix(".md").read_text(encoding="utf-8"),
        "sources": read_sources(report),
        "report": {name: report[name] for name in ("sources", "totals", "max_seq_len", "digest", "settings")},
    }


def read_sources(report):
    """Return a dict of `name`, `origin` and `licence` for each source in `report`, the dict of report.json."""
    mixture = report["settings"]["MIXTURE"]
    if isinstance(mixture, str):
        try:
            mixture = json.loads(Path(mixture).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            mixture = []  # the file was moved since; the names are still true
    entries = {entry["name"]: entry for entry in mixture}
    sources = []
    for line in report["sources"]:
        entry = entries.get(line["name"], {})
        dataset = entry.get("hub")
        if dataset:
            revision = line.get("revision")
            origin = f"{dataset} at {revision[:12]}" if revision else dataset
            licence = LICENCES.get(dataset, "see its page")
        else:
            origin = entry.get("path", "unknown")
            licence = "of your own file: add it"
        sources.append({"name": line["name"], "origin": origin, "licence": licence})
    return sources


# ==== The card ====


def why_not_shown(folder, training, results):
    """Return why the comparison in the folder `results` is not one of the export `folder`, a phrase, or None if it is.

    training: dict of its training.json. compare_evals.py writes the digests of the weights and of its page into
    comparison.json. A part may compare with the base or with the resized base, which both come before.
    """
    record = results / "comparison.json"
    if not record.is_file():
        return f"there is no {record}"
    comparison = system.read_json(record, "run_eval.sh compare")
    path, digest = results / "comparison.md", comparison.get("files_sha256", {}).get("comparison.md")
    if not path.is_file() or system.sha256(path) != digest:
        return f"{path} is not the one that {record} was written with"
    weights, trained_from = system.weight_digests(folder), training.get("weights_sha256", {})
    for part in comparison["parts"]:
        if part["weights"]["after"] != weights:
            return f"{record} is about other weights than those in {folder}"
        if not trained_from.get("base"):
            return f"{folder / TRAINING} doesn't name the base: run resize_vocab.py again, then export_hf.py"
        if part["weights"]["before"] not in trained_from.values():
            return (
                f"{record} ({part['title']}) compares with another model than the one that {folder} was trained from: "
                "measure `before` again"
            )
    return None


def evaluation_section(results):
    """Return the lines of the comparison in the folder `results`."""
    lines = ["## Before and after", ""]
    for line in (results / "comparison.md").read_text(encoding="utf-8").splitlines()[1:]:
        lines.append("#" + line if line.startswith("#") else line)  # one level below the card's own headings
    return [*lines, ""]


def data_section(data):
    """Return the lines about the data. data: what `read_data` returned."""
    if data is None:
        return []
    lines = ["## Data", "", data["table"], "| source | from | licence |", "|---|---|---|"]
    for source in data["sources"]:
        cells = (text.table_cell(source[column]) for column in ("name", "origin", "licence"))
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def recipe_section(training):
    """Return the lines about the training run. training: dict of training.json."""
    state, losses = training["state"], training["losses"]
    lines = ["## Recipe", ""]
    for name in RECIPE:
        lines.append(f"- {name}: {state['settings'][name]}")
    if losses["last_training"] is not None:
        lines.append(f"- last training loss: {losses['last_training']:.4f}")
    if losses["first_validation"] is not None:
        lines.append(
            f"- validation loss: {losses['first_validation']:.4f} at first, {losses['last_validation']:.4f} at last"
        )
    first, last = (losses.get(f"{when}_bits_per_byte") for when in ("first", "last"))
    if None not in (first, last):
        lines.append(f"- in bits per byte of the text: {first:.4f} at first, {last:.4f} at last")
    versions = ", ".join(f"{name} {version}" for name, version in state["versions"].items())
    return [*lines, f"- versions: {versions}; {state['world_size']} processes", ""]


def origin(training):
    """Return which weights these are, a phrase. training: dict of training.json."""
    phrase = f"checkpoint `{training['checkpoint']}` ({training['state']['updates']:,} optimizer steps)"
    if len(training["averaged"]) > 1:
        names = ", ".join(f"`{name}`" for name in training["averaged"])
        phrase = f"the mean of the checkpoints {names} ({training['state']['updates']:,} optimizer steps in the first)"
    if training["base_share"]:
        phrase += f", moved {training['base_share']:g} of the way back to the base's weights"
    return phrase


def write_first(folder, checkpoint, training):
    """Write training.json, the loss curve and the card into a new export `folder`.

    checkpoint: Path of the checkpoint's folder; training: what `describe` returned. The curve is copied here only:
    later the run may have gone on, or another may stand in its place.
    """
    system.write_whole(folder / TRAINING, json.dumps(training, indent=1) + "\n")
    curve = checkpoint.parent / "loss.png"
    if is_own_file(curve):
        system.write_whole(folder / "loss.png", curve.read_bytes())
    write(folder)


def write(folder, results=None):
    """Write README.md into the export `folder`.

    It reads training.json there, and the comparison in the folder `results` (None: there is none yet) if that is one
    of these weights and of those that the run started from. Returns: why the card has no comparison, a phrase, or None
    if it has.
    """
    folder = Path(folder)
    training = system.read_json(folder / TRAINING, "export_hf.py")
    missing = why_not_shown(folder, training, Path(results)) if results else "it is not measured yet"
    state = training["state"]
    lines = [
        "---",
        "pipeline_tag: text-generation",
        "library_name: transformers",
        "---",
        "# A chat model by supervised fine-tuning",
        "",
        f"{training['parameters']:,} parameters, {training['dtype']}; from `{state['settings']['RESIZED_MODEL']}`, "
        f"{origin(training)}.",
        "",
        *([] if missing else evaluation_section(Path(results))),
        *data_section(training["data"]),
        *recipe_section(training),
    ]
    if (folder / "loss.png").is_file():
        lines += ["![Loss by optimizer step](loss.png)", ""]
    system.write_whole(folder / "README.md", "\n".join([*lines, CHAT]))
    return missing
