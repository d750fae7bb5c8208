"""prepare_data.py: sequences cut to the window, rows and their fate, kills and restarts, refusals."""

import contextlib
import io
import json
import os
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

import prepare_data
from sft.data import chatml
from sft.data import sources as data_sources

ROOT = Path(__file__).resolve().parent.parent
# ---- Overflow ----


@pytest.fixture(scope="session")
def bpe(bpe_tokenizer_dir, tmp_path_factory):
    """The byte-level tokenizer, extended, and its Encoder."""
    tokenizer, adds_bos = chatml.extend_tokenizer(bpe_tokenizer_dir, True, True)
    return tokenizer, chatml.Encoder(tokenizer, adds_bos, True, True)


def cut(encoder, turns, max_seq_len, overflow):
    """Return (the sequences as (ids, mask) lists, what was lost)."""
    pieces, lost = chatml.cut([], encoder.encode([turns])[0], max_seq_len, overflow)
    return [tuple(array.tolist() for array in chatml.concatenate([], [piece])) for piece in pieces], lost


def test_split_loses_no_turn_and_repeats_the_system_turn(bpe):
    tokenizer, encoder = bpe
    turns = [("system", "Be brief.")]
    for n in range(9):
        turns += [("user", f"question {n}?"), ("assistant", f"answer {n}.")]
    [(_, whole)], _ = cut(encoder, turns, 10_000, "split")
    pieces, lost = cut(encoder, turns, 120, "split")
    assert not lost
    lengths, texts = [len(ids) for ids, _ in pieces], [tokenizer.decode(ids) for ids, _ in pieces]
    assert len(pieces) > 1 and max(lengths) <= 120
    assert all(text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n") for text in texts)
    assert [n for text in texts for n in range(9) if f"answer {n}." in text] == list(range(9))
    assert sum(sum(mask) for _, mask in pieces) == sum(whole)


def test_truncate_and_drop(bpe):
    tokenizer, encoder = bpe
    turns = [("user", "Hi"), ("assistant", "word " * 200)]
    for overflow in ("truncate", "split"):  # a single exchange cannot be split
        [(ids, mask)], lost = cut(encoder, turns, 60, overflow)
        assert lost == ["end cut off at the window"]
        assert len(ids) == 60 and mask[-1] and encoder.end not in ids[20:]
    assert cut(encoder, turns, 60, "drop") == ([], [])
    long_question = [("user", "word " * 200), ("assistant", "Yes.")]
    assert cut(encoder, long_question, 60, "split")[0] == []
    both = [*long_question, ("user", "Hi"), ("assistant", "Hello.")]
    [(ids, _)], lost = cut(encoder, both, 60, "split")
    assert "Hello." in tokenizer.decode(ids) and "exchange without a trained token in the window left out" in lost


# ---- Whole runs ----


def run(tmp_path, mixture, base, *flags, output="out", suite=ROOT):
    """Write the mixture (sources with "rows" inline) and run the script on it, as `python prepare_data.py` does.

    In this process: another one costs 4 seconds of imports. Returns: CompletedProcess (returncode, stdout, stderr).
    """
    sources = []
    for source in mixture or []:
        source = dict(source)
        if "rows" in source:
            source["path"] = f"{source['name']}.jsonl"
            lines = [row if isinstance(row, str) else json.dumps(row) for row in source.pop("rows")]
            (tmp_path / source["path"]).write_bytes(
                "".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape")
            )
        sources.append({"schema": "messages", "examples": "all"} | source)
    if mixture:
        (tmp_path / "mixture.json").write_text(json.dumps(sources))
    command = [suite / "prepare_data.py", "--mixture", tmp_path / "mixture.json"]
    command += ["--base-tokenizer", base, "--output-dir", tmp_path / output, "--max-seq-len", "256"]
    command += ["--decontaminate-against", "", *flags]
    command, out, err, code = [str(part) for part in command], io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", command)
        try:
            runpy.run_path(command[0], run_name="__main__")
        except SystemExit as error:
            code = 1 if isinstance(error.code, str) else error.code
            err.write(str(error.code))
    return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())


def bytes_of(folder):
    """Return the content of every file that the data depend on, by name."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith("report")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


def ledger_of(folder):
    return [json.loads(line) for line in (folder / "rejected.jsonl").read_text().splitlines()]


def chat(*texts, first="user"):
    """Return a `messages` row whose roles alternate from `first`."""
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return {"messages": [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]}


ODD = {
    "no turns": {"messages": []},
    "no turns in the schema's columns": {"text": "x"},
    "content is not text": chat("Hi", None),
    "role is not text": {"messages": [{"role": 1, "content": "x"}]},
    "tool turn": {"messages": [{"role": "user", "content": "x"}, {"role": "tool", "content": "y"}]},
    "unknown role": {"messages": [{"role": "wizard", "content": "x"}]},
    "text is not valid Unicode": '{"messages": [{"role": "user", "content": "\\ud800"}]}',
    "system turn in the middle": {"messages": [*chat("a", "b")["messages"], {"role": "system", "content": "c"}]},
    "empty user turn": chat("", "b"),
    "empty assistant turn": chat("a", " "),
    "no assistant turn": chat("a"),
    "no assistant turn after a user turn": chat("a", first="assistant"),
    "row is not valid JSON": '{"messages": [',
    "row is not valid UTF-8": '{"messages": [{"role": "user", "content": "\udcff"}]}',
    "duplicate": chat(" Question  0", "ANSWER 0"),
    "another model's identity": chat("Who are you?", "As an AI developed by OpenAI, I cannot."),
    "nothing trainable in the window": chat("word " * 400, "b"),
    "longer than a million characters": chat("a", "b" * 1_000_001),
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, bpe_tokenizer_dir):
    """One run over all schemas and all odd rows."""
    folder = tmp_path_factory.mktemp("prepared")
    good = [chat(f"question {n}", f"answer {n}") for n in range(28)]
    good += [chat("is <|im_end|> text?", "yes"), chat("think", "<think>a</think>b")]
    turns = [
        [{"from": "system", "value": ""}, {"from": "human", "value": f"a{n}"}, {"from": "gpt", "value": "b "}]
        for n in range(21)
    ]
    numbers = [str(n) for n in range(21)]
    prompts = {"prompt": numbers, "response": ["r"] * 21, "kind": ["good"] * 20 + ["bad"]}
    pq.write_table(pa.table(prompts), folder / "prompts.parquet")
    (folder / "array.json").write_text(json.dumps([{"conversations": t} for t in turns])[:-40])
    mixture = [
        {"name": "odd", "rows": [*good, *ODD.values(), chat("a", "b", "c"), chat("b", "a", "c", first="assistant")]},
        {"name": "array", "path": "array.json", "schema": "conversations"},
        {
            "name": "pairs",
            "rows": [{"query": f"q{n}", "response": "r"} for n in range(1300)],
            "schema": "query/response",
        },
        {"name": "prompts", "path": "prompts.parquet", "schema": "prompt/response", "repeat": 2},
    ]
    mixture[3]["exclude"] = {"kind": ["bad"]}
    mixture[2] |= {"examples": 1100, "seed": 7}  # three tasks of a worker
    result = run(folder, mixture, bpe_tokenizer_dir, "--validation-conversations", "4")
    assert result.returncode == 0, result.stderr
    return folder, mixture, result.stdout


def test_every_row_has_a_fate_and_the_report_adds_up(prepared):
    folder, _, stdout = prepared
    report = report_of(folder / "out")
    odd, array, pairs, prompts = report["sources"]
    assert odd["control_text"] == 1 and pairs["control_text"] == 0
    assert odd["reasons"] == dict.fromkeys(ODD, 1)
    assert odd["changes"]["unanswered last user turn left out"] == 1
    assert odd["changes"]["assistant turn before the first user turn left out"] == 1
    assert array["reasons"] == {"truncated file": 1} and array["kept"] == 20
    assert array["changes"]["empty system turn left out"] == 20 and array["changes"]["white space trimmed"] == 20
    assert pairs["conversations"] == 1100 and pairs["validation_conversations"] == 4
    assert prompts["reasons"] == {"excluded: kind is bad": 1}
    assert odd["validation_conversations"] == 3 and odd["kept"] == 32  # a tenth of what is kept, not of what is read
    assert prompts["source"]["repeat"] == 2 and prompts["source"]["exclude"] == {"kind": ["bad"]}
    assert prompts["conversations"] == 18 and prompts["sequences"] == 36 and prompts["validation_conversations"] == 2
    ledger = ledger_of(folder / "out")
    for source in report["sources"]:
        assert source["read"] == source["kept"] + source["rejected"]
        assert source["kept"] == source["conversations"] + source["validation_conversations"]
        lines = [line for line in ledger if line["source"] == source["name"]]
        assert source["rejected"] == sum(line["fate"] == "rejected" for line in lines)
        assert source["sequences"] == sum(source["lengths"])
    row = next(line for line in ledger if line["reason"] == "excluded: kind is bad")
    assert row["row"] == 20 and row["start"] == "20"
    row = next(line for line in ledger if line["reason"] == "unknown role")
    assert row["row"] == 30 + list(ODD).index("unknown role") and row["start"] == "x"
    found = {line["reason"]: line["found"] for line in ledger if "found" in line}
    assert found.pop("duplicate") in ("odd row 0", f"odd row {30 + list(ODD).index('duplicate')}")  # the first drawn
    assert found.pop("truncated file").startswith("byte ")
    assert found == {"another model's identity": "developed by OpenAI"}
    changed = {line["reason"]: line["start"] for line in ledger if line["fate"] == "changed"}
    assert changed["unanswered last user turn left out"] == "a"
    assert changed["assistant turn before the first user turn left out"] == "b"
    assert report["base_vocab_size"] == 49_152 and report["vocab_size"] == 49_156
    assert report["totals"]["tokens"] == sum(source["tokens"] for source in report["sources"])
    assert "| odd | 50 | 18 |" in stdout and (folder / "out" / "report.md").read_text() in stdout
    assert "| conversations | repeat | sequences |" in stdout and "| 18 | 2x | 36 |" in stdout


def test_the_folder_is_what_others_load(prepared):
    folder, _, _ = prepared
    data = datasets.load_from_disk(str(folder / "out"))
    report = json.loads((folder / "out" / "report.json").read_text())
    assert set(data) == {"train", "validation"} and data["train"].column_names == [
        "input_ids",
        "assistant_masks",
        "source",
    ]
    assert data["train"].features["input_ids"].feature.dtype == "uint16"
    assert len(data["train"]) == report["totals"]["sequences"]
    assert sum(map(len, data["train"]["input_ids"])) == report["totals"]["tokens"]
    assert sum(map(sum, data["train"]["assistant_masks"])) == report["totals"]["trainable_tokens"]
    assert not any(mask[0] for mask in data["train"]["assistant_masks"])
    with pa.OSFile(str(folder / "out" / "train" / "data-00003.arrow")) as file:  # repeated on disk, not in memory
        assert [batch.num_rows for batch in pa.ipc.open_stream(file)] == [18, 18]
    repeated = data["train"][-36:]["input_ids"]
    assert repeated[:18] == repeated[18:] and len(set(map(tuple, repeated))) == 18
    tokenizer = AutoTokenizer.from_pretrained(folder / "out" / "tokenizer")
    assert len(tokenizer) == report["vocab_size"] == 49_156
    held_out, trained = (
        {tokenizer.decode(row["input_ids"]) for row in data[split] if row["source"] == "pairs"} for split in data
    )
    assert sorted(map(len, (held_out, trained))) == [4, 1100] and not held_out & trained
    assert not (folder / "out.unfinished").exists() and not (folder / "out" / "progress").exists()
    assert (folder / "out" / "report.png").read_bytes()[:4] == b"\x89PNG"


def test_the_same_seed_gives_the_same_bytes_with_any_number_of_workers(prepared, bpe_tokenizer_dir):
    folder, mixture, _ = prepared
    for workers in (1, 2, 8):
        flags = ["--validation-conversations", "4", "--workers", str(workers)]
        result = run(folder, mixture, bpe_tokenizer_dir, *flags, output=f"by{workers}")
        assert result.returncode == 0, result.stderr
        assert bytes_of(folder / f"by{workers}") == bytes_of(folder / "out")
        assert report_of(folder / f"by{workers}")["digest"] == report_of(folder / "out")["digest"]


def test_it_needs_no_torch(prepared, bpe_tokenizer_dir):
    """Torch would take 0.2 GiB and more than a second of every start."""
    folder, mixture, _ = prepared
    (folder / "array_only.json").write_text(json.dumps([mixture[1] | {"examples": "all"}]))
    flags = ["--mixture", folder / "array_only.json", "--base-tokenizer", bpe_tokenizer_dir]
    flags += ["--output-dir", folder / "light", "--decontaminate-against", ""]
    code = "import prepare_data; from sft import settings; prepare_data.main(settings.from_flags(vars(prepare_data)))"
    command = [sys.executable, "-c", f"{code}; sys.exit('torch' in sys.modules)", *map(str, flags)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and (folder / "light" / "report.json").exists(), done.stderr


def test_another_seed_draws_other_rows(prepared, bpe_tokenizer_dir):
    folder, mixture, _ = prepared
    mixture = [mixture[2] | {"seed": 8}]
    assert run(folder, mixture, bpe_tokenizer_dir, "--validation-conversations", "4", output="other").returncode == 0
    drawn = [datasets.load_from_disk(str(folder / name))["train"] for name in ("out", "other")]
    drawn = [{tuple(row["input_ids"]) for row in data if row["source"] == "pairs"} for data in drawn]
    assert drawn[0] != drawn[1]


def test_show_prints_sequences_with_the_trained_text_in_green(prepared):
    folder, _, _ = prepared
    command = [sys.executable, ROOT / "prepare_data.py", "--output-dir", folder / "out", "--show", "1"]
    shown = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert shown.returncode == 0 and shown.stdout.count("----\n") == 4
    assert "<|im_start|>assistant\n\033[32mr<|im_end|>\033[0m" in shown.stdout


# ---- What is rejected on purpose ----


def test_duplicates_are_found_across_sources_and_as_told(tmp_path, bpe_tokenizer_dir):
    rows = [chat(f"q{n}", f"Answer {n}") for n in range(30)]
    shouted = [chat(f"Q{n} ", f"answer  {n}") for n in range(10)]
    fullwidth = [chat("ｑ11", "Answer 11")]  # NFKC
    other = [chat(f"r{n}", "x") for n in range(30)]
    mixture = [{"name": "first", "rows": rows}, {"name": "second", "rows": rows[20:] + shouted + fullwidth + other}]
    for how, expected in (("normalised", 21), ("exact", 10), ("off", 0)):
        result = run(tmp_path, mixture, bpe_tokenizer_dir, "--deduplicate", how, output=how)
        assert result.returncode == 0, result.stderr
        assert report_of(tmp_path / how)["sources"][1]["reasons"].get("duplicate", 0) == expected
    found = {line["row"]: line["found"] for line in ledger_of(tmp_path / "normalised")}
    assert found == {n: f"first row {20 + n}" for n in range(10)} | {10 + n: f"first row {n}" for n in range(10)} | {
        20: "first row 11"
    }


CLAIMS = [
    "I'm ChatGPT, how can I help?",
    "I am Claude.",
    "As an AI language model developed by OpenAI, I have no feelings.",
    "i’m an ai assistant made by Google",
    "I am Tulu 3.",
    "My answer: Tülü is a carpet; Tülu 3 is a model.",
]
NO_CLAIMS = ["I am Genesis.", "GPT-4 is a model.", "Flutter was developed by Google.", "Claude Monet painted it."]


def test_answers_that_claim_to_be_another_model_are_rejected(tmp_path, bpe_tokenizer_dir):
    rows = [chat(f"Who? {n}", text) for n, text in enumerate(CLAIMS + NO_CLAIMS)]
    rows += [chat("Are you ChatGPT? I am ChatGPT.", "No.")]  # what a user says is no claim
    assert run(tmp_path, [{"name": "s", "rows": rows}], bpe_tokenizer_dir).returncode == 0
    assert sorted(line["row"] for line in ledger_of(tmp_path / "out")) == list(range(len(CLAIMS)))
    assert {line["reason"] for line in ledger_of(tmp_path / "out")} == {"another model's identity"}
    flags = ["--identity-patterns", "Genesis"]
    assert run(tmp_path, [{"name": "s", "rows": rows}], bpe_tokenizer_dir, *flags, output="own").returncode == 0
    assert [line["found"] for line in ledger_of(tmp_path / "own")] == ["Genesis"]
    # A source of one's own says who it is not: "No, I am Genesis. ChatGPT was made by OpenAI."
    mixture = [{"name": "s", "rows": rows, "identity_patterns": []}]
    assert run(tmp_path, mixture, bpe_tokenizer_dir, output="none").returncode == 0
    assert not ledger_of(tmp_path / "none")


def test_questions_of_the_evaluation_are_rejected_with_the_task_named(tmp_path, bpe_tokenizer_dir):
    question = json.loads((ROOT / "demo" / "tasks" / "general.jsonl").read_text(encoding="utf-8").splitlines()[0])
    answer = question["choices"][question["answer"]]
    assert len(f"{question['question']} {answer}".split()) >= 8
    rows = [chat(f"clean {n}", "yes") for n in range(20)] + [chat(question["question"].upper(), answer)]
    flags = [
        "--decontaminate-against",
        "demo_persona,demo_general",
        "--tasks-include-path",
        str(ROOT / "demo" / "tasks"),
    ]
    flags += ["--decontamination-ngram", "8"]
    result = run(tmp_path, [{"name": "s", "rows": rows}], bpe_tokenizer_dir, *flags)
    assert result.returncode == 0, result.stderr
    [line] = ledger_of(tmp_path / "out")
    assert line["row"] == 20 and line["reason"] == "contaminated: demo_general" and line["found"]
    assert [task["task"] for task in report_of(tmp_path / "out")["evaluation"]] == ["demo_persona", "demo_general"]
    assert "| demo_general | 64 |" in (tmp_path / "out" / "report.md").read_text()


# ---- Kills and restarts ----


@pytest.fixture
def three(tmp_path):
    """Three sources, of which the second has 3 tasks of a worker; and the command of a real process."""
    for name, number in (("one", 40), ("two", 1300), ("three", 40)):
        rows = [chat(f"{name} asks {n}", f"answer {n} " * 40) for n in range(number)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def mixture(**changes):
        sources = [{"name": n, "path": f"{n}.jsonl", "schema": "messages"} for n in ("one", "two", "three")]
        sources = [source | {"examples": "all"} | changes.get(source["name"], {}) for source in sources]
        (tmp_path / "mixture.json").write_text(json.dumps(sources))

    mixture()
    return mixture


def command_of(folder, base, output, *flags):
    command = [sys.executable, ROOT / "prepare_data.py", "--mixture", folder / "mixture.json", "--base-tokenizer", base]
    command += ["--output-dir", folder / output, "--decontaminate-against", "", "--workers", "2", *flags]
    return [str(part) for part in command]


def wait_for(path, process):
    for _ in range(3000):
        if path.exists() or process.poll() is not None:
            return
        time.sleep(0.01)


def test_killed_at_any_moment_it_ends_with_the_same_bytes_and_repeats_no_finished_source(
    three, tmp_path, bpe_tokenizer_dir
):
    whole = subprocess.run(command_of(tmp_path, bpe_tokenizer_dir, "whole"), capture_output=True, text=True)
    assert whole.returncode == 0, whole.stderr
    unfinished = tmp_path / "out.unfinished"
    markers = ("data/tokenizer/tokenizer.json", "progress/00000.json", "data/train/data-00001.arrow")
    for marker in (*markers, "progress/00002.json"):
        process = subprocess.Popen(command_of(tmp_path, bpe_tokenizer_dir, "out"), stderr=subprocess.DEVNULL)
        wait_for(unfinished / marker, process)
        process.kill()
        process.wait()
        assert not (tmp_path / "out").exists() or marker == "progress/00002.json"
    done = [path.name for path in sorted((unfinished / "progress").glob("*.json"))]
    if unfinished.exists():  # else the last kill came too late
        again = subprocess.run(command_of(tmp_path, bpe_tokenizer_dir, "out"), capture_output=True, text=True)
        assert again.returncode == 0, again.stderr
        assert again.stdout.count("finished by an earlier run") == len(done) >= 2
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")
    assert report_of(tmp_path / "out")["digest"] == report_of(tmp_path / "whole")["digest"]


def test_a_kill_after_the_last_rename_leaves_a_clean_folder(tmp_path, bpe_tokenizer_dir, monkeypatch):
    def killed(*_, **__):
        raise KeyboardInterrupt

    for output in ("whole", "cut"):
        assert run(tmp_path, [{"name": "s", "rows": ROWS}], bpe_tokenizer_dir, output=output).returncode in (0, 1)
        monkeypatch.setattr("shutil.rmtree", killed)
    assert (tmp_path / "cut.unfinished").exists() and bytes_of(tmp_path / "cut") == bytes_of(tmp_path / "whole")
    monkeypatch.undo()
    (tmp_path / "cut").rename(tmp_path / "moved")
    assert run(tmp_path, None, bpe_tokenizer_dir, output="cut").returncode == 0
    assert bytes_of(tmp_path / "cut") == bytes_of(tmp_path / "whole") and not (tmp_path / "cut.unfinished").exists()


def test_a_mixture_that_shrank_leaves_nothing_of_its_old_sources(three, tmp_path, bpe_tokenizer_dir):
    three(three={"examples": 1000})
    assert run(tmp_path, None, bpe_tokenizer_dir).returncode == 1
    (tmp_path / "mixture.json").write_text(json.dumps(json.loads((tmp_path / "mixture.json").read_text())[:1]))
    result = run(tmp_path, None, bpe_tokenizer_dir)
    assert result.returncode == 0 and result.stdout.count("finished by an earlier run") == 1
    files = [path.name for split in ("train", "validation") for path in sorted((tmp_path / "out" / split).iterdir())]
    assert files == ["data-00000.arrow", "dataset_info.json", "state.json"] * 2


def test_an_edited_setting_in_the_file_repeats_nothing_and_an_edited_rule_everything(
    three, tmp_path, bpe_tokenizer_dir
):
    shutil.copytree(ROOT / "sft", tmp_path / "sft")
    shutil.copy(ROOT / "prepare_data.py", tmp_path)
    script, rules = tmp_path / "prepare_data.py", tmp_path / "sft" / "data" / "conversations.py"
    three(three={"examples": 1000})
    assert run(tmp_path, None, bpe_tokenizer_dir, suite=tmp_path).returncode == 1
    script.write_text(script.read_text().replace("\nWORKERS = 0", "\nWORKERS = 1").replace("10_000", "20_000"))
    assert run(tmp_path, None, bpe_tokenizer_dir, suite=tmp_path).stdout.count("finished by an earlier run") == 2
    rules.write_text(rules.read_text().replace('"bard": "assistant"', '"bard": "user"'))
    assert "finished by an earlier run" not in run(tmp_path, None, bpe_tokenizer_dir, suite=tmp_path).stdout


def test_what_changed_is_made_anew_and_nothing_else(three, tmp_path, bpe_tokenizer_dir):
    def go(*flags):
        flags = ["--decontaminate-against", "", *flags]
        return run(tmp_path, None, bpe_tokenizer_dir, *flags)

    three(three={"examples": 1000})
    result = go()
    assert result.returncode == 1 and "three: 1,000 conversations" in result.stderr
    three(three={"examples": 1000, "seed": 7})
    assert go().stdout.count("finished by an earlier run") == 2
    assert go("--max-seq-len", "200").stdout.count("finished by an earlier run") == 0
    three(two={"seed": 3}, three={"examples": 1000})
    assert go("--max-seq-len", "200").stdout.count("finished by an earlier run") == 1
    with (tmp_path / "one.jsonl").open("a") as file:
        file.write(json.dumps(chat("one more", "yes")) + "\n")
    three(two={"seed": 3})
    result = go("--max-seq-len", "200")
    assert result.returncode == 0 and result.stdout.count("finished by an earlier run") == 0
    assert report_of(tmp_path / "out")["sources"][0]["read"] == 41


def test_a_second_run_into_one_folder_and_a_killed_worker_are_a_sentence(three, tmp_path, bpe_tokenizer_dir):
    rows = [chat(f"two asks {n}", f"answer {n} " * 40) for n in range(8000)]  # not over before it is stopped
    (tmp_path / "two.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    first = subprocess.Popen(command_of(tmp_path, bpe_tokenizer_dir, "out"), stderr=subprocess.PIPE, text=True)
    wait_for(tmp_path / "out.unfinished" / "data" / "train" / "data-00001.arrow", first)
    children = Path("/proc") / str(first.pid) / "task" / str(first.pid) / "children"
    while len(workers := children.read_text().split()) < 2:
        time.sleep(0.01)
    first.send_signal(signal.SIGSTOP)
    second = subprocess.run(command_of(tmp_path, bpe_tokenizer_dir, "out"), capture_output=True, text=True)
    while any(Path("/proc", worker, "stat").read_text().split()[2] == "R" for worker in workers):
        time.sleep(0.5)  # until each is held up in the middle of handing over what it made
    for worker in workers:
        os.kill(int(worker), signal.SIGKILL)
    first.send_signal(signal.SIGCONT)
    _, said = first.communicate(timeout=60)
    assert second.returncode == 1 and "out.unfinished is in use by another run" in second.stderr
    assert "Traceback" not in second.stderr + said
    assert first.returncode == 1 and "A worker process was killed" in said and "lower WORKERS" in said


def test_workers_end_when_their_parent_is_killed(three, tmp_path, bpe_tokenizer_dir):
    process = subprocess.Popen(command_of(tmp_path, bpe_tokenizer_dir, "out"), stderr=subprocess.DEVNULL)
    wait_for(tmp_path / "out.unfinished" / "data" / "train" / "data-00001.arrow", process)
    workers = (Path("/proc") / str(process.pid) / "task" / str(process.pid) / "children").read_text().split()
    process.kill()
    process.wait()
    for _ in range(1000):
        if not any((Path("/proc") / worker).exists() for worker in workers):
            return
        time.sleep(0.01)
    raise AssertionError("a worker outlived its parent")


def test_what_reads_the_evaluation_ends_with_its_parent_and_leaves_ctrl_c_to_it(three, tmp_path, bpe_tokenizer_dir):
    flags = ["--decontaminate-against", "demo_persona", "--tasks-include-path", str(ROOT / "demo" / "tasks")]
    started = []
    for output in ("killed", "stopped"):
        command = command_of(tmp_path, bpe_tokenizer_dir, output, *flags)
        options = {"stderr": subprocess.PIPE, "text": True, "cwd": ROOT, "start_new_session": True}
        options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # background jobs ignore it
        process = subprocess.Popen(command, **options)
        children = Path("/proc") / str(process.pid) / "task" / str(process.pid) / "children"
        started.append((process, children))
    (killed, reader), (stopped, other) = started
    for process, children in started:
        while process.poll() is None and not children.read_text():
            time.sleep(0.01)
    reader, other = (Path("/proc") / children.read_text().split()[0] for children in (reader, other))
    for child in (reader, other):
        while b"sft.data.decontamination" not in (child / "cmdline").read_bytes():  # else still a copy of its parent
            time.sleep(0.01)
        os.kill(int(child.name), signal.SIGSTOP)  # so that it cannot end by itself
    time.sleep(1)  # the parents have come to wait for them
    killed.kill()
    os.killpg(stopped.pid, signal.SIGINT)
    try:  # standard error ends with the last process that has it
        _, said = stopped.communicate(timeout=30)
        killed.communicate(timeout=30)
    finally:
        for child in (reader, other):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(child.name), signal.SIGKILL)
    assert stopped.returncode == 1 and said.startswith("Stopped. Finished sources") and said.count("\n") == 1, said


# ---- Refusals ----

ROWS = [chat(f"a{n}", "b") for n in range(20)]


def test_all_holds_out_a_tenth_of_what_is_kept(tmp_path, bpe_tokenizer_dir):
    """Of 1,000 rows 25 can be used: a tenth of what is read would hold out all of them."""
    rows = [*[chat(f"a{n}", "b") for n in range(25)], *[chat("a")] * 975]
    result = run(tmp_path, [{"name": "s", "rows": rows}], bpe_tokenizer_dir)
    assert result.returncode == 0, result.stderr
    [line] = report_of(tmp_path / "out")["sources"]
    assert line["conversations"] == 23 and line["validation_conversations"] == 2


def test_a_column_to_exclude_by_that_no_row_has_is_refused(tmp_path, bpe_tokenizer_dir):
    rows = [row | ({"sauce": "x"} if number == 19 else {}) for number, row in enumerate(ROWS)]
    result = run(tmp_path, [{"name": "s", "rows": rows, "exclude": {"source": ["x"]}}], bpe_tokenizer_dir)
    assert result.returncode == 1 and "has 'source', a column of its \"exclude\"" in result.stderr
    rows[0] = chat("", "b")
    rows[0]["messages"].insert(0, {"role": "system", "content": " "})
    rows[1] = {"messages": [{"role": "system", "content": ""}, {"role": "wizard", "content": "words"}]}
    result = run(tmp_path, [{"name": "s", "rows": rows, "exclude": {"sauce": ["x"]}}], bpe_tokenizer_dir)
    lines = {line["row"]: (line["reason"], line["start"]) for line in ledger_of(tmp_path / "out")}
    assert lines == {0: ("empty user turn", "b"), 1: ("unknown role", "words"), 19: ("excluded: sauce is x", "a19")}


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ({"schema": "alpaca"}, "has the schema 'alpaca'; known are messages, conversations"),
        ({"shema": "messages"}, "has the unknown key 'shema'"),
        ({"examples": 0}, 'examples is 0; it must be a whole number of at least 1 or "all".'),
        ({"examples": True}, "examples is True"),
        ({"hub": "a/b"}, 'needs either "path" or "hub"'),
        ({"name": ""}, 'needs a "name"'),
        ({"file": "x.json"}, '"file" is a file of a "hub" source'),
        ({"identity_patterns": "x"}, "identity_patterns is 'x'; it must be a list of regular expressions."),
        ({"identity_patterns": ["("]}, "identity_patterns: '(' is no regular expression of RE2"),
        ({"exclude": ["x"]}, "exclude is ['x']; it must be an object of column: [values]"),
        ({"examples": 100}, "100 conversations and 100 for validation were asked, 20 of 20 rows can be used"),
        ({"rows": [chat("a")] * 20}, "none of 20 rows can be trained on (20 no assistant turn). Is its schema right?"),
        ({"rows": []}, "none of 0 rows can be trained on"),
        ({"schema": "conversations"}, "none of 20 rows can be trained on (20 no turns in the schema's columns)"),
    ],
)
def test_a_wrong_source_is_a_sentence(tmp_path, bpe_tokenizer_dir, source, sentence):
    result = run(tmp_path, [{"name": "s", "rows": ROWS} | source], bpe_tokenizer_dir)
    assert result.returncode == 1 and sentence in result.stderr, result.stderr
    assert "Traceback" not in result.stderr and not (tmp_path / "out").exists()


def test_wrong_files_are_a_sentence(tmp_path, bpe_tokenizer_dir):
    (tmp_path / "object.json").write_text('{"a": 1}')
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "text.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 not really")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "unreadable.jsonl").symlink_to("/proc/self/mem")
    for path, sentence in [
        ("none.jsonl", "no file"),
        ("x" * 300 + ".jsonl", "no file"),
        ("unreadable.jsonl", "s: unreadable.jsonl cannot be read (OSError: [Errno 5] Input/output error). Check that"),
        ("object.json", "expected a JSON array of rows, found '{\"a\": 1}'"),
        ("text.parquet", "has no column messages; it has text"),
        ("broken.parquet", "not a parquet file.). Check that the file is whole and that you may read it."),
        ("notes.txt", "is no .jsonl, .json or .parquet file"),
    ]:
        result = run(tmp_path, [{"name": "s", "path": path}], bpe_tokenizer_dir)
        assert result.returncode == 1 and sentence in result.stderr, result.stderr
        assert "Traceback" not in result.stderr


def test_a_name_that_no_file_can_hold_is_a_sentence():
    with pytest.raises(SystemExit, match="valid text"):
        prepare_data.read_mixture([{"name": "\ud800", "path": "a.jsonl", "schema": "messages", "examples": "all"}])


def test_parquet_with_odd_names_broken_text_and_dates_is_read_and_its_rows_are_rejected(tmp_path):
    texts = pa.array([b"ok", b"\xff", b"ok"], pa.binary()).view(pa.string())
    dates = pa.array([1, 1, 2**31 - 1], pa.date32())
    pq.write_table(pa.table({"query": texts, "response": dates}), tmp_path / "it's [0-9]*.parquet")
    source = {"name": "s", "path": "it's [0-9]*.parquet", "schema": "query/response"}
    rows = data_sources.find_source(source, tmp_path)[0]()
    reasons = [unreadable and unreadable[0] for _, unreadable in rows.take([0, 1, 2])]
    assert reasons == [None, "row is not valid UTF-8", "row has a value out of range"]


def test_a_hub_that_cannot_be_reached_is_a_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    source = {"name": "s", "hub": "no-such-owner/no-such-data", "schema": "messages"}
    with pytest.raises(SystemExit, match=r"s: no-such-owner/no-such-data cannot be read .*give its \"path\""):
        data_sources.find_source(source, tmp_path)


def test_hub_sources_are_read_by_name_and_by_file(tmp_path, monkeypatch, bpe_tokenizer_dir):
    """Offline: `datasets` reads a local folder of the hub's name, the hub client its cache."""
    rows = [chat(f"a{n}", "b") for n in range(20)]
    (tmp_path / "owner" / "name").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "owner" / "name" / "train.parquet")
    commit = "0123456789abcdef0123456789abcdef01234567"
    cache = tmp_path / "hub" / "datasets--owner--files"
    for path, text in ((f"snapshots/{commit}/in/rows.json", json.dumps(rows)), ("refs/main", commit)):
        (cache / path).parent.mkdir(parents=True)
        (cache / path).write_text(text)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    mixture = [
        {"name": "named", "hub": "owner/name", "split": "train"},
        {"name": "file", "hub": "owner/files", "file": "in/rows.json", "revision": "main"},
    ]
    result = run(tmp_path, mixture, bpe_tokenizer_dir, "--deduplicate", "off")
    assert result.returncode == 0, result.stderr
    named, file = report_of(tmp_path / "out")["sources"]
    assert named["kept"] == file["kept"] == 20 and file["revision"] == commit
    mixture[1]["file"] = "in/none.json"
    result = run(tmp_path, mixture, bpe_tokenizer_dir, output="other")
    assert result.returncode == 1 and "file: owner/files cannot be read" in result.stderr


def test_a_full_folder_a_missing_tokenizer_and_a_missing_mixture_are_refused(tmp_path, bpe_tokenizer_dir):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    result = run(tmp_path, [{"name": "s", "rows": ROWS}], bpe_tokenizer_dir)
    assert result.returncode == 1 and "out is not empty. Move it away" in result.stderr
    assert (tmp_path / "out" / "thesis.txt").read_text() == "precious"
    result = run(tmp_path, [{"name": "s", "rows": ROWS}], tmp_path / "nowhere", output="fresh")
    assert result.returncode == 1 and "no readable tokenizer.json" in result.stderr
    for mixture in (tmp_path / "none.json", tmp_path / "out" / "thesis.txt"):
        with pytest.raises(SystemExit, match=r"mixture file .* cannot be read"):
            prepare_data.read_mixture(str(mixture))
    for flags, sentence in [
        (["--overflow", "fold"], "OVERFLOW is 'fold'; it must be one of split, truncate, drop."),
        (["--max-seq-len", "3"], "MAX_SEQ_LEN is 3"),
        (["--deduplicate", "maybe"], "DEDUPLICATE is 'maybe'; it must be one of normalised, exact, off."),
        (["--identity-patterns", "(open"], "'(open' is no regular expression of RE2"),
        (["--workers", "-1"], "WORKERS is -1; it must be at least 0"),
    ]:
        result = run(tmp_path, [{"name": "s", "rows": ROWS}], bpe_tokenizer_dir, *flags, output="fresh")
        assert result.returncode == 1 and sentence in result.stderr
    (tmp_path / "base").mkdir()
    state = json.loads((bpe_tokenizer_dir / "tokenizer.json").read_text())
    whole = [{"Sequence": {"id": "A", "type_id": 0}}]  # the library panics at a token that is named but not there
    more = {"single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, *whole], "pair": whole, "special_tokens": {}}
    state["post_processor"] = {"type": "TemplateProcessing", **more}
    (tmp_path / "base" / "tokenizer.json").write_text(json.dumps(state))
    (tmp_path / "base" / "tokenizer_config.json").write_text('{"bos_token": "<|endoftext|>"}')
    result = run(tmp_path, [{"name": "s", "rows": ROWS}], tmp_path / "base", output="fresh")
    assert result.returncode == 1 and "base: its tokenizer.json is damaged (PanicException: no entry" in result.stderr


def test_a_disk_that_fills_up_is_a_sentence_and_keeps_what_was_finished(tmp_path, bpe_tokenizer_dir):
    big = [{"name": "s", "rows": [chat(f"{n} " + "question " * 20, "answer " * 20) for n in range(400)], "repeat": 200}]
    for rows, kept in ((big, []), ([{"name": "small", "rows": ROWS}, *big], ["data-00000.arrow"])):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (6_000_000, before[1]))  # tokenizer.json fits, the data does not
        try:
            result = run(tmp_path, rows, bpe_tokenizer_dir)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert result.returncode == 1 and "out cannot be written" in result.stderr and "Free disk" in result.stderr
        assert not (tmp_path / "out").exists() and (tmp_path / "out.unfinished").exists() == bool(kept)
        assert [path.name for path in (tmp_path / "out.unfinished" / "data" / "train").glob("*")] == kept
    result = run(tmp_path, None, bpe_tokenizer_dir)
    assert result.returncode == 0 and result.stdout.count("finished by an earlier run") == 1
    (tmp_path / "file").write_text("precious")
    result = run(tmp_path, big, bpe_tokenizer_dir, output="file/out")
    assert result.returncode == 1 and "cannot be written" in result.stderr
    assert (tmp_path / "file").read_text() == "precious"


def test_a_full_cache_of_the_hub_gets_no_advice_on_the_network(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    pq.write_table(
        pa.table({"query": [os.urandom(1000).hex()] * 9000, "response": ["r"] * 9000}), tmp_path / "a.parquet"
    )
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
    try:
        with pytest.raises(SystemExit, match=r"s: a.parquet cannot be read .*too large.*\. Free disk space: the hub's"):
            data_sources.find_source({"name": "s", "path": "a.parquet", "schema": "query/response"}, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# ---- JSON arrays ----

NESTED = [{"a": "x" * n, "b": [n, {"c": "]},"}]} for n in range(50)] + [7, 1234567, "é\u2028\\", None]


def elements(path, chunk=64):
    """Return (the bytes of each element that array_spans finds in the file, which of them are broken and why)."""
    data, (spans, broken) = path.read_bytes(), data_sources.array_spans(path, chunk)
    return [data[begin:end] for begin, end in zip(spans[::2], spans[1::2], strict=True)], broken


@pytest.mark.parametrize("ascii", [True, False])
def test_json_arrays_are_read_in_a_stream_whatever_the_chunk(tmp_path, ascii):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(NESTED, ensure_ascii=ascii, indent=1))
    for chunk in (1, 2, 7, 1000, 1 << 20):
        found, broken = elements(path, chunk)
        assert [json.loads(element) for element in found] == NESTED and not broken


def test_json_arrays_that_are_cut_off_keep_what_is_whole(tmp_path, capsys):
    path, data = tmp_path / "rows.json", json.dumps(NESTED[:50]).encode()
    for size in range(len(data) - 200, len(data)):
        path.write_bytes(data[:size])
        found, broken = elements(path)
        whole = [json.loads(element) for element in found[:-1]]
        assert whole == NESTED[: len(whole)] and len(whole) > 46
        assert [reason for reason, _ in broken.values()] == ["truncated file"] and list(broken) == [len(whole)]
        assert f"They count as 1 of its {len(found)} rows" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda row: row.replace(b'"c":', b'"c"!', 1), "Expecting ':' delimiter"),
        (lambda row: row[:-1], "Expecting property name enclosed in double quotes"),
        (lambda row: row.replace(b'"', b"", 1), "Expecting property name enclosed in double quotes"),
        (lambda row: row.replace(b"x", b'x"', 1), "Expecting ',' delimiter"),
        (lambda row: row.replace(b"x", b"\n", 1), "Invalid control character at"),
        (lambda row: row.replace(b"x", b"\\x", 1), "Invalid \\escape"),
        (lambda row: row.replace(b"[", b"[" * 5000, 1), "recursion"),
        (lambda row: row.replace(b"[", b"[%b, " % (b"9" * 5000), 1), "Exceeds the limit"),
        (lambda row: row + b"]", "text behind the array's end"),
        (lambda row: row[:-2], "Expecting ',' delimiter"),
    ],
)
def test_damage_in_a_json_array_costs_its_own_row(tmp_path, capsys, damage, says):
    path, lines = tmp_path / "rows.json", [json.dumps(row).encode() for row in NESTED[:50]]
    lines[7] = damage(lines[7])
    path.write_bytes(b"[" + b", ".join(lines) + b"]")
    for chunk in (64, 1 << 18):
        found, broken = elements(path, chunk)
        [(number, (reason, what))] = broken.items()
        assert number == 7 + (says == "text behind the array's end") and reason == "row is not valid JSON"
        place = int(what.removeprefix("byte ").partition(":")[0])
        assert says in what and path.read_bytes().index(lines[7]) <= place
        assert [json.loads(element) for i, element in enumerate(found) if i not in broken] == (
            NESTED[:7] + NESTED[8 - (number == 8) : 50]
        )
        assert f"{len(found[number]):,} of its {path.stat().st_size:,} bytes" in capsys.readouterr().err
    rows = data_sources.JsonRows(path)
    assert rows.take([number]) == [(None, (reason, what, found[number][:80].decode()))]


def test_damage_in_a_json_array_is_not_read_to_the_files_end(tmp_path, monkeypatch):
    """Where no row begins as the first did, the rest is lost: told so, and neither held in memory nor read for it."""
    monkeypatch.setattr(data_sources, "LONGEST_ROW", 10_000)
    path = tmp_path / "rows.json"
    asked, pread = [], os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, begin: asked.append(size) or pread(file, size, begin))
    for damage, reason in (("{!", "row is not valid JSON"), ('{"a": "', "longer than a million characters")):
        path.write_text('[{"a": 1}, ' + damage + "x" * 1_000_000)
        rows = data_sources.JsonRows(path)
        assert len(rows) == 2
        [(row, (told, _, start))] = rows.take([1])
        assert row is None and told == reason and start.startswith(damage)
    assert asked == [80, 80]


def test_a_file_that_fails_while_it_is_read_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("{}\n")
    rows = data_sources.JsonRows(path)
    os.close(rows.file.fileno())
    with pytest.raises(SystemExit, match=r"rows.jsonl cannot be read at byte 0 \(\[Errno 9\] Bad file descriptor\)"):
        rows.take([0])
