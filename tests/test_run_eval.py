"""run_eval.sh with the real lm_eval: all its tasks under their own names, on a tiny model and small local data.

lm_eval's task definitions load data sets by name; a folder of that name under the current folder is read in place of
the Hub's. So everything runs offline and nothing of lm_eval is replaced. At each start lm_eval reads its 14,000 task
definitions, which takes 12 s: the processes here use a copy of it with only the tasks they name.

Alone: bash tests/run.sh tests/test_run_eval.py
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import (
    ROOT,
    copy_lm_eval,
    edit_json,
    fake_card,
    write_chat_data,
    write_conversations,
    write_dataset,
    write_model,
    write_tokenizer,
)
from transformers import AutoTokenizer

import prepare_data
from sft import eval_tasks, system
from sft.evaluation import compare_evals, eval_results, model_card, run_eval

SEVEN = ("mmlu", "hellaswag", "piqa", "winogrande", "arc_easy", "arc_challenge", "lambada_openai")
SETTINGS = {  # as run_eval.sh passes them
    "NAME": "x",
    "MODEL": "models/base",
    "RESIZED_MODEL": "models/resized",
    "DATA_DIR": "data/sft_v1",
    "TASKS": ",".join(SEVEN),
    "INCLUDE_PATH": "",
    "FEWSHOT": "",
    "LIMIT": "",
    "CHAT_TEMPLATE": "0",
    "CHECK_READING": "0",
    "DEVICE": "cpu",
    "DTYPE": "bfloat16",
    "BATCH_SIZE": "auto:2",
    "SEEDS": "0,1234,1234,1234",
    "MODEL_ARGS": "",
}

# ==== Small data for all seven tasks ====


def write_data(root):
    """Write a few questions for each of the seven tasks, under the names that lm_eval asks for."""
    tasks = Path(find_spec("lm_eval").submodule_search_locations[0]) / "tasks"
    subjects = [path.stem.removeprefix("mmlu_") for path in (tasks / "mmlu/default").glob("mmlu_*.yaml")]
    assert len(subjects) == 57
    endings = ["and cries a bit.", "and flies away [title].", "and sings to it.", "then sleeps."]
    hellaswag = [
        {
            "activity_label": "Food",
            "ctx_a": "A man cuts an onion.",
            "ctx_b": "he",
            "endings": endings,
            "label": str(i),
        }
        for i in range(3)
    ]
    piqa = [{"goal": f"Open jar {i}.", "sol1": "Turn the lid.", "sol2": "Paint it.", "label": i % 2} for i in range(3)]
    winogrande = [
        {"sentence": "The cup did not fit the bag as the _ was small.", "option1": "cup", "option2": "bag", "answer": a}
        for a in "121"
    ]
    arc = [
        {
            "question": f"What is ice {i}?",
            "choices": {"text": ["water", "fire", "wood", "air"], "label": list("ABCD")},
            "answerKey": "ABCD"[i],
        }
        for i in range(3)
    ]
    lambada = [{"text": f"She called the dog {i} times and waited for the dog"} for i in range(3)]
    mmlu = [{"question": f"What is {i} plus 1?", "choices": list("1234"), "answer": i} for i in range(2)]
    write_dataset(root, "Rowan/hellaswag", {"default": {"train": hellaswag, "validation": hellaswag}})
    write_dataset(root, "baber/piqa", {"default": {"train": piqa, "validation": piqa}})
    write_dataset(root, "allenai/winogrande", {"winogrande_xl": {"train": winogrande, "validation": winogrande}})
    splits = {"train": arc, "validation": arc, "test": arc}
    write_dataset(root, "allenai/ai2_arc", {"ARC-Easy": splits, "ARC-Challenge": splits})
    write_dataset(root, "EleutherAI/lambada_openai", {"default": {"test": lambada}})
    write_dataset(root, "cais/mmlu", {subject: {"test": mmlu, "dev": mmlu} for subject in subjects})


def write_own_task(folder):
    """Write a task for INCLUDE_PATH: four multiple-choice questions."""
    folder.mkdir()
    rows = [{"q": f"Question {i}", "choices": ["yes", "no"], "answer": i % 2} for i in range(4)]
    (folder / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "own.yaml").write_text(
        "task: own\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: own_tasks/own.jsonl\n"
        'test_split: test\noutput_type: multiple_choice\ndoc_to_text: "{{q}}"\ndoc_to_choice: choices\n'
        "doc_to_target: answer\n"
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\nmetadata:\n  version: 1\n"
    )


# ==== The runs ====


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A current folder with data, an own task, and models in the folders that run_eval.sh expects."""
    root = tmp_path_factory.mktemp("eval")
    tasks = ("hellaswag", "piqa", "winogrande", "arc", "lambada", "mmlu/default", "ifeval", "gsm8k", "sciq")
    copy_lm_eval(root / "fewer_tasks", tasks)
    write_data(root)
    write_chat_data(root)
    write_own_task(root / "own_tasks")
    base = write_tokenizer(root / "tokenizer")
    # BATCH_SIZE=auto:2 tries batches of full contexts: short ones make every task cheaper. ifeval needs long answers.
    write_model(root / "models/base", AutoTokenizer.from_pretrained(base), seed=0, context=256)
    extended = write_conversations(root / "data/sft_v1", base)
    write_model(root / "models/resized", extended, seed=0, context=256)
    write_model(root / "exports/sft_v1", extended, seed=1, context=256)
    write_model(root / "exports/long", extended, seed=1, context=2048)
    settings = dict.fromkeys(model_card.RECIPE, 1) | {"DATA_DIR": "nowhere", "RESIZED_MODEL": "models/resized"}
    state = {"step": 9, "total_steps": 9, "updates": 9, "world_size": 1, "versions": {}, "settings": settings}
    state["history"] = []
    models = {side: root / "models" / side for side in ("base", "resized")}
    digests = {side: system.weight_digests(model) for side, model in models.items()}
    (models["resized"] / "resize.json").write_text(json.dumps({"weights_sha256": digests}))
    checkpoint = Path("checkpoints/sft_v1/step_000009")
    source = SimpleNamespace(checkpoints=[checkpoint], base_share=0.0, resized=models["resized"])
    training = model_card.describe(source, state, digests["resized"], 1, "bfloat16")
    (root / "exports/sft_v1" / model_card.TRAINING).write_text(json.dumps(training))
    return root


def environment(folder, **changes):
    return os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(folder / "fewer_tasks"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HOME": str(folder / "hf"),
        "NLTK_DATA": str(folder / "nltk_data"),
        "DEVICE": "cpu,cpu",
        "CHECK_READING": "0",
        "ASSISTANT_FLAGS": "--answers 2 --max-new-tokens 8",
        **changes,
    }


def start_script(folder, *arguments, **changes):
    """Start run_eval.sh with some settings changed; its outputs go to one pipe."""
    return subprocess.Popen(
        ["bash", ROOT / "run_eval.sh", *arguments],
        cwd=folder,
        env=environment(folder, **changes),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
    )


def run_script(folder, *arguments, **changes):
    """Run run_eval.sh. Returns: (exit status, what it printed)."""
    process = start_script(folder, *arguments, **changes)
    output = process.communicate(timeout=600)[0]  # a machine may be busy
    return process.returncode, output


def finished_tasks(folder, name):
    """Return {task: Path of its results} of a run, finished or not."""
    unfinished = folder / f"eval-results/{name}.unfinished"
    run = unfinished if unfinished.is_dir() else folder / f"eval-results/{name}"
    return {path.parts[-3]: path for path in run.glob("*/*/results_*.json") if ".unfinished" not in path.parts[-3]}


def interrupt(process, folder, name, tasks, signal_number):
    """Send a signal to a run as soon as `tasks` are finished and it works on the next. Returns: what it printed."""
    deadline = time.monotonic() + 500
    while len(finished_tasks(folder, name)) < tasks or not processes_in(folder, "lm_eval"):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(signal_number)
    return process.communicate(timeout=20)[0]


def processes_in(folder, name=""):
    """Return the command lines of the processes that work in `folder` and have `name` in that line."""
    lines = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").readlink() == folder:
                line = (process / "cmdline").read_text()
                lines += [line] if name in line else []
        except OSError:
            continue  # it ended, or belongs to somebody else
    return lines


def wait_until_nothing_runs(folder):
    deadline = time.monotonic() + 10
    while running := processes_in(folder):
        assert time.monotonic() < deadline, running
        time.sleep(0.05)


def by_hand(folder, model, tasks, output):
    """Measure a model with lm_eval's own command, all `tasks` (names, comma-separated) in one process."""
    command = f"lm_eval --model hf --model_args pretrained={model},dtype=bfloat16 --tasks {tasks} --device cpu"
    command += f" --batch_size auto:2 --log_samples --output_path {output}"
    done = subprocess.run(
        command.split(), cwd=folder, env=environment(folder), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr


def run_after(folder):
    """Finish a run `after` that was killed before piqa. lm_eval's own command measured the other tasks, all at once.

    So the report is refused if one of them differs from `before` in its prompts or in how it was measured.
    """
    staging = folder / "eval-results/after.unfinished"
    others = [task for task in SEVEN if task != "piqa"]
    staging.mkdir()
    changes = {"NAME": "after", "MODEL": "exports/sft_v1", "STAGING": str(staging)}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(run_eval, "check_tasks", lambda tasks, include_path: None)
        run_eval.main(SETTINGS | changes, "start")
    by_hand(folder, "exports/sft_v1", ",".join(others), staging / others[0])
    for task in others[1:]:
        (staging / task).mkdir()
    return run_script(folder, "after", DEVICE="cpu")


@pytest.fixture(scope="module")
def runs(folder):
    """Measure `before` with two interruptions and a task that fails, `after`, and a model through its chat template."""
    outputs = {}
    quick_first = ",".join(reversed(SEVEN))
    first = start_script(folder, "before", TASKS=quick_first, DEVICE="cpu")
    while not list(folder.glob("eval-results/before.unfinished/run.json")):  # once it is there, `first` has the lock
        assert first.poll() is None, first.communicate()[0]
        time.sleep(0.05)
    outputs["locked"] = run_script(folder, "before")
    outputs["terminated"] = interrupt(first, folder, "before", 1, signal.SIGTERM)
    wait_until_nothing_runs(folder)
    second = start_script(folder, "before", TASKS=quick_first, DEVICE="cpu")
    outputs["killed"] = interrupt(second, folder, "before", 2, signal.SIGKILL)
    wait_until_nothing_runs(folder)
    outputs["times"] = {task: path.stat().st_mtime_ns for task, path in finished_tasks(folder, "before").items()}
    outputs["failing"] = run_script(folder, "before", TASKS=f"{quick_first},sciq")  # there is no data for sciq here
    outputs["after a failure"] = finished_tasks(folder, "before")
    outputs["before"] = run_script(folder, "before")

    outputs["after"] = run_after(folder)
    own = {
        "TASKS": "own,ifeval,gsm8k",
        "INCLUDE_PATH": "own_tasks",
        "LIMIT": "3",
        "CHAT_TEMPLATE": "1",
        "BATCH_SIZE": "4",
    }
    own |= {"DTYPE": "float32", "MODEL_ARGS": "max_length=1400"}
    outputs["own"] = run_script(folder, "own", "exports/long", **own)
    return outputs


def results_of(folder, name):
    """Return what lm_eval wrote for each task of a run: {task: dict}."""
    return {task: json.loads(path.read_text()) for task, path in finished_tasks(folder, name).items()}


def test_an_interrupted_run_continues_and_repeats_nothing(folder, runs):
    assert "run_eval.sh: stopped; the same command continues." in runs["terminated"]
    status, output = runs["failing"]
    assert status == 1 and len(runs["times"]) == 2
    assert f"continuing; finished already: {', '.join(sorted(runs['times']))}" in output
    for task, time_written in runs["times"].items():
        assert f"run_eval.sh: {task} on" not in output
        assert finished_tasks(folder, "before")[task].stat().st_mtime_ns == time_written  # renamed with its folder
    assert not list(folder.glob("eval-results/*/.lock"))
    assert not list(folder.glob("eval-results/*unfinished")) and not list(
        folder.glob("eval-results/before/*unfinished")
    )


def test_two_runs_of_one_name_exclude_each_other(runs):
    status, output = runs["locked"]
    assert status == 1 and "eval-results/before.unfinished is in use by another run" in output


def test_a_failing_task_leaves_the_others(runs):
    status, output = runs["failing"]
    assert status == 1 and "run_eval.sh: sciq failed; the last lines of its output say why" in output
    assert "failed: sciq. There is no eval-results/before. Finished tasks stay in" in output
    assert set(runs["after a failure"]) == set(SEVEN)
    status, output = runs["before"]
    assert status == 0 and "run_eval.sh: results in eval-results/before" in output and " on cpu" not in output


def test_several_devices_take_tasks_side_by_side(folder, runs):
    logs = [(folder / f"eval-results/before/device_{number}.log").read_text() for number in range(2)]
    assert all("Running loglikelihood requests" in log for log in logs)
    lines = [line for line in runs["failing"][1].splitlines() if line.startswith("run_eval.sh: ")]
    lines = [line for line in lines if " on cpu" in line or line.endswith(" s")]
    # The second began before the first was done, in the order of TASKS.
    assert {line.split()[1] for line in lines[:2]} == set(SEVEN[3:5])
    assert all(" on cpu, log in eval-results/before.unfinished/device_" in line for line in lines[:2])


def test_seven_tasks_before_and_after(folder, runs):
    for name, model in (("before", "models/base"), ("after", "exports/sft_v1")):
        status, output = runs[name]
        assert status == 0, output[-3000:]
        assert set(SEVEN) <= set(eval_results.read_run(folder / "eval-results" / name)["results"])
        for one in results_of(folder, name).values():
            assert one["config"]["model_args"] == {"pretrained": model, "dtype": "bfloat16"}
            assert one["config"]["batch_size"] == "auto:2" and one["config"]["limit"] is None
        assert len(list((folder / "eval-results" / name).glob("*/*/samples_*.jsonl"))) == 6 + 57
        record = json.loads((folder / "eval-results" / name / "run.json").read_text())
        assert record["tasks"] == list(SEVEN) and record["adds_bos"] is False
        assert record["settings"]["SEEDS"] == "0,1234,1234,1234" and record["settings"]["FEWSHOT"] == ""
        assert set(record["versions"]) >= {"lm_eval", "torch", "transformers", "tokenizers", "datasets"}
        assert len(record["files_sha256"]["model.safetensors"]) == 64
        assert "plain text: " in output and "CANNOT READ" in output
    assert set(results_of(folder, "before")) == set(SEVEN)  # a folder each
    assert "Running loglikelihood requests" in runs["after"][1]  # of a single device, to the terminal
    assert "run_eval.sh: mmlu on" not in runs["after"][1]


def test_the_report_and_the_model_card_follow(folder, runs):
    output = runs["after"][1]
    for row in ("ARC-Challenge", "ARC-Easy", "HellaSwag", "PIQA", "Winogrande", "Lambada (OpenAI)", "MMLU (overall)"):
        assert f"| {row} " in output
    assert output.count("| MMLU: ") == 4 and "mmlu_anatomy" not in (folder / "eval-results/comparison.md").read_text()
    tasks, assistant = json.loads((folder / "eval-results/comparison.json").read_text())["parts"]
    rows = tasks["rows"]
    assert len(rows) == 12 and all(row["paired"] for row in rows)
    mmlu = next(row for row in rows if row["task"] == "mmlu")
    assert mmlu["questions"] == 114 and mmlu["chance"] == 0.25
    assert mmlu["paired"]["difference"] == pytest.approx(mmlu["after"]["value"] - mmlu["before"]["value"])
    labels = [row["label"] for row in assistant["rows"] if row["metric"] == "loss"]
    assert labels == [f"Held-out answers: {source}" for source in ("a", "b", "all")] + ["Plain text"]
    assert "| Answers that end by themselves " in output
    assert f"report: {Path('eval-results/report.html')}" in output
    for file in ("comparison.md", "flips.jsonl", "report.html", "after/answers.jsonl"):
        assert (folder / "eval-results" / file).exists()
    card = (folder / "exports/sft_v1/README.md").read_text()
    assert "## Before and after" in card and "| MMLU (overall) " in card


def test_compare_writes_report_and_card_again_with_other_seeds(folder, runs, monkeypatch):
    shutil.copytree(folder / "eval-results/after", folder / "eval-results/seed43")
    (folder / "exports/sft_v1/README.md").unlink()
    status, output = run_script(folder, "compare", "seed43", PYTHONIOENCODING="ascii")  # which lacks the table's ±
    assert status == 0 and "## Other seeds" in output and "exports/sft_v1/README.md is up to date" in output
    assert "## Other seeds" in (folder / "eval-results/comparison.md").read_text()
    assert "### Other seeds" in (folder / "exports/sft_v1/README.md").read_text()
    monkeypatch.chdir(folder)
    args = {"EVAL_RESULTS": "eval-results", "EXPORT_DIR": "models/base"}  # that is no export
    with pytest.raises(SystemExit, match="There is no folder eval-results/nowhere"):
        run_eval.main(args, "compare", "nowhere")
    run_eval.main(args, "compare")
    assert "## Other seeds" not in (folder / "eval-results/comparison.md").read_text()
    assert not (folder / "models/base/README.md").exists()


def test_own_task_ifeval_and_gsm8k_through_the_template_with_a_limit_and_other_settings(folder, runs):
    status, output = runs["own"]
    assert status == 0, output[-3000:]
    results = results_of(folder, "own-chat")
    assert results["own"]["results"]["own"]["sample_len"] == 3
    for one in results.values():
        assert one["chat_template_sha"] and one["config"]["model_dtype"] == "torch.float32"
        assert one["config"]["batch_size"] == "4" and one["max_length"] == 1400
    scores = results["ifeval"]["results"]["ifeval"]
    assert scores["sample_len"] == 3
    assert all(0 <= scores[f"{level}_level_strict_acc,none"] <= 1 for level in ("prompt", "inst"))
    assert results["gsm8k"]["n-shot"] == {"gsm8k": 0}  # lm_eval's definition has 5
    problem = "Question: Tom has 2 apples and buys 3. How many?\nAnswer:"
    for task, question in (("ifeval", "Answer 0."), ("gsm8k", problem)):
        (samples,) = (folder / f"eval-results/own-chat/{task}").glob(f"*/samples_{task}_*.jsonl")
        sample = json.loads(samples.read_text().splitlines()[0])
        prompt = sample["arguments"]["gen_args_0"]["arg_0"]
        assert prompt.endswith(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")
        assert isinstance(sample["resps"][0][0], str)  # the whole answer, for reading
    assert "eval-results/own" in output and not (folder / "eval-results/own").exists()


def test_the_chat_pass_is_compared_with_each_way_to_read_an_answer(folder, runs):
    part, _ = compare_evals.compare_part(*[folder / "eval-results/own-chat"] * 2)
    assert part["title"] == "lm_eval through the chat template"
    levels = [f"{level}_level_{how}_acc" for how in ("strict", "loose") for level in ("prompt", "inst")]
    ways = [f"exact_match ({way})" for way in ("strict-match", "flexible-extract")]
    rows = [(row["task"], row["metric"], row["questions"], row["chance"]) for row in part["rows"]]
    assert sorted(row for row in rows if row[0] != "own") == sorted(
        [*(("ifeval", level, 3, None) for level in levels), *(("gsm8k", way, 3, None) for way in ways)]
    )


def test_scores_are_those_of_lm_evals_own_command(folder, runs):
    by_hand(folder, "models/base", "piqa", "by_hand")
    own = eval_results.read_run(folder / "by_hand")
    before = eval_results.read_run(folder / "eval-results/before")
    assert own["results"]["piqa"] == before["results"]["piqa"]
    assert own["task_hashes"]["piqa"] == before["task_hashes"]["piqa"]
    assert eval_results.conditions(own) == eval_results.conditions(before)


# ==== What `start` refuses ====


@pytest.fixture
def start(folder, tmp_path, monkeypatch):
    """Return a function that runs `start` in this process, with some of run_eval.sh's settings changed."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(run_eval, "check_tasks", lambda tasks, include_path: None)  # takes 12 s; it has its own test

    def run(**changes):
        args = SETTINGS | {"TASKS": "piqa,winogrande"} | changes
        staging = tmp_path / f"{args['NAME']}.unfinished"
        staging.mkdir(exist_ok=True)
        run_eval.main(args | {"STAGING": str(staging)}, "start")
        return staging

    return run


def test_start_lists_devices_and_tasks_and_records_the_settings(start):
    staging = start(DEVICE="cpu,cpu", TASKS="piqa,winogrande,piqa", LIMIT=".5")
    assert (staging / "devices").read_text() == "cpu\ncpu\n"
    assert (staging / "todo").read_text() == "piqa\nwinogrande\n"
    record = json.loads((staging / "run.json").read_text())
    assert record["settings"]["LIMIT"] == ".5" and record["assistant_check"] is False  # models/base has no markers
    assert json.loads((start(NAME="y", MODEL="exports/sft_v1") / "run.json").read_text())["assistant_check"] is True


def test_an_unfinished_run_continues_only_with_the_same_settings(start):
    staging = start()
    start(LIMIT="1")  # nothing is finished yet
    start()
    (staging / "piqa").mkdir()
    (staging / "winogrande.unfinished").mkdir()  # as a kill leaves it
    start()
    assert (staging / "todo").read_text() == "winogrande\n"
    with pytest.raises(SystemExit, match="was started with other settings: LIMIT:  there, 1 now"):
        start(LIMIT="1")
    with pytest.raises(
        SystemExit, match="was started with other settings: model: models/base there, models/resized now"
    ):
        start(MODEL="models/resized")
    with pytest.raises(SystemExit, match="holds finished tasks that TASKS does not name: piqa"):
        start(TASKS="winogrande")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"DEVICE": "cuda:99"}, "DEVICE=cuda:99, but torch sees"),
        ({"DEVICE": "tpu"}, "'tpu' must be gpus, cpu or cuda:N"),
        ({"CHECK_READING": "1"}, "models/base cannot read plain text. Likely causes"),
        ({"LIMIT": "few"}, "LIMIT=few is not valid; see the comment next to LIMIT in run_eval.sh"),
        ({"NAME": "after", "DATA_DIR": "data/nowhere"}, "data/nowhere/tokenizer holds no tokenizer.json"),
        ({"MODEL": "models/nowhere"}, "no config.json in the model folder models/nowhere"),
        ({"INCLUDE_PATH": "nowhere"}, r"no folder nowhere \(INCLUDE_PATH\)"),
        ({"CHAT_TEMPLATE": "1"}, "the tokenizer in models/base has no chat template"),
        ({"MODEL_ARGS": "max_length=9, pretrained=models/resized"}, "MODEL_ARGS sets pretrained"),
        ({"MODEL_ARGS": "peft=models/resized,dtype=float32"}, "MODEL_ARGS sets peft, dtype"),
    ],
)
def test_what_is_wrong_is_said_before_the_work(start, changes, says):
    with pytest.raises(SystemExit, match=says):
        start(**changes)


def test_a_card_that_torch_cannot_use_is_named(start, tmp_path, monkeypatch):
    fake_card(tmp_path / "bin", "535.183.01")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    for device in ("gpus", "cuda:0"):
        with pytest.raises(SystemExit, match=r"This machine has an NVIDIA card with driver .* DEVICE=cpu works too"):
            start(DEVICE=device)


def test_a_model_folder_must_be_whole(folder, start):
    shell = folder / "models/shell"
    shell.mkdir()
    for file in ("config.json", "tokenizer_config.json"):
        (shell / file).write_text("{}")
    with pytest.raises(SystemExit, match=r"no \*.safetensors in the model folder models/shell"):
        start(MODEL="models/shell")
    wide = shutil.copytree(folder / "exports/sft_v1", folder / "exports/wide")
    config = json.loads((wide / "config.json").read_text())
    (wide / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] - 1}))
    with pytest.raises(SystemExit, match="tokens, but the model"):
        start(MODEL="exports/wide")
    (wide / "tokenizer.json").write_text("{}")
    with pytest.raises(SystemExit, match="the tokenizer in exports/wide does not load"):
        start(MODEL="exports/wide")


def test_a_tokenizer_class_that_makes_other_ids_than_training_is_refused(folder, start):
    """A Llama-3-like tokenizer.json: GPT2Tokenizer replaces its pre-tokenizer, so `before` would see other ids."""
    model = shutil.copytree(folder / "models/base", folder / "models/other_class")
    backend = json.loads((model / "tokenizer.json").read_text())
    pattern = {"Regex": r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"}
    split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    bytes_only = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    backend["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, bytes_only]}
    vocab = backend["model"]["vocab"]
    vocab["34"] = vocab.pop(max(vocab, key=vocab.get))  # it is in 1234567, but not in 123 456 7
    backend["model"]["merges"] = [["3", "4"]]
    (model / "tokenizer.json").write_text(json.dumps(backend))
    edit_json(model / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer", unk_token="</s>")
    with pytest.raises(SystemExit, match=r"GPT2Tokenizer\) makes \d+ ids of .*PreTrainedTokenizerFast"):
        start(MODEL="models/other_class")
    edit_json(model / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    assert len(json.loads((start(MODEL="models/other_class") / "run.json").read_text())["ids_sha256"]) == 64


def test_without_task_names_those_of_the_one_list_are_measured(folder, start, monkeypatch):
    from lm_eval.tasks.ifeval import instructions_util

    monkeypatch.setattr(instructions_util.nltk.data, "path", [str(folder / "nltk_data")])
    assert (start(TASKS="") / "todo").read_text().split() == list(SEVEN)
    chat = start(NAME="y", TASKS="", CHAT_TEMPLATE="1", MODEL="exports/sft_v1")
    assert (chat / "todo").read_text().split() == ["ifeval", "gsm8k"]
    assert eval_tasks.MEASURED == (*SEVEN, "ifeval", "gsm8k") == prepare_data.DECONTAMINATE_AGAINST


def test_a_task_that_the_data_was_not_decontaminated_against_is_warned_about(folder, start, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    group = {"task": "mmlu", "parts": ["mmlu", "mmlu_stem", "mmlu_anatomy"]}
    report = {"evaluation": [{"task": "piqa", "parts": ["piqa"], "questions": 3}, group]}
    (tmp_path / "data/report.json").write_text(json.dumps(report))
    settings = {"DATA_DIR": str(tmp_path / "data"), "NAME": "before"}
    staging = start(TASKS="piqa,winogrande,arc_easy", **settings)
    assert f"WARNING: {tmp_path}/data was not decontaminated against winogrande, arc_easy:" in capsys.readouterr().out
    assert json.loads((staging / "run.json").read_text())["not_decontaminated"] == ["winogrande", "arc_easy"]
    for changes in ({"TASKS": "piqa"}, {"TASKS": "mmlu_anatomy"}, {"DATA_DIR": "nowhere"}, {"DATA_DIR": ""}):
        shutil.rmtree(start(**settings | changes))
        assert "WARNING" not in capsys.readouterr().out


def test_results_that_would_replace_a_link_are_refused_before_the_work(start, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "real")
    with pytest.raises(SystemExit, match="linked is a link or a mount point"):
        start(NAME="linked")


def test_a_full_disk_is_seen_at_once(start, monkeypatch):
    monkeypatch.setattr(run_eval, "FREE_BYTES_NEEDED", 2**70)
    with pytest.raises(SystemExit, match="less than 1 GiB free"):
        start()


def test_a_task_that_lm_eval_does_not_know_is_refused():
    with pytest.raises(SystemExit, match="lm_eval knows no task nonsense"):
        run_eval.check_tasks(["piqa", "nonsense"], "")


def test_ifeval_without_its_data_is_refused_at_once(folder, monkeypatch):
    from lm_eval.tasks.ifeval import instructions_util

    monkeypatch.setattr(instructions_util.nltk.data, "path", [str(folder / "nltk_data")])
    run_eval.check_ifeval()
    monkeypatch.setattr(instructions_util.nltk.data, "path", [])
    with pytest.raises(SystemExit, match=r"ifeval needs the packages of requirements.txt, and nltk"):
        run_eval.check_ifeval()


def test_earlier_results_stay(folder):
    earlier = folder / "kept/before/results.txt"
    earlier.parent.mkdir(parents=True)
    earlier.write_text("earlier")
    status, output = run_script(folder, "before", EVAL_RESULTS="kept")
    assert status == 1 and "kept/before already holds results. Move them away first" in output
    assert earlier.read_text() == "earlier" and not (folder / "kept/before.unfinished").exists()


# ==== What the shell refuses ====


def test_a_name_or_folder_that_lm_eval_or_a_path_cannot_take(folder):
    status, output = run_script(folder, "../x", "models/base")
    assert status == 1 and "must be letters, digits" in output
    status, output = run_script(folder, "x", "models/a=b")
    assert status == 1 and "cannot read a folder with ',' or '=' in its name" in output


def write_command(path, line):
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)


def test_a_python_without_lm_eval_is_refused(folder):
    status, output = run_script(folder, "x", "models/base", PATH="/usr/bin:/bin", PYTHONPATH="")
    assert status == 1 and "has no lm_eval. Activate the environment" in output


def test_only_python_must_be_on_the_path(folder, tmp_path):
    write_command(tmp_path / "bin/python", f'exec {sys.executable} "$@"')
    status, output = run_script(folder, "x", "models/nowhere", PATH=f"{tmp_path}/bin:/usr/bin:/bin")
    assert status == 1 and "no config.json in the model folder models/nowhere" in output


def test_a_file_system_without_locks_is_not_taken_for_another_run(folder, tmp_path):
    write_command(tmp_path / "bin/flock", "exit 71")  # as flock(1) does where the kernel says ENOLCK
    path = f"{tmp_path}/bin:{environment(folder)['PATH']}"
    status, output = run_script(folder, "unlocked", "models/base", PATH=path)
    assert status == 1 and "unlocked.unfinished cannot be locked: its file system has no locks" in output


@pytest.mark.parametrize("arguments", [(), ("x",), ("before", "b", "c")])
def test_usage(folder, arguments):
    status, output = run_script(folder, *arguments)
    assert status == 2 and "bash run_eval.sh NAME MODEL_DIR" in output and "compare [NAME...]" in output
