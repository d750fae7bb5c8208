"""The Python part of run_eval.sh: what happens before and after lm_eval.

    python -m sft.evaluation.run_eval start                check everything that can fail early; open the unfinished run
    python -m sft.evaluation.run_eval finish               run the built-in check, publish the results, report
    python -m sft.evaluation.run_eval compare [NAME...]    write the report and the model card

run_eval.sh passes all its settings in the environment, and between `start` and `finish` it calls lm_eval for each task.
`start` tells it what to do in two lists in the folder of the unfinished run (STAGING): `devices` and `todo`.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from sft import eval_tasks, settings, system
from sft.evaluation import compare_evals, model_card, report_page

# ==== Constants ====

FREE_BYTES_NEEDED = 2**30  # bytes; the logged questions of the seven tasks need less
SETTING_PATTERNS = {
    "LIMIT": r"(\d+|0?\.\d+)?",
    "FEWSHOT": r"\d*",
    "SEEDS": r"\d+(,\d+){3}",
    "CHAT_TEMPLATE": "[01]",
    "CHECK_READING": "[01]",
    "TASKS": r"(\w[\w.-]*(,\w[\w.-]*)*)?",
}
RECORDED = ("INCLUDE_PATH", "FEWSHOT", "LIMIT", "CHAT_TEMPLATE", "DTYPE", "BATCH_SIZE", "SEEDS", "MODEL_ARGS")
# Model arguments that say which model is measured: run.json holds the folder and the digests of its files instead.
NOT_IN_MODEL_ARGS = ("pretrained", "tokenizer", "peft", "delta", "gguf_file", "revision", "subfolder", "dtype")
# Text that tokenizers split differently; it follows reading_check's passage.
SPLIT_DIFFERENTLY = "\n\n I'LL pay 1234567 dollars, won't I?\r\n\n\tx = {'a': [10, 20]}\n   Straße, 你好, 🙂\n"
PACKAGES = ("lm_eval", "torch", "transformers", "tokenizers", "datasets")
# Only `start` needs torch and transformers. They take seconds to import, so the functions that use them do that.


def refuse(sentence):
    sys.exit(f"run_eval.sh: {sentence}")


# ==== Everything that can fail early ====


def check_settings(args):
    """Exit unless each setting in `args` has a legal form."""
    for setting, pattern in SETTING_PATTERNS.items():
        if not re.fullmatch(pattern, args[setting]):
            refuse(f"{setting}={args[setting]} is not valid; see the comment next to {setting} in run_eval.sh.")
    names = [pair.partition("=")[0].strip() for pair in args["MODEL_ARGS"].split(",")]
    if decided := [name for name in names if name in NOT_IN_MODEL_ARGS]:
        refuse(
            f"MODEL_ARGS sets {', '.join(decided)}, so run.json would describe another model than the measured one. "
            "Name the model's folder (BASE_MODEL, EXPORT_DIR or MODEL_DIR) and its DTYPE instead."
        )
    if args["INCLUDE_PATH"] and not Path(args["INCLUDE_PATH"]).is_dir():
        refuse(f"no folder {args['INCLUDE_PATH']} (INCLUDE_PATH).")


def list_devices(setting):
    """Return the list of devices that DEVICE names, each "cpu", "cuda" or "cuda:N". Exits if one does not exist."""
    import torch

    gpus = torch.cuda.device_count()
    remedy = "DEVICE=cpu works too, slowly."
    if gpus == 0 and (problem := system.unused_card(torch)):
        remedy = f"{problem} {remedy}"
    if setting == "gpus":
        if gpus == 0:
            refuse(f"torch sees no GPU. {remedy}")
        return [f"cuda:{number}" for number in range(gpus)]
    devices = setting.split(",")
    for device in devices:
        if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
            refuse(f"DEVICE={setting}: {device!r} must be gpus, cpu or cuda:N.")
        if device != "cpu" and int(device.partition(":")[2] or 0) >= gpus:
            refuse(f"DEVICE={setting}, but torch sees {gpus} GPUs. {remedy}")
    return devices


def device_name(device):
    """Return the name of the hardware behind `device`, as far as the system knows one."""
    if device == "cpu":
        return platform.processor() or device
    import torch

    return torch.cuda.get_device_name(device)


def tasks_to_measure(args):
    """Return the list of tasks that TASKS names, each once, or those of sft/eval_tasks.py."""
    if args["TASKS"]:
        return list(dict.fromkeys(args["TASKS"].split(",")))
    return list(eval_tasks.CHAT if args["CHAT_TEMPLATE"] == "1" else eval_tasks.PLAIN)


def not_decontaminated(tasks, data_dir):
    """Return those of `tasks` that the data in `data_dir` was not decontaminated against; print a warning of them.

    Before prepare_data.py has written that folder there are none.
    """
    path = Path(data_dir) / "report.json"
    if not data_dir or not path.is_file():
        return []
    compared = set()
    for row in system.read_json(path, "prepare_data.py").get("evaluation", []):
        compared |= {row["task"], *row.get("parts", ())}
    names = [task for task in tasks if task not in compared]
    if names:
        print(
            f"run_eval.sh: WARNING: {data_dir} was not decontaminated against {', '.join(names)}: a model trained on "
            "it may have seen the answers. Prepare it again with these tasks in --decontaminate-against.",
            flush=True,
        )
    return names


def check_tasks(tasks, include_path):
    """Exit unless lm_eval knows all of `tasks`. It reads all its task definitions for that, which takes 12 s."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=include_path or None)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        refuse(f"lm_eval knows no task {', '.join(unknown)}. TASKS names lm_eval's; INCLUDE_PATH adds your own.")


def check_ifeval():
    """Exit unless everything is there that ifeval needs to score its answers, which it does after all the work."""
    try:
        from lm_eval.tasks.ifeval import instructions_util  # downloads what is missing, if it can

        instructions_util.nltk.data.find("tokenizers/punkt_tab")
    except (ImportError, LookupError):
        refuse(
            "ifeval needs the packages of requirements.txt, and nltk's data set punkt_tab: `python -m nltk.downloader "
            "punkt_tab`, or set NLTK_DATA to a folder that holds tokenizers/punkt_tab."
        )


def digest_of_ids(model, tokenizer):
    """Return the SHA-256 of the ids that lm_eval will make of a text; exit if training makes others of it.

    model: Path; tokenizer: its HF tokenizer. lm_eval loads it by the class that tokenizer_config.json names, which may
    replace parts of tokenizer.json (GPT2Tokenizer its pre-tokenizer). Training takes tokenizer.json as it is.
    """
    from sft import hf_folder
    from sft.evaluation import reading_check

    text = reading_check.PASSAGE.read_text(encoding="utf-8") + SPLIT_DIFFERENTLY
    ids = tokenizer(text, add_special_tokens=False).input_ids
    if (model / "tokenizer.json").is_file():
        backend = hf_folder.load_tokenizer(model)
        backend.no_truncation()
        backend.no_padding()
        trained = backend.encode(text, add_special_tokens=False).ids
        if ids != trained:
            refuse(
                f"{model}: the class in its tokenizer_config.json ({type(tokenizer).__name__}) makes {len(ids)} ids of "
                f"a text, its tokenizer.json {len(trained)} others. Training uses tokenizer.json: set tokenizer_class "
                "to PreTrainedTokenizerFast in tokenizer_config.json, so that before and after get the same ids."
            )
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()


def describe_model(model, args):
    """Return what run.json holds of the model folder, the settings and the versions; exit if the folder is not whole.

    model: Path.
    """
    from transformers import AutoTokenizer

    from sft import hf_folder

    for file in ("config.json", "tokenizer_config.json"):
        if not (model / file).is_file():
            refuse(
                f"no {file} in the model folder {model}. It must be a Hugging Face folder such as export_hf.py writes; "
                "BASE_MODEL and EXPORT_DIR name the folders of before and after."
            )
    if not any(model.glob("*.safetensors")):
        refuse(f"no *.safetensors in the model folder {model}: its weights are missing.")
    config = hf_folder.load_config(model, "Write the folder again with the script that made it.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers each raise their own
        refuse(f"the tokenizer in {model} does not load: {error}")
    if len(tokenizer) > config.vocab_size:
        refuse(
            f"the tokenizer in {model} has {len(tokenizer):,} tokens, but the model {config.vocab_size:,} rows. Write "
            "the folder again with the script that made it."
        )
    if args["CHAT_TEMPLATE"] == "1" and not tokenizer.chat_template:
        refuse(f"CHAT_TEMPLATE=1, but the tokenizer in {model} has no chat template.")
    files = sorted(path for pattern in ("*.safetensors", "*.json", "*.jinja") for path in model.glob(pattern))
    versions = {package: importlib.metadata.version(package) for package in PACKAGES}
    return {
        "model": str(model),
        "files_sha256": {path.name: system.sha256(path) for path in files},
        "adds_bos": tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id],  # lm_eval does as the tokenizer does
        "ids_sha256": digest_of_ids(model, tokenizer),
        "settings": {name: args[name] for name in RECORDED},
        "versions": {"python": platform.python_version(), **versions},
    }


def check_reading(model, must_read):
    """Print how well the model reads plain text; exit if it does not load, or does not read though it must."""
    from sft.evaluation import reading_check

    line, reads = reading_check.check_folder(model)
    print(f"run_eval.sh: {line}", flush=True)
    if must_read and not reads:
        refuse(f"{model} cannot read plain text. {reading_check.CAUSES} Set CHECK_READING=0 to measure it anyway.")


def wants_assistant_check(model, args):
    """Return whether the built-in check follows the tasks: not before training, and not in the chat pass.

    Exits if it should follow those of `after` and cannot.
    """
    from sft.evaluation import assistant_check

    if not args["DATA_DIR"] or args["NAME"] == "before" or args["CHAT_TEMPLATE"] == "1":
        return False
    data_tokenizer = Path(args["DATA_DIR"]) / "tokenizer"
    problem = assistant_check.other_tokenizer(data_tokenizer, Path(args["RESIZED_MODEL"]), model)
    if problem and args["NAME"] == "after":
        refuse(f"{problem} Set DATA_DIR= (empty) to skip the built-in check.")
    if problem:
        print(f"run_eval.sh: without the built-in check: {problem}")
    return problem is None


# ==== Start ====


def must_stay(record):
    """Return {what: value} of what must stay the same while a run is unfinished. record: dict of run.json."""
    values = {name: record.get(name) for name in ("model", "adds_bos", "device")}
    for part in ("files_sha256", "settings", "versions"):
        values.update(record.get(part, {}))
    return values


def check_resume(staging, record, finished):
    """Exit unless the unfinished run in `staging` was started with what `record` says. finished: list of its tasks."""
    earlier = system.read_json(staging / "run.json", "run_eval.sh")
    different = system.differences(must_stay(earlier), must_stay(record), "there", "now")
    if different:
        refuse(
            f"{staging} was started with other settings: {'; '.join(different)}. Use the same settings, or remove "
            "that folder to start over."
        )
    unnamed = sorted(set(finished) - set(record["tasks"]))
    if unnamed:
        refuse(f"{staging} holds finished tasks that TASKS does not name: {', '.join(unnamed)}. Name them too.")
    print(f"run_eval.sh: continuing; finished already: {', '.join(finished)}", flush=True)


def check_all(args):
    """Exit with a sentence if something is wrong with the settings, the model, the disk or lm_eval's tasks.

    Returns: (dict for run.json, list of devices, list of tasks that are not finished).
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    staging, model = Path(args["STAGING"]), Path(args["MODEL"])
    result = staging.parent / args["NAME"]
    if result.is_symlink() or result.is_mount():
        refuse(
            f"{result} is a link or a mount point; finished results are renamed to it, which cannot replace it. Remove "
            "it, and make EVAL_RESULTS the link or mount point instead."
        )
    if result.is_dir() and any(result.iterdir()):
        refuse(
            f"{result} already holds results. Move them away first (mv {result} {result}-old) or choose another name."
        )
    check_settings(args)
    devices = list_devices(args["DEVICE"])
    tasks = tasks_to_measure(args)
    record = describe_model(model, args)
    record["tasks"] = tasks
    record["not_decontaminated"] = not_decontaminated(tasks, args["DATA_DIR"])
    record["device"] = device_name(devices[0])
    record["assistant_check"] = wants_assistant_check(model, args)
    if shutil.disk_usage(staging).free < FREE_BYTES_NEEDED:
        refuse(f"less than 1 GiB free for {staging}; the logged questions of the seven tasks need that.")
    finished = sorted(path.name for path in staging.iterdir() if path.is_dir() and path.suffix != ".unfinished")
    if finished:
        check_resume(staging, record, finished)
    check_reading(model, args["CHECK_READING"] == "1")
    if "ifeval" in tasks:
        check_ifeval()
    check_tasks(tasks, args["INCLUDE_PATH"])
    return record, devices, [task for task in tasks if task not in finished]


def start(args):
    """Check everything, then write run.json and the lists for run_eval.sh."""
    record, devices, todo = check_all(args)
    staging = Path(args["STAGING"])
    system.write_whole(staging / "run.json", json.dumps(record, indent=2) + "\n")
    system.write_whole(staging / "devices", "".join(f"{device}\n" for device in devices))
    system.write_whole(staging / "todo", "".join(f"{task}\n" for task in todo))


# ==== Finish ====


def run_assistant_check(staging, args):
    """Run the built-in check in a process of its own, with the flags of ASSISTANT_FLAGS. Returns: its exit status."""
    device = (staging / "devices").read_text().split()[0]
    flags = {
        "--data-dir": args["DATA_DIR"],
        "--resized-model": args["RESIZED_MODEL"],
        "--export-dir": args["MODEL"],
        "--result-dir": staging,
        "--device": device,
        "--dtype": args["DTYPE"],
    }
    command = [sys.executable, "-m", "sft.evaluation.assistant_check"]
    for flag, value in flags.items():
        command += [flag, value]
    command += shlex.split(args["ASSISTANT_FLAGS"])
    return subprocess.run(command, preexec_fn=system.end_with_parent).returncode


def finish(args):
    """Give the results their name if all tasks are finished, and compare them if they are those of `after`."""
    staging, name = Path(args["STAGING"]), args["NAME"]
    result = staging.parent / name
    record = system.read_json(staging / "run.json", "run_eval.sh")
    again = f"There is no {result}. Finished tasks stay in {staging}; the same command tries the others again."
    failed = [task for task in record["tasks"] if not (staging / task).is_dir()]
    if failed:
        refuse(f"failed: {', '.join(failed)}. {again}")
    if record["assistant_check"] and not (staging / "assistant.json").exists() and run_assistant_check(staging, args):
        refuse(f"the built-in check failed. {again}")
    for path in staging.glob("*.unfinished"):  # of a task that failed, and that TASKS no longer names
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    (staging / "devices").unlink()
    (staging / "todo").unlink()
    if result.is_dir():
        result.rmdir()
    staging.rename(result)
    (result / system.LOCK).unlink(missing_ok=True)  # run_eval.sh's, after the rename: it holds until then
    print(f"run_eval.sh: results in {result}", flush=True)
    base_name = name.removesuffix("-chat")
    before, other = pair_to_compare(args, base_name)
    if base_name == "after" and before.is_dir() and other.is_dir():
        compare(args, [])
    elif base_name != "before":
        flags = f"--before {before} --after {other} --eval-results {staging.parent}"
        print(f"run_eval.sh: to compare it with 'before': python -m sft.evaluation.compare_evals {flags}")
        print(f"run_eval.sh: if it is 'after' with another seed: bash run_eval.sh compare {base_name}")


# ==== Compare ====


def pair_to_compare(args, name="after"):
    """Return the folders of `before` and of the run `name`, or those of the chat pass if only these are both there."""
    results = Path(args["EVAL_RESULTS"])
    pair = results / "before", results / name
    chat_pair = results / "before-chat", results / f"{name}-chat"
    if all(folder.is_dir() for folder in chat_pair) and not all(folder.is_dir() for folder in pair):
        return chat_pair
    return pair


def compare(args, seeds):
    """Write the report, with the runs `seeds` (names) as other seeds, and the model card if EXPORT_DIR is an export."""
    before, after = pair_to_compare(args)
    suffix = after.name.removeprefix("after")
    comparison = {
        "BEFORE": str(before),
        "AFTER": str(after),
        "OTHER_SEEDS": tuple(str(after.with_name(f"{seed}{suffix}")) for seed in seeds),
        "EVAL_RESULTS": args["EVAL_RESULTS"],
    }
    compare_evals.main(comparison)
    report_page.main({"EVAL_RESULTS": args["EVAL_RESULTS"], "EXPORT_DIR": args["EXPORT_DIR"]})
    export_dir = Path(args["EXPORT_DIR"])
    if (export_dir / model_card.TRAINING).is_file():
        missing = model_card.write(export_dir, args["EVAL_RESULTS"])
        without = f", without the comparison: {missing}" if missing else ""
        print(f"run_eval.sh: the model card {export_dir / 'README.md'} is up to date{without}")


# ==== Main ====


def main(args, command, *names):
    """Run one of the three commands. args: dict of run_eval.sh's settings; names: of `compare`."""
    settings.escape_what_the_terminal_lacks()
    try:
        if command == "start":
            start(args)
        elif command == "finish":
            finish(args)
        else:
            compare(args, names)
    except OSError as error:
        refuse(f"{error}. Check the free disk space, and your rights to that file or folder.")


if __name__ == "__main__":
    main(dict(os.environ), *sys.argv[1:])
