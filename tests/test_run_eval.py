"""run_eval.sh with the real lm_eval: all seven tasks under their own names, on a tiny model and small local data.

lm_eval's task definitions load data sets by name; a folder of that name under the working directory is read in place of
the Hub's. So everything runs offline and nothing of lm_eval is replaced.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest

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


# ---- A tiny model ----


def write_model(folder, seed):
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(["the cat sat on the mat"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant] "
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=512, bos_token_id=0, eos_token_id=1, pad_token_id=1, **shape
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


# ---- The runs ----


def run_eval(place, *arguments, **environment):
    return subprocess.run(
        ["bash", REPO / "run_eval.sh", *arguments],
        cwd=place,
        env=os.environ
        | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        | {"HF_HOME": str(place / "hf"), "DEVICE": "cpu"}
        | environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working directory with data, an own task, and models in the places that run_eval.sh expects."""
    root = tmp_path_factory.mktemp("eval")
    write_data(root)
    write_own_task(root / "own_tasks")
    write_model(root / "models/base", seed=0)
    write_model(root / "exports/sft_v1", seed=1)
    return root


@pytest.fixture(scope="module")
def runs(place):
    """All runs that load lm_eval, two at a time: each takes 10 to 30 seconds, most of it imports."""
    wide = place / "exports/wide"
    write_model(wide, seed=2)
    config = json.loads((wide / "config.json").read_text())
    (wide / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] - 1}))
    own = {"TASKS": "own", "INCLUDE_PATH": "own_tasks", "LIMIT": "3", "CHAT_TEMPLATE": "1", "BATCH_SIZE": "4"}
    others = {
        "own": (["own", "exports/sft_v1"], own | {"DTYPE": "float32", "MODEL_ARGS": "max_length=256"}),
        "half_way": (["half", "models/base"], {"TASKS": "piqa,sciq"}),  # there is no data for sciq here
        "unknown_task": (["unknown", "models/base"], {"TASKS": "piqa,nonsense"}),
        "no_gpu": (["gpu", "models/base"], {"DEVICE": "cuda:99"}),
        "wide": (["wide", "exports/wide"], {}),
    }
    with ThreadPoolExecutor(2) as pool:
        pair = pool.submit(lambda: {name: run_eval(place, name) for name in ("before", "after")})
        rest = {name: run_eval(place, *arguments, **more) for name, (arguments, more) in others.items()}
        return pair.result() | rest


def results_of(place, name):
    (path,) = (place / "eval-results" / name).glob("*/results_*.json")
    return json.loads(path.read_text())


def test_seven_tasks_before_and_after_and_the_table(place, runs):
    for name, model in (("before", "models/base"), ("after", "exports/sft_v1")):
        assert runs[name].returncode == 0, runs[name].stderr[-3000:]
        found = results_of(place, name)
        assert set(SEVEN) <= set(found["results"])
        assert found["config"]["model_args"] == {"pretrained": model, "dtype": "bfloat16"}
        assert found["config"]["batch_size"] == "auto:2" and found["config"]["limit"] is None
        assert len(list((place / "eval-results" / name).glob("*/samples_*.jsonl"))) == 6 + 57
        facts = json.loads((place / "eval-results" / name / "run.json").read_text())
        assert facts["tasks"] == list(SEVEN) and facts["adds_bos"] is False
        assert set(facts["versions"]) >= {"lm_eval", "torch", "transformers", "tokenizers", "datasets"}
        assert len(facts["files_sha256"]["model.safetensors"]) == 64
    output = runs["after"].stdout
    for row in ("ARC-Challenge", "ARC-Easy", "HellaSwag", "PIQA", "Winogrande", "Lambada (OpenAI)", "MMLU (overall)"):
        assert f"| {row} " in output
    assert output.count("| MMLU: ") == 4 and "mmlu_anatomy" not in output
    rows = json.loads((place / "eval-results/comparison.json").read_text())["rows"]
    assert len(rows) == 12 and all(row["paired"] for row in rows)
    mmlu = next(row for row in rows if row["task"] == "mmlu")
    assert mmlu["questions"] == 114
    assert mmlu["paired"]["difference"] == pytest.approx(mmlu["after"]["value"] - mmlu["before"]["value"])
    for file in ("comparison.md", "comparison.png", "flips.jsonl"):
        assert (place / "eval-results" / file).exists()


def test_own_task_with_limit_template_and_other_settings(place, runs):
    assert runs["own"].returncode == 0, runs["own"].stderr[-3000:]
    found = results_of(place, "own")
    assert found["results"]["own"]["sample_len"] == 3 and found["chat_template_sha"]
    assert found["config"]["model_dtype"] == "torch.float32" and found["config"]["batch_size"] == "4"
    assert found["max_length"] == 256
    assert "--before eval-results/before --after eval-results/own" in runs["own"].stdout


def test_failure_half_way_leaves_no_result(place, runs):
    assert runs["half_way"].returncode == 1
    assert "lm_eval ended with exit code 1; there is no result of 'half'" in runs["half_way"].stderr
    assert not [path.name for path in (place / "eval-results").iterdir() if "half" in path.name]


@pytest.mark.parametrize(
    ("run", "says"),
    [
        ("unknown_task", "Tasks not found: nonsense"),
        ("no_gpu", "DEVICE=cuda:99, but torch sees"),
        ("wide", "tokens, but the model"),
    ],
)
def test_what_is_wrong_is_said_before_the_work(place, runs, run, says):
    assert runs[run].returncode == 1 and says in runs[run].stderr and "Loading weights" not in runs[run].stderr


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
