"""The model card of an export: what it was trained on and how, what that changed, how to chat. Used by export_hf.py."""

import json
import shutil
from pathlib import Path

from sft import system

TRAINING = "training.json"
LICENCES = {  # as their pages state them; the licence of the base model and of your own files is yours to add
    "HuggingFaceTB/smoltalk": "Apache-2.0",
    "teknium/OpenHermes-2.5": "none stated; collected from sources with their own",
    "allenai/tulu-3-sft-mixture": "ODC-BY-1.0; parts have their own, one is CC-BY-NC-4.0",
    "meta-math/MetaMathQA": "MIT",
}
RECIPE = ("SEQUENCES_PER_STEP", "EPOCHS", "MAX_STEPS", "LEARNING_RATE", "MIN_LEARNING_RATE", "WARMUP_STEPS")
RECIPE += ("ADAM_BETA1", "ADAM_BETA2", "WEIGHT_DECAY", "MAX_GRAD_NORM", "COMPUTE_DTYPE", "SEED")
CHAT = """## Chat

ChatML; the template is in the tokenizer, and generation stops at `<|im_end|>`.

```python
from transformers import pipeline
chat = pipeline("text-generation", model=".")
print(chat([{"role": "user", "content": "Who are you?"}], max_new_tokens=200)[0]["generated_text"][-1])
```

In a terminal: `python chat.py --export-dir FOLDER`, with this folder.
"""


def metrics(run_folder, step):
    """Return (last training loss, [validation losses in order]) up to `step` from metrics.jsonl, or (None, [])."""
    path = Path(run_folder) / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    lines = [json.loads(line) for line in lines if line.endswith("\n")]  # a kill may cut the last one off
    lines = [line for line in lines if line["step"] <= step]
    losses = [line["loss"] for line in lines if line.get("loss") is not None]
    held_out = [line["validation_loss"] for line in lines if line.get("validation_loss") is not None]
    return (losses[-1] if losses else None), held_out


def origins(report):
    """Return the table of the sources in `report` (dict of report.json): where each came from and its licence."""
    mixture = report["settings"]["MIXTURE"]
    if isinstance(mixture, str):
        try:
            mixture = json.loads(Path(mixture).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            mixture = []  # moved since; the names below are still true
    entries = {entry["name"]: entry for entry in mixture}
    lines = ["| source | from | licence |", "|---|---|---|"]
    for line in report["sources"]:
        entry = entries.get(line["name"], {})
        place, revision = entry.get("hub"), line.get("revision")
        where = f"{place}{f' at {revision[:12]}' if revision else ''}" if place else entry.get("path", "unknown")
        licence = LICENCES.get(place, "see its page") if place else "of your own file: add it"
        lines.append(f"| {line['name']} | {where} | {licence} |")
    return lines


def data(facts):
    """Return the card's lines about the data, none if the folder DATA_DIR is no longer what the run was trained on."""
    path = Path(facts["settings"]["DATA_DIR"]) / "report.json"
    if not path.is_file():
        return []
    report = system.read_json(path, "prepare_data.py")
    if facts["fingerprints"]["data"] != json.dumps(report.get("digest"), sort_keys=True):
        return []
    table = path.with_suffix(".md").read_text(encoding="utf-8")
    return ["## Data", "", table, *origins(report), ""]


def evaluation(results, folder):
    """Copy the chart and return the lines of the comparison in `results`, if it measured the weights in `folder`."""
    results, page = Path(results), Path(results) / "comparison.md"
    run = results / "after" / "run.json"
    if not page.is_file() or not run.is_file():
        return []
    measured = system.read_json(run, "run_eval.sh").get("files_sha256", {})
    if any(measured.get(path.name) != system.sha256(path) for path in folder.glob("*.safetensors")):
        return []
    text = page.read_text(encoding="utf-8").splitlines()[1:]
    lines = ["## Before and after", "", *("#" + line if line.startswith("#") else line for line in text), ""]
    if (results / "comparison.png").is_file():
        shutil.copyfile(results / "comparison.png", folder / "comparison.png")
        lines += ["![Before and after, by task](comparison.png)", ""]
    return lines


def describe(checkpoint, state, parameters, dtype_name):
    """Return the dict of training.json. state: dict of the state of the `checkpoint` (Path)."""
    return {"checkpoint": str(checkpoint), "state": state, "parameters": parameters, "dtype": dtype_name}


def write(folder, results):
    """Write README.md into the export `folder` from its training.json, and the pictures it shows."""
    folder = Path(folder)
    training = system.read_json(folder / TRAINING, "export_hf.py")
    checkpoint, facts = Path(training["checkpoint"]), training["state"]
    count, dtype_name, run = training["parameters"], training["dtype"], facts["settings"]
    loss, held_out = metrics(checkpoint.parent, facts["step"])
    lines = [
        "---",
        "pipeline_tag: text-generation",
        "library_name: transformers",
        "---",
        "# A chat model by supervised fine-tuning",
        "",
        f"{count:,} parameters, {dtype_name}; from `{facts['base_model']}`, checkpoint `{checkpoint.name}` "
        f"({facts['updates']:,} optimizer steps).",
        "",
        *evaluation(results, folder),
        *data(facts),
        "## Recipe",
        "",
        *(f"- {name}: {run[name]}" for name in RECIPE),
    ]
    if loss is not None:
        lines.append(f"- last training loss: {loss:.4f}")
    if held_out:
        lines.append(f"- validation loss: {held_out[0]:.4f} at first, {held_out[-1]:.4f} at last")
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    lines += [f"- versions: {versions}; {facts['world_size']} processes", ""]
    if (checkpoint.parent / "loss.png").is_file():
        shutil.copyfile(checkpoint.parent / "loss.png", folder / "loss.png")
        lines += ["![Loss by optimizer step](loss.png)", ""]
    system.write_whole(folder / "README.md", "\n".join([*lines, CHAT]))
