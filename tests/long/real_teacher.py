"""Generate 20 conversations with a real server and a real model, over a kill, and prepare them.

    python tests/long/real_teacher.py           about 40 minutes on two CPU cores

The demo's SmolLM2-135M (made if it is missing) can't write questions as JSON. So it is trained first, by the suite's
own scripts, on what tests/teacher_stub.py answers: the form of each stage, filled with common words. `transformers
serve` then runs it; generate_constitutional.py goes through all stages, the judge among them, is killed in its middle
and started again; prepare_data.py reads what it wrote. How many rows come about is the small model's matter: pairs and
think blocks are hard for it. The ledger must be right: the server answered once for each answer on disk, but for those
in flight at the kill. The last line is RESULT.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path += [str(TESTS), str(TESTS.parent / "benchmarks")]
import common  # puts the suite on the path
from teacher_stub import Stub, answer_to
from tiny_teacher import Server

import generate_constitutional
from sft import settings
from sft.generation import records
from sft.generation import teacher as teachers

# ---- Run ----
EXAMPLES = 20  # conversations to ask for
SEED = 3  # of what is asked
KILL_AFTER = 10  # answers on disk

# ==== Constants ====

CONSTITUTION = """# A small model's constitution, short because each request pays for it
## Who
- name: Genesis
- maker: one engineer
- language: en

It is brief and friendly.
## Principles
### truth: Say what is true
It invents nothing and says when it does not know.
### care: Care for people
It helps where it can and warns where there is danger.
## Askers
- a nurse
- a student
- a cook
## Categories
"""
TOPICS = {
    "reasoning": ("adding two small numbers", "comparing two prices"),
    "safety": ("household chemicals", "kitchen knives"),
    "personality": ("what the assistant likes", "a bad day"),
    "instruction_following": ("a short poem", "a packing list"),
}
FORMATS = {name: ["1 turn, 5 to 30 words", "2 turns, 5 to 30 words"] for name in TOPICS}
FORMATS["reasoning"] = ["1 turn, 5 to 30 words", "1 turn, 5 to 30 words, think"]
for name, topics in TOPICS.items():
    parts = [f"### {name}: 25%", "Everyday questions.", "Topics:", *(f"- {topic}" for topic in topics)]
    CONSTITUTION += "\n".join([*parts, "Formats:", *(f"- {form}" for form in FORMATS[name])]) + "\n"

TRAINER = ["--epochs", 1, "--sequences-per-step", 8, "--learning-rate", 1e-3, "--min-learning-rate", 1e-4]
TRAINER += ["--warmup-steps", 5, "--compute-dtype", "float32", "--activation-checkpointing", "off"]
TRAINER += ["--tokens-per-micro-batch", 1024, "--validate-every", 0, "--save-every", 1000]

# ==== The teacher ====


def script(folder, *words):
    """Run a script of the suite in `folder`."""
    subprocess.run([sys.executable, *map(str, words)], cwd=folder, check=True)


def stub_rows(folder):
    """Write what the stub answers to a run with another seed as conversations; return the file's Path."""
    with Stub() as stub:
        flags = ["--provider", "openai", "--base-url", stub.url + "/v1", "--output", "stub.jsonl", "--seed", 99]
        flags += ["--examples", 40, "--held-out", 0, "--questions-per-call", 2, "--judge-threshold", 1]
        subprocess.run(generate_command(flags), cwd=folder)
        bodies = [body for _, _, body in stub.requests]
    lines = []
    for body in bodies:
        asked = {"system": body["messages"][0]["content"], "messages": body["messages"][1:]}
        answer = {"role": "assistant", "content": answer_to(asked)}
        lines.append(json.dumps({"messages": [*body["messages"], answer]}) + "\n")
    path = folder / "stub-rows.jsonl"
    path.write_text("".join(lines))
    return path


def train_teacher(folder):
    """Return the folder of the demo's base, fine-tuned on the stub's answers; it samples, as a teacher should."""
    mixture = [{"name": "stub", "path": stub_rows(folder).name, "schema": "messages", "identity_patterns": []}]
    (folder / "stub.json").write_text(json.dumps([mixture[0] | {"examples": "all"}]))
    base, data = ["--base-model", common.BASE], ["--data-dir", "teacher-data"]
    script(folder, common.ROOT / "prepare_data.py", "--mixture", "stub.json", *base, *data, "--max-seq-len", 1024,
           "--validation-conversations", 1, "--deduplicate", "off", *common.DECONTAMINATION_OFF)  # fmt: skip
    resized = ["--resized-model", "teacher-resized"]
    script(folder, common.ROOT / "resize_vocab.py", *base, *data, *resized)
    run = [*resized, "--checkpoint-dir", "teacher-checkpoints"]
    subprocess.run(
        [*common.TORCHRUN, str(common.CORES), *map(str, [common.ROOT / "sft_v1.py", *data, *run, *TRAINER])],
        cwd=folder, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    script(folder, common.ROOT / "export_hf.py", *run, "--export-dir", "teacher")
    path = folder / "teacher/generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"do_sample": True}))
    return folder / "teacher"


# ==== The run ====


def generate_command(flags):
    """Return the command of generate_constitutional.py with these flags."""
    return [sys.executable, str(common.ROOT / "generate_constitutional.py"), *map(str, flags)]


def kill_in_the_middle(command, folder):
    """Run the command until the stage `answer` has KILL_AFTER answers, and kill it."""
    answers = folder / "rows.work/answer.jsonl"
    process = subprocess.Popen(command, cwd=folder)
    while not answers.exists() or answers.read_text().count('"text"') < KILL_AFTER:
        if process.poll() is not None:
            raise SystemExit("It ended before it could be killed.")
        time.sleep(0.1)
    process.kill()
    process.wait()


def count(folder, server):
    """Return the RESULT's values; raise AssertionError if the ledger and the server disagree."""
    args = {name: value for name, value in vars(generate_constitutional).items() if name.isupper()}
    files = teachers.Files(folder / "rows.work", args, writes=False)
    total = sum(files.ledger().values(), records.Counter())
    stages = {stage: len(file.answers) for stage, file in files.stages.items()}
    assert sum(stages.values()) == total["calls"], (stages, total)
    assert total["calls"] <= server.answered <= total["calls"] + total["lost"], (server.answered, total)
    assert total["lost"] <= 1 and all(stages.values()), (stages, total)  # one kill, one request at a time
    kept = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    return {"calls": total["calls"], "lost": total["lost"], "answered": server.answered, "rows": len(kept)}


def prepare(folder):
    """Run prepare_data.py on the rows. Returns: how many conversations it kept."""
    source = {"name": "constitutional", "path": "rows.jsonl", "schema": "messages", "examples": "all"}
    (folder / "mixture.json").write_text(json.dumps([source | {"identity_patterns": []}]))
    flags = ["--mixture", "mixture.json", "--base-model", common.BASE, "--data-dir", "data"]
    flags += ["--validation-conversations", "1", *common.DECONTAMINATION_OFF]
    subprocess.run([sys.executable, common.ROOT / "prepare_data.py", *map(str, flags)], cwd=folder, check=True)
    (prepared,) = json.loads((folder / "data/report.json").read_text())["sources"]
    return prepared["kept"]


def main(args):
    """Serve, generate over a kill, count, prepare."""
    common.base_folder()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "constitution.md").write_text(CONSTITUTION)
        teacher = train_teacher(folder)
        with Server(teacher, folder / "server.log") as server:
            flags = ["--provider", "openai", "--base-url", server.url, "--model", teacher.name]
            flags += ["--output", "rows.jsonl", "--examples", args["EXAMPLES"], "--held-out", 0]
            flags += ["--questions-per-call", 2, "--concurrency", 1, "--judge-threshold", 1]
            flags += ["--seed", args["SEED"], "--timeout-seconds", 600]
            kill_in_the_middle(generate_command(flags), folder)
            again = subprocess.run(generate_command(flags), cwd=folder)
            result = count(folder, server)
        print(f"exit status {again.returncode}, which is 1 where rows are missing")
        common.result(**result, prepared=prepare(folder))


if __name__ == "__main__":
    main(settings.from_flags(globals()))
