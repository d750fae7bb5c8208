"""prepare_data.py: whole runs and their report, what each source gives, kills and restarts, refusals.

Run it alone: bash tests/run.sh tests/test_prepare_data.py
"""

import contextlib
import io
import json
import os
import re
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
from helpers import ROOT, chat, children, copy_lm_eval, full_disk, prepare_args, work_of
from transformers import AutoTokenizer

import prepare_data
from sft.data import decontamination, workers, writer

ROWS = [chat(f"a{n}", "b") for n in range(20)]

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
    command += ["--base-model", base, "--data-dir", tmp_path / output, "--max-seq-len", "256"]
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


def rejected_of(folder):
    return [json.loads(line) for line in (folder / "rejected.jsonl").read_text().splitlines()]


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


def test_every_row_is_accounted_for_and_the_report_adds_up(prepared):
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
    entries = rejected_of(folder / "out")
    for source in report["sources"]:
        assert source["read"] == source["kept"] + source["rejected"]
        assert source["kept"] == source["conversations"] + source["validation_conversations"]
        lines = [line for line in entries if line["source"] == source["name"]]
        assert source["rejected"] == sum(line["status"] == "rejected" for line in lines)
        assert source["sequences"] == sum(source["lengths"])
    row = next(line for line in entries if line["reason"] == "excluded: kind is bad")
    assert row["row"] == 20 and row["start"] == "20"
    row = next(line for line in entries if line["reason"] == "unknown role")
    assert row["row"] == 30 + list(ODD).index("unknown role") and row["start"] == "x"
    details = {line["reason"]: line["detail"] for line in entries if "detail" in line}
    assert details.pop("duplicate") in ("odd row 0", f"odd row {30 + list(ODD).index('duplicate')}")  # the first drawn
    assert details.pop("truncated file").startswith("byte ")
    assert details == {"another model's identity": "developed by OpenAI"}
    assert [source["damage"] is None for source in report["sources"]] == [True, False, True, True]
    assert (
        array["damage"].startswith("from row 20 on, ")
        and "bytes are not read (truncated file, byte " in array["damage"]
    )
    assert f"- array: the file is damaged: {array['damage']}" in stdout
    changed = {line["reason"]: line["start"] for line in entries if line["status"] == "changed"}
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
    for number in (1, 2, 8):
        flags = ["--validation-conversations", "4", "--workers", str(number)]
        result = run(folder, mixture, bpe_tokenizer_dir, *flags, output=f"by{number}")
        assert result.returncode == 0, result.stderr
        assert bytes_of(folder / f"by{number}") == bytes_of(folder / "out")
        assert report_of(folder / f"by{number}")["digest"] == report_of(folder / "out")["digest"]


def test_it_needs_no_torch(prepared, bpe_tokenizer_dir):
    """Torch would take 0.2 GiB and more than a second of every start."""
    folder, mixture, _ = prepared
    (folder / "array_only.json").write_text(json.dumps([mixture[1] | {"examples": "all"}]))
    flags = ["--mixture", folder / "array_only.json", "--base-model", bpe_tokenizer_dir]
    flags += ["--data-dir", folder / "light", "--decontaminate-against", ""]
    code = (
        "import sys, prepare_data; from sft import settings; prepare_data.main(settings.from_flags(vars(prepare_data)))"
    )
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


def test_show_prints_sequences_with_the_trained_text_in_green(prepared, bpe_tokenizer_dir):
    folder, _, _ = prepared
    shown = run(folder, None, bpe_tokenizer_dir, "--show", "1")
    assert shown.returncode == 0 and shown.stdout.count("----\033[0m\n") == 4
    assert "<|im_start|>assistant\n\033[32mr<|im_end|>\033[0m" in shown.stdout


def test_text_of_a_row_or_a_name_can_neither_steer_a_terminal_nor_forge_the_report_or_break_the_picture(
    tmp_path, small_tokenizer_dir
):
    name = r"spend $ and \US$ <img src=x> | 1"
    rows = [chat(f"{n}\x1b[2J", f"\x9b1m\n---- s, sequence 9 ----\u202e {n}") | {"kind": "a|b\x1b"} for n in range(20)]
    rows.append(chat("x", "y") | {"kind": "<b>\n| forged | 1 |"})
    mixture = [{"name": name, "rows": rows, "path": "x", "exclude": {"kind": ["<b>\n| forged | 1 |"]}}]
    mixture[0]["path"] = "s.jsonl"
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(row) + "\n" for row in mixture[0].pop("rows")))
    result = run(tmp_path, mixture, small_tokenizer_dir)
    assert result.returncode == 0, result.stderr
    text = (tmp_path / "out" / "report.md").read_text()
    row = next(line for line in text.splitlines() if "US" in line and line.startswith("|"))
    assert r"| spend $ and \\US$ &lt;img src=x> \| 1 | 21 |" in row
    assert "\n| forged" not in text and "<b>" not in text and "\x1b" not in text
    assert (tmp_path / "out" / "report.png").read_bytes()[:4] == b"\x89PNG"
    shown = run(tmp_path, None, small_tokenizer_dir, "--show", "1").stdout
    assert set(re.findall(r"\x1b\[?\d*.?", shown)) == {"\x1b[1m", "\x1b[0m", "\x1b[32m"}
    assert "\x9b" not in shown and "\u202e" not in shown and r"\x1b[2J" in shown


def test_plain_text_is_trained_whole_without_markers_and_counted_apart(tmp_path, spm_tokenizer_dir):
    """Of a tokenizer that adds a BOS: from rows, a Parquet column and paragraphs, next to conversations."""
    texts = [f"Text {n} is <|im_end|> plain. " * 30 for n in range(10)]
    pq.write_table(pa.table({"text": [f"Column {n} " * 3 for n in range(20)], "id": range(20)}), tmp_path / "c.parquet")
    (tmp_path / "p.txt").write_text("\n\n".join(f"Paragraph {n}\nhas two lines." for n in range(20)))
    mixture = [
        {"name": "chat", "rows": ROWS},
        {"name": "rows", "rows": [{"text": text} for text in [*texts, texts[3].upper(), ""]], "schema": "text"},
        {"name": "column", "path": "c.parquet", "schema": "text"},
        {"name": "paragraphs", "path": "p.txt", "schema": "text", "repeat": 2},
    ]
    result = run(tmp_path, mixture, spm_tokenizer_dir, "--max-seq-len", "64")
    assert result.returncode == 0, result.stderr
    report, data = report_of(tmp_path / "out"), datasets.load_from_disk(str(tmp_path / "out"))
    chat_line, rows, column, paragraphs = report["sources"]
    assert rows["reasons"] == {"duplicate": 1, "empty text": 1} and rows["control_text"] == 10
    assert rows["conversations"] == 9 and rows["sequences"] > 18  # longer than the window
    assert [line["sequences"] for line in (column, paragraphs)] == [18, 36]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "tokenizer")
    texts_of = {}
    for row in [*data["train"], *data["validation"]]:
        ids, mask = row["input_ids"], row["assistant_masks"]
        assert len(ids) <= 64 and ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
        if row["source"] != "chat":
            assert mask == [False] + [True] * (len(ids) - 1) and not {49_152, 49_153, 49_154, 49_155} & set(ids)
            texts_of.setdefault(row["source"], set()).add(tokenizer.decode(ids[1:]))
    assert "Paragraph 7\nhas two lines." in texts_of["paragraphs"] and len(texts_of["column"]) == 20
    plain = report["plain_text"]
    for name in ("read", "conversations", "sequences", "tokens", "trainable_tokens"):
        assert plain[name] == sum(line[name] for line in (rows, column, paragraphs)), name
        assert report["totals"][name] == plain[name] + chat_line[name], name
    assert plain["trainable_tokens"] == plain["tokens"] - plain["sequences"]
    assert f"| of these, plain text | 52 | 2 | 45 |  | {plain['sequences']} | {plain['tokens']:,} |" in result.stdout
    assert f"| of these, conversations | 20 | 0 | 18 |  | 18 | {chat_line['tokens']:,} |" in result.stdout
    shown = run(tmp_path, None, spm_tokenizer_dir, "--show", "1").stdout
    assert "\033[32mText " in shown


def test_a_turn_with_train_false_is_masked_and_the_report_counts_it(tmp_path, small_tokenizer_dir):
    rows = [chat(f"question {n}", "bad", "again", f"good {n}") for n in range(20)]
    for row in rows[:7]:
        row["messages"][1]["train"] = False
    rows[8]["messages"][1]["train"] = "false"
    result = run(tmp_path, [{"name": "s", "rows": rows}], small_tokenizer_dir)
    assert result.returncode == 0, result.stderr
    assert '- s: 7 kept, changed: assistant turn with "train": false masked' in result.stdout
    (line,) = rejected_of(tmp_path / "out")
    assert (line["row"], line["reason"]) == (8, '"train" is neither true nor false')
    tokenizer, data = (
        AutoTokenizer.from_pretrained(tmp_path / "out" / "tokenizer"),
        datasets.load_from_disk(str(tmp_path / "out")),
    )
    masked = 0
    for row in [*data["train"], *data["validation"]]:
        ids = [i for i, trained in zip(row["input_ids"], row["assistant_masks"], strict=True) if trained]
        assert "bad<|im_end|>" in tokenizer.decode(row["input_ids"])
        masked += "bad" not in tokenizer.decode(ids)
    assert masked == 7


# ---- What is rejected on purpose ----


def select(encoder, seen, index, rows, args, **fields):
    """Return the Selection of one source of a mixture after all of its rows."""
    work = work_of(encoder, rows, args, **fields)
    selection = prepare_data.Selection(work.source, index, len(rows), seen, args)
    for result in workers.prepare_rows(work, list(range(len(rows)))).results:
        selection.choose(result)
    return selection


def test_duplicates_are_found_across_sources_as_the_setting_says(small_encoder):
    rows = [chat(f"q{n}", f"Answer {n}") for n in range(30)]
    shouted = [chat(f"Q{n} ", f"answer  {n}") for n in range(10)]
    fullwidth = [chat("ｑ11", "Answer 11")]  # NFKC
    other = [chat(f"r{n}", "x") for n in range(30)]
    for how, expected in (("normalised", 21), ("exact", 10), ("off", 0)):
        args, seen = prepare_args(DEDUPLICATE=how), writer.SeenKeys(["first", "second"])
        assert not select(small_encoder[1], seen, 0, rows, args).reasons
        second = select(small_encoder[1], seen, 1, rows[20:] + shouted + fullwidth + other, args)
        assert second.reasons["duplicate"] == expected
        assert [seen.names[code >> 40] for code in seen.codes.values()].count("second") == (
            second.counts["kept"] if how != "off" else 0
        )


def test_a_duplicate_names_the_row_that_was_kept(small_encoder):
    args, seen = prepare_args(), writer.SeenKeys(["first", "second"])
    rows = [chat(f"q{n}", f"Answer {n}") for n in range(30)]
    select(small_encoder[1], seen, 0, rows, args)
    work = work_of(small_encoder[1], [*rows[20:], chat("Q3 ", "answer  3")], args)
    selection = prepare_data.Selection(work.source, 1, 11, seen, args)
    results = workers.prepare_rows(work, list(range(11))).results
    assert [selection.choose(result) for result in results] == [None] * 11
    expected = [f"first row {20 + n}" for n in range(10)] + ["first row 3"]
    assert [(result.reason, result.detail) for result in results] == [("duplicate", row) for row in expected]


def test_questions_of_the_evaluation_are_rejected_with_the_task_named(tmp_path, small_tokenizer_dir, monkeypatch):
    copy_lm_eval(tmp_path / "fewer_tasks", ())  # the demo's own are enough
    monkeypatch.syspath_prepend(tmp_path / "fewer_tasks")
    lines = (ROOT / "demo" / "tasks" / "general.jsonl").read_text(encoding="utf-8").splitlines()
    questions = [(item["question"], item["choices"][item["answer"]]) for item in map(json.loads, lines)]
    question, answer = max(questions, key=lambda pair: len(" ".join(pair).split()))
    assert len(f"{question} {answer}".split()) >= decontamination.NGRAM
    rows = [chat(f"clean {n}", "yes") for n in range(20)] + [chat(question.upper(), answer)]
    flags = [
        "--decontaminate-against",
        "demo_persona",
        "demo_general",
        "--tasks-include-path",
        str(ROOT / "demo" / "tasks"),
    ]
    result = run(tmp_path, [{"name": "s", "rows": rows}], small_tokenizer_dir, *flags)
    assert result.returncode == 0, result.stderr
    [line] = rejected_of(tmp_path / "out")
    assert line["row"] == 20 and line["reason"] == "contaminated: demo_general" and len(line["detail"].split()) == 13
    assert [task["task"] for task in report_of(tmp_path / "out")["evaluation"]] == ["demo_persona", "demo_general"]
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| task | questions | too short to compare | formulas left out | s |" in text
    too_short = report_of(tmp_path / "out")["evaluation"][1]["too_short"]
    assert f"| demo_general | 64 | {too_short} | 0 | 1 |" in text and "formulas: runs of 13 words" in text


# ---- Kills and restarts ----


@pytest.fixture
def three(tmp_path):
    """Three sources, of which the second has 3 tasks of a worker."""
    for name, number in (("one", 40), ("two", 1100), ("three", 40)):
        rows = [chat(f"{name} asks {n}", f"answer {n} " * 40) for n in range(number)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def mixture(**changes):
        sources = [{"name": n, "path": f"{n}.jsonl", "schema": "messages"} for n in ("one", "two", "three")]
        sources = [source | {"examples": "all"} | changes.get(source["name"], {}) for source in sources]
        (tmp_path / "mixture.json").write_text(json.dumps(sources))

    mixture()
    return mixture


def command_of(folder, base, output, *flags):
    command = [sys.executable, ROOT / "prepare_data.py", "--mixture", folder / "mixture.json", "--base-model", base]
    command += ["--data-dir", folder / output, "--max-seq-len", "256"]
    command += ["--decontaminate-against", "", "--workers", "2", *flags]
    return [str(part) for part in command]


def wait_for(path, process):
    for _ in range(3000):
        if path.exists() or process.poll() is not None:
            return
        time.sleep(0.01)


def wait_until_gone(pids):
    for _ in range(3000):
        if not any(Path(f"/proc/{pid}").exists() for pid in pids):
            return
        time.sleep(0.01)
    raise AssertionError(f"Processes {pids} are still there after 30 seconds.")


def test_killed_at_any_moment_it_ends_with_the_same_bytes_and_repeats_no_finished_source(
    three, tmp_path, small_tokenizer_dir
):
    whole = run(tmp_path, None, small_tokenizer_dir, output="whole")
    assert whole.returncode == 0, whole.stderr
    unfinished = tmp_path / "out.unfinished"
    markers = ("data/tokenizer/tokenizer.json", "progress/00000.json", "data/train/data-00001.arrow")
    for marker in (*markers, "progress/00002.json"):
        process = subprocess.Popen(command_of(tmp_path, small_tokenizer_dir, "out"), stderr=subprocess.DEVNULL)
        wait_for(unfinished / marker, process)
        workers_of_it = children(process.pid)
        process.kill()
        process.wait()
        wait_until_gone(workers_of_it)  # they hold the folder's lock until they notice
        assert not (tmp_path / "out").exists() or marker == "progress/00002.json"
    done = [path.name for path in sorted((unfinished / "progress").glob("*.json"))]
    if unfinished.exists():  # else the last kill came too late
        again = run(tmp_path, None, small_tokenizer_dir)
        assert again.returncode == 0, again.stderr
        assert again.stdout.count("finished by an earlier run") == len(done) >= 2
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")
    assert report_of(tmp_path / "out")["digest"] == report_of(tmp_path / "whole")["digest"]


def test_a_kill_after_the_last_rename_leaves_a_clean_folder(tmp_path, small_tokenizer_dir, monkeypatch):
    def killed(*_, **__):
        raise KeyboardInterrupt

    for output in ("whole", "cut"):
        assert run(tmp_path, [{"name": "s", "rows": ROWS}], small_tokenizer_dir, output=output).returncode in (0, 1)
        monkeypatch.setattr("shutil.rmtree", killed)
    assert (tmp_path / "cut.unfinished").exists() and bytes_of(tmp_path / "cut") == bytes_of(tmp_path / "whole")
    monkeypatch.undo()
    (tmp_path / "cut").rename(tmp_path / "moved")
    assert run(tmp_path, None, small_tokenizer_dir, output="cut").returncode == 0
    assert bytes_of(tmp_path / "cut") == bytes_of(tmp_path / "whole") and not (tmp_path / "cut.unfinished").exists()


def test_a_mixture_that_shrank_leaves_nothing_of_its_old_sources(three, tmp_path, small_tokenizer_dir):
    three(three={"examples": 1000})
    assert run(tmp_path, None, small_tokenizer_dir).returncode == 1
    (tmp_path / "mixture.json").write_text(json.dumps(json.loads((tmp_path / "mixture.json").read_text())[:1]))
    result = run(tmp_path, None, small_tokenizer_dir)
    assert result.returncode == 0 and result.stdout.count("finished by an earlier run") == 1
    files = [path.name for split in ("train", "validation") for path in sorted((tmp_path / "out" / split).iterdir())]
    assert files == ["data-00000.arrow", "dataset_info.json", "state.json"] * 2


def test_an_edited_setting_in_the_file_repeats_nothing_and_an_edited_rule_everything(
    three, tmp_path, small_tokenizer_dir
):
    shutil.copytree(ROOT / "sft", tmp_path / "sft")
    shutil.copy(ROOT / "prepare_data.py", tmp_path)
    script, rules = tmp_path / "prepare_data.py", tmp_path / "sft" / "data" / "conversations.py"
    three(three={"examples": 1000})
    assert run(tmp_path, None, small_tokenizer_dir, suite=tmp_path).returncode == 1
    script.write_text(script.read_text().replace("\nWORKERS = 0", "\nWORKERS = 1").replace("10_000", "20_000"))
    assert run(tmp_path, None, small_tokenizer_dir, suite=tmp_path).stdout.count("finished by an earlier run") == 2
    original = rules.read_text()
    for edited in (original.replace('"bard": "assistant"', '"bard": "user"'), "# a rule above any title\n" + original):
        rules.write_text(edited)
        assert "finished by an earlier run" not in run(tmp_path, None, small_tokenizer_dir, suite=tmp_path).stdout


def test_what_changed_is_repeated_and_nothing_else(three, tmp_path, small_tokenizer_dir):
    def go(*flags):
        flags = ["--decontaminate-against", "", *flags]
        return run(tmp_path, None, small_tokenizer_dir, *flags)

    three(three={"examples": 1000})
    result = go()
    assert result.returncode == 1 and re.search(r"three: 1,\d00 conversations are needed", result.stderr)
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


def test_a_second_run_into_one_folder_and_a_killed_worker_are_a_sentence(three, tmp_path, small_tokenizer_dir):
    rows = [chat(f"two asks {n}", f"answer {n} " * 40) for n in range(8000)]  # not over before it is stopped
    (tmp_path / "two.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    first = subprocess.Popen(command_of(tmp_path, small_tokenizer_dir, "out"), stderr=subprocess.PIPE, text=True)
    wait_for(tmp_path / "out.unfinished" / "data" / "train" / "data-00001.arrow", first)
    children = Path("/proc") / str(first.pid) / "task" / str(first.pid) / "children"
    while len(crew := children.read_text().split()) < 2:
        time.sleep(0.01)
    first.send_signal(signal.SIGSTOP)
    second = subprocess.run(command_of(tmp_path, small_tokenizer_dir, "out"), capture_output=True, text=True)
    while any(Path("/proc", worker, "stat").read_text().split()[2] == "R" for worker in crew):
        time.sleep(0.5)  # until each waits in the middle of an answer
    for worker in crew:
        os.kill(int(worker), signal.SIGKILL)
    first.send_signal(signal.SIGCONT)
    _, said = first.communicate(timeout=60)
    assert second.returncode == 1 and "out.unfinished is in use by another run" in second.stderr
    assert "Traceback" not in second.stderr + said
    assert first.returncode == 1 and "A worker was killed" in said and "Lower WORKERS" in said


def test_workers_end_when_their_parent_is_killed(three, tmp_path, small_tokenizer_dir):
    process = subprocess.Popen(command_of(tmp_path, small_tokenizer_dir, "out"), stderr=subprocess.DEVNULL)
    wait_for(tmp_path / "out.unfinished" / "data" / "train" / "data-00001.arrow", process)
    crew = (Path("/proc") / str(process.pid) / "task" / str(process.pid) / "children").read_text().split()
    process.kill()
    process.wait()
    for _ in range(1000):
        if not any((Path("/proc") / worker).exists() for worker in crew):
            return
        time.sleep(0.01)
    raise AssertionError("a worker outlived its parent")


def test_what_reads_the_evaluation_ends_with_its_parent_and_leaves_ctrl_c_to_it(three, tmp_path, small_tokenizer_dir):
    flags = ["--decontaminate-against", "demo_persona", "--tasks-include-path", str(ROOT / "demo" / "tasks")]
    started = []
    for output in ("killed", "stopped"):
        command = command_of(tmp_path, small_tokenizer_dir, output, *flags)
        options = {"stderr": subprocess.PIPE, "text": True, "cwd": ROOT, "start_new_session": True}
        options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # background jobs ignore it
        process = subprocess.Popen(command, **options)
        children = Path("/proc") / str(process.pid) / "task" / str(process.pid) / "children"
        started.append((process, children))
    (killed, reader), (stopped, other) = started
    for process, children in started:
        while process.poll() is None and len(children.read_text().split()) < 2:  # the first is Python's own helper
            time.sleep(0.01)
    reader, other = (Path("/proc") / children.read_text().split()[1] for children in (reader, other))
    for child in (reader, other):
        while "/lxml/" not in (child / "maps").read_text():  # lm_eval loads it, the function's first work
            time.sleep(0.01)
        os.kill(int(child.name), signal.SIGSTOP)  # so that it cannot end by itself
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


def prepared_source(folder, encoder, rows, args=None, **fields):
    """Prepare one source alone, with one worker; return its line of the report."""
    paths = writer.source_files(folder, 0)
    for path in paths.values():
        path.parent.mkdir(parents=True, exist_ok=True)
    work = work_of(encoder, rows, args, **fields)
    return prepare_data.prepare_source(work, 0, paths, writer.SeenKeys(["s"]), 1)


def test_all_holds_out_a_tenth_of_what_is_kept(tmp_path, small_encoder):
    """Of 1,000 rows 25 can be used: a tenth of what is read would hold out all of them."""
    rows = [*[chat(f"a{n}", "b") for n in range(25)], *[chat("a")] * 975]
    line = prepared_source(tmp_path, small_encoder[1], rows)
    assert line["conversations"] == 23 and line["validation_conversations"] == 2


@pytest.mark.parametrize(
    ("limit", "examples", "expected"),
    [
        (0, 60, (60, 100)),
        (20, 60, (20, 2)),  # conversations, validation: a tenth of the limit
        (20, "all", (20, 2)),
        (15, "all", (15, 1)),
        (5, "all", (5, 1)),
        (1, "all", (1, 1)),
        (1, 60, (1, 1)),
        (1000, 60, (60, 100)),  # the limit is no target
        (1000, "all", (180, 20)),
    ],
)
def test_a_limit_takes_the_first_of_the_draw_and_scales_the_validation(
    tmp_path, small_encoder, limit, examples, expected
):
    rows = [chat(f"a{n}", "b") for n in range(200)]
    line = prepared_source(tmp_path, small_encoder[1], rows, prepare_args(LIMIT=limit), examples=examples)
    assert (line["conversations"], line["validation_conversations"]) == expected


def test_the_report_says_that_a_limited_run_is_not_the_mixture(tmp_path, small_tokenizer_dir):
    rows = [chat(f"a{n}", "b") for n in range(100)]
    for limit in (10, 0):
        output = f"limit{limit}"
        result = run(tmp_path, [{"name": "s", "rows": rows}], small_tokenizer_dir, "--limit", limit, output=output)
        report = report_of(tmp_path / output)
        assert result.returncode == 0 and report["limit"] == report["settings"]["LIMIT"] == limit
        text = (tmp_path / output / "report.md").read_text()
        warned = [words.count("**LIMIT = 10: a quick look, not the whole mixture.") for words in (text, result.stdout)]
        assert warned == [1, 1] if limit else warned == [0, 0]
        assert report["totals"]["conversations"] == (limit or 90)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            {"examples": 100},
            "200 conversations are needed, 100 of them to validate. Of 20 rows, 20 are usable",
        ),
        (
            {"rows": [chat("a")] * 20},
            "none of 20 rows can be trained on (20 no assistant turn). Correct its schema, or",
        ),
        ({"rows": []}, "none of 0 rows can be trained on"),
        (
            {"schema": "conversations", "examples": 5},
            "none of 20 rows can be trained on (20 no turns in the schema's columns). Correct its schema, or",
        ),
        ({"schema": "conversations"}, "none of 20 rows can be trained on (20 no turns in the schema's columns)"),
    ],
)
def test_a_source_with_too_few_usable_rows_is_a_sentence(tmp_path, small_encoder, fields, sentence):
    fields = {"rows": ROWS} | fields
    with pytest.raises(SystemExit) as error:
        prepared_source(tmp_path, small_encoder[1], fields.pop("rows"), **fields)
    assert str(error.value).startswith("s: ") and sentence in str(error.value)


def test_a_refusal_is_one_sentence_and_leaves_nothing(tmp_path, small_tokenizer_dir):
    """Of a real process; in-process tests above show the other sentences."""
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    source = {"name": "s", "path": "s.jsonl", "schema": "messages", "examples": 100}
    (tmp_path / "mixture.json").write_text(json.dumps([source]))
    result = subprocess.run(command_of(tmp_path, small_tokenizer_dir, "out"), capture_output=True, text=True)
    assert result.returncode == 1 and "100 of them to validate" in result.stderr, result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.unfinished").exists()


def test_rejected_rows_begin_with_their_first_words(small_encoder):
    rows = [row | ({"sauce": "x"} if number == 19 else {}) for number, row in enumerate(ROWS)]
    rows[0] = chat("", "b")
    rows[0]["messages"].insert(0, {"role": "system", "content": " "})
    rows[1] = {"messages": [{"role": "system", "content": ""}, {"role": "wizard", "content": "words"}]}
    batch = workers.prepare_rows(work_of(small_encoder[1], rows, exclude={"sauce": ["x"]}), list(range(20)))
    entries = [entry for result in batch.results for entry in prepare_data.rejected_entries("s", result)]
    lines = {line["row"]: (line["reason"], line["start"]) for line in entries}
    assert lines == {0: ("empty user turn", "b"), 1: ("unknown role", "words"), 19: ("excluded: sauce is x", "a19")}
    assert {line["status"] for line in entries} == {"rejected"} and {line["source"] for line in entries} == {"s"}


def test_a_full_folder_and_a_wrong_setting_are_refused(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    (tmp_path / "mixture.json").write_text(
        json.dumps([{"name": "s", "path": "s.jsonl", "schema": "messages", "examples": 1}])
    )
    args = {"MIXTURE": str(tmp_path / "mixture.json"), "DATA_DIR": str(tmp_path / "out")}
    with pytest.raises(SystemExit, match=r"out is not empty\. Move it away"):
        prepare_data.main(prepare_args(**args))
    assert (tmp_path / "out" / "thesis.txt").read_text() == "precious"
    for change, sentence in [
        ({"OVERFLOW": "fold"}, "OVERFLOW is 'fold'; it must be one of split, truncate, drop."),
        ({"MAX_SEQ_LEN": 3}, "MAX_SEQ_LEN is 3"),
        ({"DEDUPLICATE": "maybe"}, "DEDUPLICATE is 'maybe'; it must be one of normalised, exact, off."),
        ({"IDENTITY_PATTERNS": ("(open",)}, "IDENTITY_PATTERNS: '(open' isn't a valid RE2 expression"),
        ({"WORKERS": -1}, "WORKERS is -1; it must be at least 0"),
        ({"LIMIT": -1}, "LIMIT is -1; it must be at least 0"),
    ]:
        with pytest.raises(SystemExit) as error:
            prepare_data.main(prepare_args(**args | {"DATA_DIR": str(tmp_path / "fresh")} | change))
        assert sentence in str(error.value)


def test_a_folder_that_no_finished_data_could_get_is_refused_before_the_work_and_a_link_is_followed(
    tmp_path, small_tokenizer_dir
):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    mixture = [{"name": "s", "rows": ROWS}]
    result = run(tmp_path, mixture, small_tokenizer_dir, output="link")
    assert result.returncode == 0 and (tmp_path / "disk" / "report.json").exists(), result.stderr
    assert (tmp_path / "link").is_symlink() and not list(tmp_path.glob("*.unfinished"))
    result = run(tmp_path, mixture, small_tokenizer_dir, output="a::b/out")
    assert result.returncode == 1 and 'cannot read a folder with "::" in its path. Name another' in result.stderr
    assert result.stdout == "" and not (tmp_path / "a::b").exists()
    (tmp_path / "out.unfinished").mkdir()
    (tmp_path / "out.unfinished" / "thesis.txt").write_text("precious")
    result = run(tmp_path, mixture, small_tokenizer_dir)
    assert result.returncode == 1 and "no script of this suite made it" in result.stderr and result.stdout == ""
    assert (tmp_path / "out.unfinished" / "thesis.txt").exists()


def test_a_missing_and_a_damaged_tokenizer_are_refused(tmp_path, small_tokenizer_dir):
    with pytest.raises(SystemExit, match=r"no readable tokenizer.json .* --base-model"):
        prepare_data.build_encoder(prepare_args(BASE_MODEL=str(tmp_path / "nowhere")), tmp_path / "out")
    (tmp_path / "base").mkdir()
    state = json.loads((small_tokenizer_dir / "tokenizer.json").read_text())
    whole = [{"Sequence": {"id": "A", "type_id": 0}}]  # the library panics at a token that is named but not there
    more = {"single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, *whole], "pair": whole, "special_tokens": {}}
    state["post_processor"] = {"type": "TemplateProcessing", **more}
    (tmp_path / "base" / "tokenizer.json").write_text(json.dumps(state))
    (tmp_path / "base" / "tokenizer_config.json").write_text('{"bos_token": "<|endoftext|>"}')
    with pytest.raises(SystemExit, match=r"base: its tokenizer.json is damaged \(PanicException: no entry"):
        prepare_data.build_encoder(prepare_args(BASE_MODEL=str(tmp_path / "base")), tmp_path / "out")


def test_a_disk_that_fills_up_is_a_sentence_and_keeps_what_was_finished(tmp_path, small_tokenizer_dir):
    big = [{"name": "s", "rows": [chat(f"{n} " + "question " * 20, "answer " * 20) for n in range(400)], "repeat": 200}]
    for rows, kept in ((big, []), ([{"name": "small", "rows": ROWS}, *big], ["data-00000.arrow"])):
        with full_disk(6_000_000):  # tokenizer.json fits, the data does not
            result = run(tmp_path, rows, small_tokenizer_dir)
        assert result.returncode == 1 and "out cannot be written" in result.stderr and "Free disk" in result.stderr
        assert not (tmp_path / "out").exists() and (tmp_path / "out.unfinished").exists() == bool(kept)
        assert [path.name for path in (tmp_path / "out.unfinished" / "data" / "train").glob("*")] == kept
    result = run(tmp_path, None, small_tokenizer_dir)
    assert result.returncode == 0 and result.stdout.count("finished by an earlier run") == 1
    (tmp_path / "file").write_text("precious")
    result = run(tmp_path, big, small_tokenizer_dir, output="file/out")
    assert result.returncode == 1 and "cannot be written" in result.stderr
    assert (tmp_path / "file").read_text() == "precious"
