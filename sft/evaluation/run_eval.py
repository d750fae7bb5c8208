"""The work of run_eval.sh, which sets every setting in the environment: measure one model folder.

    measure.py NAME MODEL_DIR

What can fail is tried before hours of work: the folder, its tokenizer, whether the model reads plain text, the tasks'
names, the devices, the disk. Then each device has a process that takes one task after the other. A task is a call of
lm_eval of its own, model loaded anew, and has a folder of its own, which gets its name when the task is finished; a run
that was killed goes on with the same command.
"""

import contextlib
import gc
import importlib.metadata
import json
import multiprocessing
import multiprocessing.connection
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import traceback
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sft import system
from sft.evaluation import assistant_check, eval_results, reading_check

LONGEST = ("mmlu", "hellaswag")  # begun first, so that several devices finish together
ROOM = 2**30  # bytes; the logged questions of the seven tasks need less
FORMS = {"LIMIT": r"(\d+|0?\.\d+)?", "FEWSHOT": r"\d*", "SEEDS": r"\d+(,\d+){3}"}
FORMS |= {"CHAT_TEMPLATE": "[01]", "CHECK_READING": "[01]", "TASKS": r"\w[\w.-]*(,\w[\w.-]*)*"}
MEASURED_WITH = ("INCLUDE_PATH", "FEWSHOT", "LIMIT", "CHAT_TEMPLATE", "DTYPE", "BATCH_SIZE", "SEEDS", "MODEL_ARGS")


def refuse(sentence):
    sys.exit(f"run_eval.sh: {sentence}")


# ==== Everything that can fail early ====


def places(device):
    """Return the list of devices to work on: "cpu" or "cuda:N", one process each."""
    found = torch.cuda.device_count()
    if device == "gpus":
        device = ",".join(f"cuda:{number}" for number in range(found)) or refuse(
            "torch sees no GPU. DEVICE=cpu works too, slowly."
        )
    for place in device.split(","):
        if not re.fullmatch(r"cpu|cuda(:\d+)?", place):
            refuse(f"DEVICE={device}: {place!r} must be gpus, cpu or cuda:N.")
        if place != "cpu" and int(place.partition(":")[2] or 0) >= found:
            refuse(f"DEVICE={device}, but torch sees {found} GPUs. DEVICE=cpu works too, slowly.")
    return device.split(",")


def check_ifeval():
    """Exit unless everything is there that ifeval needs to score its answers, which it does after all the work."""
    try:
        from lm_eval.tasks.ifeval import instructions_util  # downloads what is missing, if it can

        instructions_util.nltk.data.find("tokenizers/punkt_tab")
    except (ImportError, LookupError):
        refuse(
            "ifeval needs the packages of requirements.txt, and nltk's data set punkt_tab: `python -m nltk.downloader "
            "punkt_tab`, or a folder that holds tokenizers/punkt_tab, named by NLTK_DATA."
        )


def check_reading(model, must_read):
    """Print how well the model reads plain text; exit if it does not load, or does not read though it must."""
    try:
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto").eval()
        nats = reading_check.loss(loaded, AutoTokenizer.from_pretrained(model))
    except Exception as error:  # transformers, tokenizers and safetensors each raise their own
        refuse(f"{model} is no model folder that loads ({type(error).__name__}: {error}).")
    line, reads = reading_check.verdict(nats, loaded.get_input_embeddings().num_embeddings)
    print(f"run_eval.sh: {line}", flush=True)
    if must_read and not reads:
        refuse(f"{model} cannot read plain text. {reading_check.CAUSES} CHECK_READING=0 measures it nevertheless.")


def read_facts(model, environment):
    """Return what run.json holds of the model folder, the settings and the machine; exit if the folder is not whole."""
    for file in ("config.json", "tokenizer_config.json"):
        if not (model / file).is_file():
            refuse(
                f"no {file} in the model folder {model}. It must be a Hugging Face folder such as export_hf.py writes; "
                "BEFORE_MODEL and AFTER_MODEL say where."
            )
    if not any(model.glob("*.safetensors")):
        refuse(f"no *.safetensors in the model folder {model}: its weights are missing.")
    try:
        config, tokenizer = AutoConfig.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    except Exception as error:  # transformers and tokenizers each raise their own
        refuse(f"the config or tokenizer in {model} does not load: {error}")
    if len(tokenizer) > config.vocab_size:
        refuse(
            f"the tokenizer in {model} has {len(tokenizer):,} tokens, but the model {config.vocab_size:,} rows. Write "
            "the folder again with the script that made it."
        )
    if environment["CHAT_TEMPLATE"] == "1" and not tokenizer.chat_template:
        refuse(f"CHAT_TEMPLATE=1, but the tokenizer in {model} has no chat template.")
    parts = sorted(path for pattern in ("*.safetensors", "*.json", "*.jinja") for path in model.glob(pattern))
    packages = ("lm_eval", "torch", "transformers", "tokenizers", "datasets")
    return {
        "model": str(model),
        "files_sha256": {path.name: system.sha256(path) for path in parts},
        "adds_bos": tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id],  # lm_eval does as the tokenizer does
        "settings": {name: environment[name] for name in MEASURED_WITH},
        "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in packages},
    }


def device_name(place):
    return platform.processor() or place if place == "cpu" else torch.cuda.get_device_name(place)


def open_staging(staging, facts):
    """Make the folder of an unfinished run, or take one up; return its lock. Exit if it was begun with other facts."""
    staging.mkdir(parents=True, exist_ok=True)
    lock = system.lock(staging, "OUTPUT")
    path = staging / "run.json"
    finished = sorted(task.name for task in staging.iterdir() if task.is_dir() and not task.name.startswith("."))
    if finished:
        begun = system.read_json(path, "run_eval.sh")
        for name in facts.keys() - {"tasks"}:
            pair = [value if isinstance(value, dict) else {name: value} for value in (begun.get(name), facts[name])]
            if apart := eval_results.differences(*pair, "there", "now"):
                refuse(
                    f"{staging} was begun otherwise: {'; '.join(apart)}. Give the same again, or remove that folder to "
                    "begin anew."
                )
        if more := sorted(set(finished) - set(facts["tasks"])):
            refuse(f"{staging} holds finished tasks that TASKS does not name: {', '.join(more)}. Name them too.")
        print(f"run_eval.sh: going on; finished already: {', '.join(finished)}")
    system.write_whole(path, json.dumps(facts, indent=2) + "\n")
    return lock


# ==== The measurement ====


def work(place, log, model, tasks, staging, environment, pipe):
    """A worker, a process of its own: measure on the device `place` each task that comes through `pipe`.

    Says first which of `tasks` lm_eval does not know; then for each task None, or why it failed, and ends.
    log: file for its output, or None for the terminal.
    """
    system.leave_to_parent()
    if log:
        for stream in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    from lm_eval import simple_evaluate
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table, simple_parse_args_string

    arguments = {"pretrained": str(model), "dtype": environment["DTYPE"]}
    arguments |= simple_parse_args_string(environment["MODEL_ARGS"])
    chat, limit, few = environment["CHAT_TEMPLATE"] == "1", environment["LIMIT"], environment["FEWSHOT"]
    seeds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
    manager = TaskManager(include_path=environment["INCLUDE_PATH"] or None, metadata=arguments)
    pipe.send([name for name in tasks if not manager.match_tasks([name])])
    for task in iter(pipe.recv, None):
        problem = None
        part = staging / f".{task}"
        shutil.rmtree(part, ignore_errors=True)  # of a run that was killed: nothing in it is a result
        try:
            tracker = EvaluationTracker(output_path=str(part))
            results = simple_evaluate(
                model="hf",
                model_args=dict(arguments),
                tasks=[task],
                num_fewshot=int(few) if few else None,
                batch_size=environment["BATCH_SIZE"],
                device=place,
                limit=float(limit) if limit else None,
                apply_chat_template=chat,
                fewshot_as_multiturn=chat or None,
                gen_kwargs={},
                task_manager=manager,
                metadata=arguments,
                evaluation_tracker=tracker,
                **dict(zip(seeds, map(int, environment["SEEDS"].split(",")), strict=True)),
            )
            samples = results.pop("samples")
            tracker.save_results_aggregated(results=results, samples=samples)
            for name in results["configs"]:
                tracker.save_results_samples(task_name=name, samples=samples[name])
            print(make_table(results), flush=True)
            if not any(part.glob("*/results_*.json")):  # lm_eval only warns when it cannot write
                raise OSError("lm_eval wrote no results; is the disk full?")
            part.rename(staging / task)
        except (Exception, SystemExit) as error:  # whatever task definitions, data sets and models raise
            traceback.print_exc()
            problem = textwrap.shorten(f"{type(error).__name__}: {error}", 300)
        results = samples = None
        gc.collect()
        torch.cuda.empty_cache()
        pipe.send(problem)


def begin(place, log, *given):
    """Start a worker; return the pipe to it. given: what `work` takes after its first two."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    context.Process(target=work, args=(place, log, *given, theirs)).start()
    theirs.close()
    return ours


def heard(pipe):
    """Return what a worker says: None or a list if all is well, a sentence if not."""
    try:
        return pipe.recv()
    except EOFError:
        return "its process ended; what it printed last says why"


def dismiss(pipe):
    """Let a worker end, if it has not."""
    with contextlib.suppress(OSError):
        pipe.send(None)


def measure(tasks, model, devices, staging, environment):
    """Run what is left of `tasks`, one worker for each device, and a new one after a failure.

    Returns: {failed task: why}. Exits if lm_eval does not start or does not know one of the tasks.
    """
    todo = [task for task in tasks if not (staging / task).is_dir()]
    todo.sort(key=lambda task: LONGEST.index(task) if task in LONGEST else len(LONGEST))
    given = (model, tasks, staging, environment)
    logs = [staging / f"device_{n}.log" if len(devices) > 1 else None for n in range(len(devices))]
    free = {begin(*pair, *given): pair for pair in list(zip(devices, logs, strict=True))[: len(todo)]}
    for pipe, (place, _) in free.items():
        if isinstance(unknown := heard(pipe), str):
            refuse(f"lm_eval does not start on {place}: {unknown}.")
        if unknown:
            refuse(f"lm_eval knows no task {', '.join(unknown)}. TASKS names lm_eval's; INCLUDE_PATH adds your own.")
    busy, failed = {}, {}
    while todo or busy:
        while todo and free:
            pipe, pair = free.popitem()
            busy[pipe] = pair, todo.pop(0), time.monotonic()
            pipe.send(busy[pipe][1])
            print(f"run_eval.sh: {busy[pipe][1]} on {pair[0]}{f', log in {pair[1]}' if pair[1] else ''}", flush=True)
        for pipe in multiprocessing.connection.wait(list(busy)):
            pair, task, begun = busy.pop(pipe)
            if problem := heard(pipe):
                failed[task] = problem
            if problem and todo:  # after a fault of its device a process may be of no more use
                dismiss(pipe)
                pipe = begin(*pair, *given)
                heard(pipe)
            print(f"run_eval.sh: {task}: {problem or f'{time.monotonic() - begun:.0f} s'}", flush=True)
            free[pipe] = pair
    for pipe in free:
        dismiss(pipe)
    for process in multiprocessing.active_children():
        process.join(60)
    return failed


# ==== Main ====


def check_setup(name, model, result, environment):
    """Exit unless the settings, the model folder, the tasks' needs and the disk are sound.

    Returns: (facts for run.json, list of devices, folder of the built-in check's data or "").
    """
    for setting, form in FORMS.items():
        if not re.fullmatch(form, environment[setting]):
            refuse(f"{setting}={environment[setting]}: run_eval.sh says beside {setting} what it may be.")
    if environment["INCLUDE_PATH"] and not Path(environment["INCLUDE_PATH"]).is_dir():
        refuse(f"no folder {environment['INCLUDE_PATH']} (INCLUDE_PATH).")
    devices = places(environment["DEVICE"])
    facts = read_facts(model, environment) | {"tasks": list(dict.fromkeys(environment["TASKS"].split(",")))}
    check = environment["ASSISTANT_DATA"] if name != "before" and environment["CHAT_TEMPLATE"] == "0" else ""
    folders = (Path(check) / "tokenizer", Path(environment["RESIZED_MODEL"]), model)
    if check and (problem := assistant_check.other_tokenizer(*folders)):
        if name == "after":
            refuse(f"{problem} ASSISTANT_DATA= goes without the built-in check.")
        print(f"run_eval.sh: without the built-in check: {problem}")
        check = ""
    result.parent.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(result.parent).free < ROOM:
        refuse(f"less than 1 GiB free for {result.parent}; the logged questions of the seven tasks need that.")
    if "ifeval" in facts["tasks"]:
        check_ifeval()
    check_reading(model, environment["CHECK_READING"] == "1")
    return facts | {"device": device_name(devices[0])}, devices, check


def main(name, model):
    """Measure the folder `model` under `name`, as the environment says."""
    transformers.utils.logging.disable_progress_bar()
    environment, model = dict(os.environ), Path(model)
    full_name = f"{name}-chat" if environment["CHAT_TEMPLATE"] == "1" else name
    output = Path(environment["OUTPUT"])
    result, staging = output / full_name, output / f".{full_name}.unfinished"
    if result.is_dir() and any(result.iterdir()):
        refuse(
            f"{result} already holds results. Move them away first (mv {result} {result}-old) or choose another name."
        )
    facts, devices, check = check_setup(name, model, result, environment)
    lock = open_staging(staging, facts)
    failed = measure(facts["tasks"], model, devices, staging, environment)
    again = (
        f"There is no result of '{name}'. Finished tasks stay in {staging}; the same command tries the others again."
    )
    if failed:
        refuse("; ".join(f"{task}: {why}" for task, why in failed.items()) + f". {again}")
    if check and not (staging / "assistant.json").exists():
        words = [sys.executable, "-m", "sft.evaluation.assistant_check", "--data-dir", check, "--after-model", model]
        words += ["--before-model", environment["RESIZED_MODEL"], "--device", devices[0], "--output-dir", staging]
        words += ["--dtype", environment["DTYPE"], *shlex.split(environment["ASSISTANT_FLAGS"])]
        if subprocess.run(words).returncode:
            refuse(f"the built-in check failed. {again}")
    if result.is_dir():
        result.rmdir()
    (staging / system.LOCK).unlink()
    staging.rename(result)
    lock.close()
    print(f"run_eval.sh: results in {result}")
    compare(name, full_name, output)


def compare(name, full_name, output):
    """Show what changed, or how to: once there is something to compare with."""
    pairs = [("before", name), ("before-chat", full_name)]
    ready = [pair for pair in pairs if all((output / folder).is_dir() for folder in pair)]
    words = [sys.executable, "-m", "sft.evaluation.compare_evals"]
    before, after = ready[0] if ready else ("before", name)
    words += ["--before", output / before, "--after", output / after, "--output", output]
    if name == "after" and ready:
        sys.exit(subprocess.run(words).returncode)
    if name != "before":
        print(f"run_eval.sh: to compare it with 'before': {shlex.join(map(str, words[1:]))}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("run_eval.sh: stopped; the same command goes on."))
    try:
        main(*sys.argv[1:])
    except KeyboardInterrupt:
        refuse("stopped; the same command goes on.")
    finally:
        for process in multiprocessing.active_children():  # what was interrupted
            process.kill()
