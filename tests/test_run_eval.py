"""run_eval.sh with the real lm_eval: all seven tasks under their own names, on a tiny model and small local data.

lm_eval's task definitions load data sets by name; a folder of that name under the working directory is read in place of
the Hub's. So everything runs offline and nothing of lm_eval is replaced.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest
from test_assistant_check import write_data as write_assistant_data
from test_assistant_check import write_model, write_tokenizer
from transformers import AutoTokenizer

from sft.evaluation import eval_results

REPO = Path(__file__).parents[1]
SEVEN = ("hellaswag", "piqa", "winogrande", "arc_easy", "arc_challenge", "lambada_openai", "mmlu")


# ---- Small data for all seven tasks ----


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


def write_data(root):
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
    """A task bundle of one's own for INCLUDE_PATH: four multiple-choice questions."""
    folder.mkdir()
    rows = [{"q": f"Question {i}", "choices": ["yes", "no"], "answer": i % 2} for i in range(4)]
    (folder / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "own.yaml").write_text(
        "task: own\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: own_tasks/own.jsonl\n"
        'test_split: test\noutput_type: multiple_choice\ndoc_to_text: "{{q}}"\ndoc_to_choice: choices\n'
        "doc_to_target: answer\n"
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\nmetadata:\n  version: 1\n"
    )


def write_ifeval(root):
    """Three of IFEval's instructions as google/IFEval has them, and nltk's punkt_tab without any abbreviation."""
    asked = [
        ("punctuation:no_comma", {}),
        ("length_constraints:number_sentences", {"relation": "at least", "num_sentences": 1}),
        ("change_case:english_capital", {}),
    ]
    fields = ("relation", "num_sentences")
    rows = [
        {
            "key": i,
            "prompt": f"Answer {i}.",
            "instruction_id_list": [name],
            "kwargs": [{field: given.get(field) for field in fields}],
        }
        for i, (name, given) in enumerate(asked)
    ]
    write_dataset(root, "google/IFEval", {"default": {"train": rows}})
    punkt = root / "nltk_data/tokenizers/punkt_tab/english"
    punkt.mkdir(parents=True)
    for name in ("abbrev_types.txt", "collocations.tab", "ortho_context.tab", "sent_starters.txt"):
        (punkt / name).write_text("")


# ---- The runs ----


def environment_of(place, more):
    return (
        os.environ
        | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        | {"HF_HOME": str(place / "hf"), "NLTK_DATA": str(place / "nltk_data"), "DEVICE": "cpu", "CHECK_READING": "0"}
        | {"ASSISTANT_FLAGS": "--answers 2 --max-new-tokens 8"}
        | more
    )


def run_eval(place, *arguments, **more):
    return subprocess.run(
        ["bash", REPO / "run_eval.sh", *arguments],
        cwd=place,
        env=environment_of(place, more),
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=900,  # a machine may be busy
    )


def killed_after_piqa(place, **more):
    """Begin a run and kill it as soon as its first task is finished. Returns: the results of that task (Path)."""
    started = subprocess.Popen(
        ["bash", REPO / "run_eval.sh", "half", "models/base"], cwd=place, env=environment_of(place, more)
    )
    deadline = time.monotonic() + 600
    while not (finished := list(place.glob("eval-results/.half.unfinished/piqa/*/results_*.json"))):
        assert started.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    started.kill()  # bash has handed over to measure.py
    started.wait()
    return finished[0]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working directory with data, an own task, and models in the places that run_eval.sh expects."""
    root = tmp_path_factory.mktemp("eval")
    write_data(root)
    write_ifeval(root)
    write_own_task(root / "own_tasks")
    base = write_tokenizer(root / "tokenizer")
    write_model(root / "models/base", AutoTokenizer.from_pretrained(base), seed=0, context=2048)
    extended = write_assistant_data(root / "data/sft_v1", base)
    for seed, folder in enumerate(("checkpoints/base", "exports/sft_v1")):
        write_model(root / folder, extended, seed, context=2048)
    return root


@pytest.fixture(scope="module")
def runs(place):
    """All runs that load lm_eval, two at a time: each takes 10 to 30 seconds, most of it imports."""
    wide = place / "exports/wide"
    shutil.copytree(place / "exports/sft_v1", wide)
    config = json.loads((wide / "config.json").read_text())
    (wide / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] - 1}))
    own = {"TASKS": "own,ifeval", "INCLUDE_PATH": "own_tasks", "LIMIT": "3", "CHAT_TEMPLATE": "1", "BATCH_SIZE": "4"}
    others = {
        "own": (["own", "exports/sft_v1"], own | {"DTYPE": "float32", "MODEL_ARGS": "max_length=1400"}),
        "unknown_task": (["unknown", "models/base"], {"TASKS": "piqa,nonsense"}),
        "no_gpu": (["gpu", "models/base"], {"DEVICE": "cuda:99"}),
        "wide": (["wide", "exports/wide"], {}),
        "cannot_read": (["x", "models/base"], {"CHECK_READING": "1"}),
        "limit": (["x", "models/base"], {"LIMIT": "few"}),
        "no_data": (["after"], {"ASSISTANT_DATA": "data/nowhere"}),
    }

    def resumed():
        first = killed_after_piqa(place, TASKS="piqa,winogrande")
        half = ["half", "models/base"]
        found = {"first": (first, first.stat().st_mtime_ns)}
        found["half_way"] = run_eval(place, *half, TASKS="piqa,sciq,winogrande")  # there is no data for sciq here
        found["other_limit"] = run_eval(place, *half, TASKS="piqa,winogrande", LIMIT="1")
        found["left_out"] = run_eval(place, *half, TASKS="piqa,winogrande")
        return found

    with ThreadPoolExecutor(2) as pool:
        pair = pool.submit(lambda: {name: run_eval(place, name) for name in ("before", "after")})
        rest = {name: run_eval(place, *arguments, **more) for name, (arguments, more) in others.items()}
        return rest | resumed() | pair.result()


def results_of(place, name):
    """What lm_eval wrote for each task of a run: {task: dict}."""
    return {
        path.parts[-3]: json.loads(path.read_text()) for path in (place / "eval-results" / name).glob("*/*/results_*")
    }


def test_seven_tasks_before_and_after_and_the_report(place, runs):
    for name, model in (("before", "models/base"), ("after", "exports/sft_v1")):
        assert runs[name].returncode == 0, runs[name].stderr[-3000:]
        found = results_of(place, name)
        assert set(found) == set(SEVEN)
        for one in found.values():
            assert one["config"]["model_args"] == {"pretrained": model, "dtype": "bfloat16"}
            assert one["config"]["batch_size"] == "auto:2" and one["config"]["limit"] is None
        assert len(list((place / "eval-results" / name).glob("*/*/samples_*.jsonl"))) == 6 + 57
        facts = json.loads((place / "eval-results" / name / "run.json").read_text())
        assert facts["tasks"] == list(SEVEN) and facts["adds_bos"] is False
        assert facts["settings"]["SEEDS"] == "0,1234,1234,1234" and facts["settings"]["FEWSHOT"] == ""
        assert set(facts["versions"]) >= {"lm_eval", "torch", "transformers", "tokenizers", "datasets"}
        assert len(facts["files_sha256"]["model.safetensors"]) == 64
        assert "plain text: " in runs[name].stdout and "CANNOT READ" in runs[name].stdout
    output = runs["after"].stdout
    for row in ("ARC-Challenge", "ARC-Easy", "HellaSwag", "PIQA", "Winogrande", "Lambada (OpenAI)", "MMLU (overall)"):
        assert f"| {row} " in output
    assert output.count("| MMLU: ") == 4 and "mmlu_anatomy" not in output
    tasks, assistant = json.loads((place / "eval-results/comparison.json").read_text())["parts"]
    rows = tasks["rows"]
    assert len(rows) == 12 and all(row["paired"] for row in rows)
    mmlu = next(row for row in rows if row["task"] == "mmlu")
    assert mmlu["questions"] == 114 and mmlu["chance"] == 0.25
    assert mmlu["paired"]["difference"] == pytest.approx(mmlu["after"]["value"] - mmlu["before"]["value"])
    labels = [row["label"] for row in assistant["rows"]]
    assert labels[:4] == [f"Held-out answers: {source}" for source in ("a", "b", "all")] + ["Plain text"]
    assert "| Answers that end by themselves " in output
    for file in ("comparison.md", "comparison.png", "flips.jsonl", "after/answers.jsonl"):
        assert (place / "eval-results" / file).exists()


def test_own_task_and_ifeval_through_the_template_with_a_limit_and_other_settings(place, runs):
    assert runs["own"].returncode == 0, runs["own"].stderr[-3000:]
    found = results_of(place, "own-chat")
    assert found["own"]["results"]["own"]["sample_len"] == 3
    for one in found.values():
        assert one["chat_template_sha"] and one["config"]["model_dtype"] == "torch.float32"
        assert one["config"]["batch_size"] == "4" and one["max_length"] == 1400
    scores = found["ifeval"]["results"]["ifeval"]
    assert scores["sample_len"] == 3 and {
        0 <= scores[f"{level}_level_strict_acc,none"] <= 1 for level in ("prompt", "inst")
    } == {True}
    (samples,) = (place / "eval-results/own-chat/ifeval").glob("*/samples_ifeval_*.jsonl")
    sample = json.loads(samples.read_text().splitlines()[0])
    assert "<|im_start|>user\nAnswer 0.<|im_end|>" in sample["arguments"]["gen_args_0"]["arg_0"]
    assert "eval-results/own" in runs["own"].stdout and not (place / "eval-results/own").exists()


def test_scores_are_those_of_lm_evals_own_command(place, runs):
    words = (
        "--model hf --model_args pretrained=models/base,dtype=bfloat16 --tasks piqa --device cpu --batch_size auto:2"
    )
    command = [Path(sys.executable).with_name("lm_eval"), *words.split(), "--log_samples", "--output_path", "by_hand"]
    subprocess.run(command, cwd=place, env=environment_of(place, {}), check=True, capture_output=True, timeout=200)
    by_hand = eval_results.read_run(place / "by_hand")
    before = eval_results.read_run(place / "eval-results/before")
    assert by_hand["results"]["piqa"] == before["results"]["piqa"]
    assert by_hand["task_hashes"]["piqa"] == before["task_hashes"]["piqa"]
    assert eval_results.conditions(by_hand) == eval_results.conditions(before)


def test_a_killed_run_goes_on_and_repeats_nothing(place, runs):
    path, time_written = runs["first"]
    half_way = runs["half_way"]
    assert "going on; finished already: piqa" in half_way.stdout and "run_eval.sh: piqa on" not in half_way.stdout
    assert half_way.returncode == 1
    assert "sciq: " in half_way.stderr and "There is no result of 'half'. Finished tasks stay in" in half_way.stderr
    other = runs["other_limit"]
    assert other.returncode == 1 and "was begun otherwise: LIMIT:  there, 1 now" in other.stderr
    assert runs["left_out"].returncode == 0, runs["left_out"].stderr
    assert "finished already: piqa, winogrande" in runs["left_out"].stdout
    assert not path.exists()  # renamed with its folder, as it was written
    final = place / "eval-results/half/piqa" / path.parent.name / path.name
    assert final.stat().st_mtime_ns == time_written
    assert set(results_of(place, "half")) == {"piqa", "winogrande"}
    assert not list(place.glob("eval-results/.half*"))


def test_several_devices_take_tasks_side_by_side(place, runs):
    done = run_eval(place, "two", "models/base", DEVICE="cpu,cpu", TASKS="piqa,winogrande,arc_easy", LIMIT="1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert set(results_of(place, "two")) == {"piqa", "winogrande", "arc_easy"}
    logs = [(place / f"eval-results/two/device_{number}.log").read_text() for number in range(2)]
    assert all("Running loglikelihood requests" in log for log in logs)
    first, second, *_ = [
        line
        for line in done.stdout.splitlines()
        if line.startswith("run_eval.sh: ") and (" on cpu" in line or " s" in line)
    ]
    assert " on cpu, log in" in first and " on cpu, log in" in second  # the second began before the first was done


@pytest.mark.parametrize(
    ("run", "says"),
    [
        ("unknown_task", "lm_eval knows no task nonsense"),
        ("no_gpu", "DEVICE=cuda:99, but torch sees"),
        ("wide", "tokens, but the model"),
        ("cannot_read", "models/base cannot read plain text. Likely causes"),
        ("limit", "LIMIT=few: run_eval.sh says beside LIMIT what it may be"),
        ("no_data", "data/nowhere/tokenizer holds no tokenizer.json"),
    ],
)
def test_what_is_wrong_is_said_before_the_work(place, runs, run, says):
    done = runs[run]
    assert done.returncode == 1 and says in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert "Running loglikelihood requests" not in done.stderr


def test_earlier_results_stay(place, tmp_path):
    earlier = place / "kept/before/results.txt"
    earlier.parent.mkdir(parents=True)
    earlier.write_text("earlier")
    done = run_eval(place, "before", OUTPUT="kept")
    assert done.returncode == 1 and "kept/before already holds results. Move them away first" in done.stderr
    assert earlier.read_text() == "earlier"


def test_model_folder_is_checked_at_once(place):
    done = run_eval(place, "x", "models/nowhere")
    assert done.returncode == 1 and "no config.json in the model folder models/nowhere" in done.stderr
    shell = place / "models/shell"
    shell.mkdir()
    for file in ("config.json", "tokenizer_config.json"):
        (shell / file).write_text("{}")
    done = run_eval(place, "x", "models/shell")
    assert done.returncode == 1 and "no *.safetensors in the model folder models/shell" in done.stderr
    done = run_eval(place, "x", "models/base", INCLUDE_PATH="nowhere")
    assert done.returncode == 1 and "no folder nowhere (INCLUDE_PATH)" in done.stderr
    done = run_eval(place, "../x", "models/base")
    assert done.returncode == 1 and "must be letters, digits" in done.stderr


def test_no_lm_eval_on_the_path(place):
    done = run_eval(place, "x", "models/base", PATH="/usr/bin:/bin")
    assert done.returncode == 1 and "no lm_eval on the path" in done.stderr


@pytest.mark.parametrize("arguments", [(), ("x",), ("before", "b", "c")])
def test_usage(place, arguments):
    done = run_eval(place, *arguments)
    assert done.returncode == 2 and "bash run_eval.sh NAME MODEL_DIR" in done.stderr
