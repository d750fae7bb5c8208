"""generate_constitutional.py: the constitution, the stages' files, the plan, the providers, the checks, whole runs.

Run it alone: bash tests/run.sh tests/test_generate_constitutional.py
With more kills: KILLS=50 bash tests/run.sh tests/test_generate_constitutional.py -k kill
"""

import json
import multiprocessing
import os
import re
import subprocess
import sys
import time
from collections import Counter
from multiprocessing import forkserver
from random import Random

import pytest
import tiny_teacher
import warm_teacher
from helpers import ROOT, args_of, full_disk, run_python, write_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from teacher_stub import Stub, prose

import generate_constitutional
from sft.generation import batches, checks, constitution, constraints, conversations, providers, records
from sft.generation import teacher as teachers

TEXT = (ROOT / "constitution.md").read_text()
KILLS = int(os.environ.get("KILLS", "12"))  # of a live run; a third as many of a run in batches

# ---- The constitution ----


def test_the_shipped_constitution_is_complete():
    rules = constitution.parse(TEXT)
    assert rules.name == "Genesis" and rules.language == "en" and len(rules.askers) >= 20
    assert {"truth", "private", "harm", "lively"} <= {principle.id for principle in rules.principles}
    assert [category.id for category in rules.categories] == list(constitution.CATEGORIES)
    for category in rules.categories:
        assert len(category.topics) >= 15 and {form.turns for form in category.formats} >= {1, 2}
        assert any(form.think for form in category.formats)


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("## Askers", "## Asker", "line LINE: the section 'Asker' is unknown"),
        ("## Askers", "## Who", "line LINE: the section 'Who' stands there twice"),
        ("- language: en", "- language: English", "it must be a code of two letters"),
        ("- maker: one", "- builder: one", "line LINE: 'builder' is unknown"),
        ("### truth: Say", "### Say", "line LINE: .* is no heading of a principle"),
        ("### truth: Say", "### help: Say", "line LINE: a second principle has the id 'help'"),
        ("### reasoning: 30%", "### reasoning: 31%", "add up to 101%"),
        ("### reasoning: 30%", "### reason: 30%", "line LINE: .* must be one of reasoning"),
        ("- 1 turn, 15 to 60 words", "- 4 turns, 15 to 60 words", "line LINE: .* is no format"),
        ("- 1 turn, 15 to 60 words", "- 1 turn, 60 to 15 words", "line LINE: 60 to 15 words"),
        ("- riddles with a trap in the wording", "-", "line LINE: .* is no entry of a list"),
    ],
)
def test_a_bad_constitution_gets_a_sentence_with_its_line(old, new, complaint):
    line = TEXT[: TEXT.index(old)].count("\n") + 1
    with pytest.raises(ValueError, match=complaint.replace("LINE", str(line))):
        constitution.parse(TEXT.replace(old, new, 1))


@pytest.mark.parametrize("section", constitution.SECTIONS)
def test_a_missing_section_is_named(section):
    text = re.sub(rf"## {section}\n.*?(?=\n## |\Z)", "", TEXT, count=1, flags=re.DOTALL)
    with pytest.raises(ValueError, match=f'without a section "## {section}"'):
        constitution.parse(text)


words = st.text("abcdefgh ", min_size=1, max_size=30).map(str.strip).filter(bool)
entries = st.lists(words, min_size=1, max_size=4, unique=True)


@settings(max_examples=40, deadline=None)
@given(askers=entries, topics=entries, manner=words, ids=st.sets(st.from_regex(r"[a-z][a-z0-9_]{0,6}", fullmatch=True)))
def test_what_is_written_is_read(askers, topics, manner, ids):
    lines = ["# T", "## Who", "- name: N", "- maker: M", "- language: en", "", manner, "## Principles"]
    for name in sorted(ids) or ["p"]:
        lines += [f"### {name}: Title", "Text."]
    lines += ["## Askers", *(f"- {entry}" for entry in askers), "## Categories"]
    for category in constitution.CATEGORIES:
        lines += [f"### {category}: 25%", "About.", "Topics:", *(f"- {entry}" for entry in topics)]
        lines += ["Formats:", "- 2 turns, 5 to 9 words, think"]
    rules = constitution.parse("\n".join(lines))
    assert rules.askers == askers and rules.manner == " ".join(manner.split())
    assert [principle.id for principle in rules.principles] == (sorted(ids) or ["p"])
    for category in rules.categories:
        assert category.topics == topics and category.formats == [constitution.Format(2, 5, 9, True)]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_damaged_constitution_is_read_or_gets_a_sentence(data):
    lines = TEXT.split("\n")
    for _ in range(data.draw(st.integers(1, 4))):
        index = data.draw(st.integers(0, len(lines) - 1))
        lines[index] = data.draw(
            st.sampled_from(["", "## X", "### y", "- z", "Topics:", "- 1 turn", "\x00", "### a: b"])
        )
    try:
        constitution.parse("\n".join(lines))
    except ValueError as error:
        assert re.match(r"line \d+: ", str(error))


# ---- The stages' files ----

texts = st.text(max_size=20)
answers = st.fixed_dictionaries(
    {"key": st.sampled_from("abcdef"), "text": texts, "stop_reason": texts, "model": texts, "date": texts}
    | {"input_tokens": st.integers(0, 999), "output_tokens": st.integers(0, 999), "cost": st.none() | st.just(0.5)}
)
sent = st.fixed_dictionaries(
    {"key": st.sampled_from("abcdef"), "sent": st.lists(st.integers(0, 9), min_size=2, max_size=2)}
)
errors = st.fixed_dictionaries({"key": st.sampled_from("abcdef"), "error": texts})
unanswered = st.fixed_dictionaries({"key": st.sampled_from("abcdef"), "unanswered": texts})


@given(lines=st.lists(answers | sent | errors | unanswered, max_size=12), data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_stage_file_that_was_cut_at_any_byte_keeps_every_whole_line_and_takes_the_next(tmp_path, lines, data):
    path = tmp_path / "stage.jsonl"
    written = "".join(json.dumps(line) + "\n" for line in lines).encode()
    cut = data.draw(st.integers(0, len(written)))
    path.write_bytes(written[:cut])
    ends = [len("".join(json.dumps(line) + "\n" for line in lines[: n + 1])) for n in range(len(lines))]
    whole = [line for line, end in zip(lines, ends, strict=True) if end - 1 <= cut]  # the newline alone may be missing
    file = records.StageFile(path)
    paid = [line for line in whole if "text" in line]
    assert file.answers.keys() == {line["key"] for line in paid}
    for key, answer in file.answers.items():
        assert answer == next(line for line in paid if line["key"] == key)
    for name, column in (("calls", None), ("input_tokens", "input_tokens"), ("output_tokens", "output_tokens")):
        assert file.ledger[name] == sum(line[column] if column else 1 for line in paid)
    new = {"key": "z", "text": "t", "stop_reason": "end", "model": "m", "date": "d", "input_tokens": 1}
    file.append(new | {"output_tokens": 2, "cost": None})
    file.close()
    again = records.StageFile(path, writes=False)
    assert (
        again.answers == file.answers and again.ledger == file.ledger and again.damaged == 0 and again.lost == file.lost
    )


@given(st.lists(st.binary(max_size=30)))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damage_in_a_stage_file_is_counted_and_ends_nothing(tmp_path, lines):
    path = tmp_path / "stage.jsonl"
    path.write_bytes(b"\n".join(lines))
    file = records.StageFile(path)
    assert not file.answers and file.damaged + (file.torn > 0) <= path.read_bytes().count(b"\n") + 1
    file.close()


def test_a_request_without_an_answer_is_counted_as_lost_with_what_it_costs_at_most(tmp_path):
    path = tmp_path / "stage.jsonl"
    lines = [{"key": "a", "sent": [10, 20]}, {"key": "a", "sent": [10, 20]}, {"key": "b", "sent": [1, 2]}]
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"key": "b", "unanswered": "429"}]))
    file = records.StageFile(path)
    assert (file.lost, file.lost_tokens) == (2, [20, 40])


# ---- Runs against the stub ----

SHARES = {"reasoning": 55, "safety": 20, "personality": 25, "instruction_following": 0}
PRICES = {"PRICE_INPUT": 1.0, "PRICE_OUTPUT": 5.0, "PRICES_LOOKED_UP": "2026-11-24"}


def write_constitution(folder, shares=SHARES):
    """Write ours with other shares: checking constraints imports lm_eval, which takes 10 seconds. Returns: the path."""
    text = TEXT
    for category, share in shares.items():
        text = re.sub(rf"### {category}: \d+%", f"### {category}: {share}%", text)
    (folder / "constitution.md").write_text(text)
    return str(folder / "constitution.md")


def settings_for(folder, stub, **changes):
    """Return the settings of a small run against the stub."""
    folder.mkdir(exist_ok=True)
    provider = changes.get("PROVIDER", "anthropic")
    values = {
        "CONSTITUTION": write_constitution(folder),
        "OUTPUT": str(folder / "rows.jsonl"),
        "EXAMPLES": 16,
        "HELD_OUT": 4,
        "QUESTIONS_PER_CALL": 2,
        "BASE_URL": stub.url + ("/v1" if provider == "openai" else ""),
        "POLL_SECONDS": 0.01,
        "TIMEOUT_SECONDS": 20.0,
    }
    return args_of(generate_constitutional, **values | PRICES | changes)


@pytest.fixture(autouse=True)
def keys(monkeypatch):
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-ant-secret")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-openai-secret")


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    """Leave out report.png, half of the time of a small run; the run of the fixture `whole` draws it."""
    monkeypatch.setattr("sft.generation.report.draw", lambda *_: None)


def rows_of(folder):
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def result_of(folder):
    """Return the bytes of what a run wrote, but for the ledger and the picture."""
    names = ("rows.jsonl", "rows-held-out.jsonl", "rows.work/pairs.jsonl", "rows.work/rejected.jsonl")
    return {name: (folder / name).read_bytes() for name in names}


def ledger_of(folder, args):
    files = teachers.Files(folder / "rows.work", args, writes=False)
    return sum(files.ledger().values(), Counter()), files


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(folder of an uninterrupted run with the provider "anthropic", its Stub's paid, its requests)."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch, Stub() as stub:
        patch.setenv("ANTHROPIC_API_KEY", "sk-ant-secret")
        generate_constitutional.main(settings_for(folder, stub))
    return folder, stub


def test_a_run_writes_what_prepare_data_reads(whole):
    folder, stub = whole
    rows = rows_of(folder)
    held_out = [json.loads(line) for line in (folder / "rows-held-out.jsonl").read_text().splitlines()]
    assert len(rows) + len(held_out) == 20 and 0 < len(held_out) <= 4
    assert not {row["family"] for row in rows} & {row["family"] for row in held_out}
    for row in rows + held_out:
        roles = [message["role"] for message in row["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert row["model"] == "claude-haiku-4-5-2026" and row["seed"] == 42 and row["date"]
        assert len(row["principle"].split(",")) == len(roles) // 2
    kinds = Counter(row["kind"] for row in rows + held_out if row["category"] == "safety")
    assert kinds["risky"] == kinds["benign"] > 0
    assert any("<think>\n" in row["messages"][1]["content"] for row in rows)
    pairs = [json.loads(line) for line in (folder / "rows.work/pairs.jsonl").read_text().splitlines()]
    assert pairs and all(pair["chosen"] != pair["rejected"] and pair["critique"] for pair in pairs)
    assert (folder / "rows.work/report.png").stat().st_size > 1000
    assert max(stub.paid.values()) == 1


def test_no_row_holds_the_constitution_and_no_file_the_key(whole):
    folder, stub = whole
    text = (folder / "rows.jsonl").read_text()
    assert not checks.word_runs(text, 12) & checks.word_runs(TEXT, 12)
    assert all(b"sk-ant-secret" not in path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert all("sk-ant-secret" in str(headers) for _, headers, _ in stub.requests)


def test_a_finished_run_asks_nothing_again_and_the_plan_agrees(whole, tmp_path, capsys):
    folder, _ = whole
    before = result_of(folder)
    with Stub() as stub:
        args = settings_for(folder, stub)
        generate_constitutional.main(args | {"PLAN_ONLY": True})
        plan = capsys.readouterr().out
        generate_constitutional.main(args)
    assert not stub.requests and result_of(folder) == before
    assert re.search(r"^all +\d+ +0 +0 +0 +0\.00$", plan, re.MULTILINE)


def test_a_larger_run_begins_with_the_answers_of_a_smaller_one(tmp_path):
    with Stub() as stub:
        generate_constitutional.main(settings_for(tmp_path, stub, EXAMPLES=8, HELD_OUT=0))
        first = stub.paid.copy()
        generate_constitutional.main(settings_for(tmp_path, stub, EXAMPLES=20, HELD_OUT=0))
    assert max(stub.paid.values()) == 1 and len(stub.paid) > len(first) and len(rows_of(tmp_path)) == 20


def test_the_openai_client_gives_rows_too(tmp_path):
    with Stub() as stub:
        args = settings_for(tmp_path, stub, PROVIDER="openai", JUDGE_THRESHOLD=5, CONCURRENCY=3)
        generate_constitutional.main(args)
    rows = rows_of(tmp_path)
    assert min(row["score"] for row in rows) >= 5 and all(row["score_reason"] for row in rows)
    assert {path for path, _, _ in stub.requests} == {"/v1/chat/completions"}
    assert "judged too low" in (tmp_path / "rows.work/rejected.jsonl").read_text()


# ---- Faults ----

FAULTS = (429, 529, 500, 503, "malformed", "no fields", "torn")


@pytest.mark.parametrize("provider", ["anthropic", "openai"])
def test_faults_that_pass_change_nothing(tmp_path, provider, monkeypatch):
    monkeypatch.setattr("random.random", lambda: 1.0)  # the clients' jitter: the shortest backoff

    def fault(key, n):
        return FAULTS[int(key, 16) % len(FAULTS)] if n == 0 and int(key, 16) % 5 == 0 else None

    with Stub(fault) as stub, Stub() as calm:
        args = settings_for(tmp_path / "stormy", stub, PROVIDER=provider, HELD_OUT=0, EXAMPLES=10)
        generate_constitutional.main(args)
        generate_constitutional.main(settings_for(tmp_path / "calm", calm, PROVIDER=provider, HELD_OUT=0, EXAMPLES=10))
    assert sum(stub.asked.values()) > len(stub.asked) and stub.paid == calm.paid
    assert rows_of(tmp_path / "stormy") == rows_of(tmp_path / "calm")
    total, _ = ledger_of(tmp_path / "stormy", args)
    assert total["calls"] == sum(stub.paid.values()) and not total["lost"] and not total["errors"]


def test_a_refused_request_is_recorded_once_and_asked_again_only_on_request(tmp_path):
    def fault(key, n):
        return 400 if int(key, 16) % 9 == 0 else None

    with Stub(fault) as stub:
        args = settings_for(tmp_path, stub, EXAMPLES=8, HELD_OUT=0)
        generate_constitutional.main(args)
        total, _ = ledger_of(tmp_path, args)
        asked = sum(stub.asked.values())
        assert total["errors"] == asked - sum(stub.paid.values()) > 0 and max(stub.asked.values()) == 1
        generate_constitutional.main(args)
        assert sum(stub.asked.values()) == asked
        stub.fault = lambda key, n: None
        generate_constitutional.main(args | {"RETRY_ERRORS": True})
    assert max(stub.asked.values()) == 2 and max(stub.paid.values()) == 1


def test_cut_off_answers_are_paid_rejected_and_replaced(tmp_path):
    with Stub(lambda key, n: "cut off" if int(key, 16) % 7 == 0 else None) as stub:
        generate_constitutional.main(settings_for(tmp_path, stub))
    rejected = [json.loads(line) for line in (tmp_path / "rows.work/rejected.jsonl").read_text().splitlines()]
    assert "cut off" in {row["reason"] for row in rejected} and len(rows_of(tmp_path)) >= 16


def test_a_teacher_that_never_answers_stops_the_run_in_order(tmp_path):
    with Stub(lambda key, n: 529 if stub_down else None) as stub:
        stub_down, args = True, settings_for(tmp_path, stub, MAX_RETRIES=1)
        with pytest.raises(SystemExit, match=r"did not answer|unanswered.*the same command continues"):
            generate_constitutional.main(args)
        stub_down = False
        generate_constitutional.main(args)
    assert max(stub.paid.values()) == 1 and ledger_of(tmp_path, args)[0]["lost"] == 0


def test_a_teacher_that_is_too_slow_stops_the_run_with_a_hint(tmp_path):
    with Stub() as stub:
        stub.delay = 2
        args = settings_for(tmp_path, stub, MAX_RETRIES=0, TIMEOUT_SECONDS=0.05)
        with pytest.raises(SystemExit, match=r"timed out.*--concurrency 1 or more --timeout-seconds"):
            generate_constitutional.main(args)


@pytest.mark.parametrize(("to", "limit"), [("server", "max_tokens"), ("OpenAI itself", "max_completion_tokens")])
def test_the_most_tokens_of_an_answer_have_the_name_that_the_endpoint_knows(tmp_path, monkeypatch, to, limit):
    with Stub() as stub:
        args = settings_for(tmp_path, stub, PROVIDER="openai")
        if to != "server":
            monkeypatch.setenv("OPENAI_BASE_URL", args["BASE_URL"])  # what the client takes where none is named
            args["BASE_URL"] = ""
        generate_constitutional.main(args | {"EXAMPLES": 1, "HELD_OUT": 0})
        bodies = [body for _, _, body in stub.requests]
    assert {"max_tokens", "max_completion_tokens"} & bodies[0].keys() == {limit}
    assert len({body["seed"] for body in bodies}) == len(bodies) > 3  # or a server draws the same numbers for each


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_wrong_key_or_model_ends_with_one_sentence_and_no_record(tmp_path, status):
    with Stub(lambda key, n: status) as stub, pytest.raises(SystemExit, match="refuses every request"):
        generate_constitutional.main(settings_for(tmp_path, stub))
    assert not (tmp_path / "rows.work/questions.jsonl").read_text().count("error")


def test_a_missing_key_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv("ANTHROPIC_API_KEY")
    with Stub() as stub, pytest.raises(SystemExit, match="ANTHROPIC_API_KEY"):
        generate_constitutional.main(settings_for(tmp_path, stub, BASE_URL=""))


def test_max_cost_stops_before_it_is_passed_and_more_money_continues(tmp_path):
    with Stub() as stub:
        args = settings_for(tmp_path, stub, MAX_COST=0.06)
        with pytest.raises(SystemExit, match="MAX_COST"):
            generate_constitutional.main(args)
        total, _ = ledger_of(tmp_path, args)
        assert 0 < total["cost"] <= 0.06 and not total["lost"] and not (tmp_path / "rows.jsonl").exists()
        generate_constitutional.main(args | {"MAX_COST": 0.0})
    assert max(stub.paid.values()) == 1


def stop_at_first_poll(stub, args):
    """Run until the first batch is out, and press Ctrl-C while the run waits for it."""

    def interrupt(_):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("time.sleep", interrupt)
        with pytest.raises(SystemExit, match="Stopped"):
            generate_constitutional.main(args)
    assert len(stub.batches) == 1 and not stub.paid


def test_max_cost_counts_a_batch_that_is_still_out_at_its_most(tmp_path):
    with Stub() as stub:
        args = settings_for(tmp_path, stub, PROVIDER="anthropic-batches", EXAMPLES=8, HELD_OUT=0)
        stop_at_first_poll(stub, args)
        tokens = batches.Journal(tmp_path / "rows.work/batches.jsonl").tokens_out()
        other = args | {"SEED": 43}  # other questions: the batch is of no use to them
        with pytest.raises(SystemExit, match="MAX_COST"):
            generate_constitutional.main(other | {"MAX_COST": 1.05 * teachers.cost(tokens, teachers.prices(args))})
        assert len(stub.batches) == 1 and not stub.paid
        generate_constitutional.main(other)
        report = (tmp_path / "rows.work/report.md").read_text()
        assert "1 batches are still out" in report and "still out costs 0.0" in report
        generate_constitutional.main(args | {"PAY_AGAIN": True})
    assert "still out" not in (tmp_path / "rows.work/report.md").read_text()
    assert max(stub.paid.values()) == 1 and ledger_of(tmp_path, args)[0]["calls"] == len(stub.paid)


def test_a_batch_of_a_larger_run_is_paid_once_though_a_smaller_run_fetches_it(tmp_path):
    with Stub() as stub:
        args = settings_for(tmp_path, stub, PROVIDER="anthropic-batches", EXAMPLES=16, HELD_OUT=0)
        stop_at_first_poll(stub, args)
        for examples in (6, 16):
            generate_constitutional.main(args | {"EXAMPLES": examples})
            assert len(rows_of(tmp_path)) == examples
            assert max(stub.paid.values()) == 1 and ledger_of(tmp_path, args)[0]["calls"] == len(stub.paid)


def test_rows_that_are_missing_after_all_rounds_end_with_a_sentence_and_the_others_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr(generate_constitutional, "MAX_ROUNDS", 2)
    with Stub(lambda key, n: "cut off" if int(key, 16) % 3 else None) as stub:
        args = settings_for(tmp_path, stub, EXAMPLES=8, HELD_OUT=0)
        for _ in range(2):  # asking again changes nothing and costs nothing
            with pytest.raises(SystemExit, match=r"of 8 rows are missing after 2 rounds .*report.md says why"):
                generate_constitutional.main(args)
    assert max(stub.asked.values()) == 1 and len(rows_of(tmp_path)) < 8
    assert "rejected: cut off" in (tmp_path / "rows.work/report.md").read_text()


def test_a_changed_constitution_says_what_is_useless_before_it_pays_again(tmp_path):
    with Stub() as stub:
        args = settings_for(tmp_path, stub, HELD_OUT=0, EXAMPLES=8)
        generate_constitutional.main(args)
        paid = sum(stub.paid.values())
        path = tmp_path / "constitution.md"
        path.write_text(path.read_text().replace("### truth: Say what is true", "### truth: Say the truth"))
        with pytest.raises(SystemExit, match=r"paid answers don't fit any longer \(constitution: .*--pay-again"):
            generate_constitutional.main(args)
        assert sum(stub.paid.values()) == paid
        generate_constitutional.main(args | {"PAY_AGAIN": True})
        questions = sum("You write what people" in str(body["system"]) for _, _, body in stub.requests)
        generate_constitutional.main(args)
    assert sum(stub.paid.values()) > paid and max(stub.paid.values()) == 1
    assert questions == (tmp_path / "rows.work/questions.jsonl").read_text().count('"text"')


def test_a_second_run_at_the_same_time_is_refused(tmp_path):
    with Stub() as stub:
        args = settings_for(tmp_path, stub)
        (tmp_path / "rows.work").mkdir()
        from sft import system

        with system.lock(tmp_path / "rows.work", "--output"), pytest.raises(SystemExit, match="in use by another run"):
            generate_constitutional.main(args)
    assert not stub.requests


def test_a_full_disk_ends_with_a_sentence_and_the_same_command_continues(tmp_path):
    with Stub() as stub:
        args = settings_for(tmp_path, stub, HELD_OUT=0, EXAMPLES=8)
        with full_disk(3000), pytest.raises(SystemExit, match="Free disk space"):
            generate_constitutional.main(args)
        generate_constitutional.main(args)
    assert len(rows_of(tmp_path)) == 8 and sum(stub.paid.values()) <= len(stub.paid) + args["CONCURRENCY"]


# ---- Kills ----


def kill_until_done(stub, args, kills, provider_calls):
    """Kill the run `kills` times at random moments, then let it end. provider_calls(): requests so far."""
    context, random = multiprocessing.get_context("forkserver"), Random(7)
    context.set_forkserver_preload(["warm_teacher"])
    os.environ["PYTHONPATH"] = f"{ROOT}:{ROOT / 'tests'}"  # Python 3.11's forkserver preloads from nowhere else
    os.environ["PRELOAD_TEACHER"] = "1"
    forkserver.ensure_running()
    del os.environ["PRELOAD_TEACHER"]
    struck = 0
    for _ in range(kills):
        goal = provider_calls() + random.randint(0, 4)
        process = context.Process(target=warm_teacher.run, args=(args,))  # 20 ms instead of seconds
        process.start()
        while process.is_alive() and provider_calls() < goal:
            time.sleep(0.002)
        time.sleep(random.uniform(0, 0.02))
        struck += process.is_alive()
        process.kill()
        process.join()
    process = context.Process(target=warm_teacher.run, args=(args,))
    process.start()
    process.join()
    assert process.exitcode == 0
    return struck


def test_kills_lose_only_what_was_in_flight_and_change_no_byte(whole, tmp_path):
    folder, calm = whole
    with Stub(delay=0.01) as stub:
        args = settings_for(tmp_path, stub, CONCURRENCY=4)
        struck = kill_until_done(stub, args, KILLS, lambda: sum(stub.asked.values()))
        total, _ = ledger_of(tmp_path, args)
    assert struck >= 0.75 * KILLS
    assert stub.paid.keys() == calm.paid.keys()
    twice = sum(stub.paid.values()) - len(stub.paid)
    assert twice <= total["lost"] <= args["CONCURRENCY"] * struck
    assert total["calls"] == len(stub.paid)
    assert total["cost"] == pytest.approx(ledger_of(folder, args)[0]["cost"], abs=1e-12)
    assert result_of(tmp_path) == result_of(folder)
    print(f"{struck} kills, {len(stub.paid)} keys, {twice} paid twice, {total['lost']} counted as lost")


def test_kills_between_batches_submit_none_twice(whole, tmp_path):
    folder, _ = whole
    with Stub() as stub:
        stub.polls = 2
        args = settings_for(tmp_path, stub, PROVIDER="anthropic-batches", BATCH_SIZE=9, POLL_SECONDS=0.03)
        struck = kill_until_done(stub, args, KILLS // 3, lambda: len(stub.batches))
        assert ledger_of(tmp_path, args)[0]["calls"] == len(stub.paid)
    assert struck >= KILLS // 6 and max(stub.paid.values()) == 1 and max(stub.batch_asked.values()) == 1
    assert result_of(tmp_path) == result_of(folder)


# ---- Batches ----


def test_expired_and_failed_entries_are_asked_again_and_refused_ones_recorded(tmp_path, whole):
    def entry_fault(key, n):
        number = int(key, 16) % 9
        error = {"type": "error", "request_id": None, "error": {"type": "overloaded_error", "message": "busy"}}
        if number == 0:
            error["error"]["type"] = "invalid_request_error"
            return {"type": "errored", "error": error}
        return {1: {"type": "expired"}, 2: {"type": "errored", "error": error}}.get(number) if n == 0 else None

    with Stub() as stub:
        stub.entry_fault = entry_fault
        args = settings_for(tmp_path, stub, PROVIDER="anthropic-batches", EXAMPLES=8, HELD_OUT=0)
        generate_constitutional.main(args)
    total, _ = ledger_of(tmp_path, args)
    refused = [key for key in stub.batch_asked if int(key, 16) % 9 == 0]
    assert total["errors"] == len(refused) and all(stub.batch_asked[key] == 1 for key in refused)
    assert max(stub.batch_asked.values()) == 2 and max(stub.paid.values()) == 1
    assert len(rows_of(tmp_path)) == 8
    half = sum(r["input_tokens"] + 5 * r["output_tokens"] for r in all_answers(tmp_path)) / 2e6
    assert total["cost"] == pytest.approx(half)


def all_answers(folder):
    lines = [line for path in (folder / "rows.work").glob("*.jsonl") for line in path.read_text().splitlines()]
    return [record for record in map(json.loads, lines) if "output_tokens" in record]


def test_a_batch_whose_creation_was_never_confirmed_is_found_and_not_submitted_again(tmp_path, whole, monkeypatch):
    folder, _ = whole
    monkeypatch.setattr("time.sleep", lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.02)))
    with Stub() as stub:
        stub.create_faults = [529, "lost", None, 429, 500, "lost"]
        generate_constitutional.main(settings_for(tmp_path, stub, PROVIDER="anthropic-batches"))
    assert not stub.create_faults and max(stub.batch_asked.values()) == 1 and max(stub.paid.values()) == 1
    assert result_of(tmp_path) == result_of(folder)


# ---- A real server ----

FOR_NONSENSE = """# What a teacher of random words can live up to: no reasoning, no pairs, no requirements
## Who
- name: Genesis
- maker: one engineer
- language: en

It is brief.
## Principles
### truth: Say what is true
It invents nothing.
## Askers
- a nurse
- a student
## Categories
"""
for name, share in {"reasoning": 50, "personality": 50, "safety": 0, "instruction_following": 0}.items():
    FOR_NONSENSE += f"### {name}: {share}%\nThis and that.\nTopics:\n- bread\n- bridges\n"
    FOR_NONSENSE += "Formats:\n- 1 turn, 5 to 20 words\n- 2 turns, 5 to 20 words\n"


def wait_for_answers(process, path, number):
    """Wait until the stage's file `path` has this many answers of a running process."""
    while not path.exists() or path.read_text().count('"text"') < number:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.05)


@pytest.mark.torchrun
def test_a_real_server_answers_all_stages_over_a_kill_and_prepare_data_takes_the_rows(tmp_path):
    """`transformers serve` with random words: questions, answers, critiques, revisions, follow-ups; not the judge."""
    model = tiny_teacher.write_teacher(tmp_path / "teacher")
    (tmp_path / "constitution.md").write_text(FOR_NONSENSE)
    with tiny_teacher.Server(model, tmp_path / "server.log") as server:
        command = [ROOT / "generate_constitutional.py", "--provider", "openai", "--base-url", server.url]
        command += ["--model", model.name, "--examples", 8, "--held-out", 0, "--output", "rows.jsonl"]
        command += ["--questions-per-call", 2, "--concurrency", 2]
        with (tmp_path / "killed.log").open("wb") as log:
            line = [sys.executable, *map(str, command)]
            process = subprocess.Popen(line, cwd=tmp_path, stdout=log, stderr=log)
            wait_for_answers(process, tmp_path / "rows.work/answer.jsonl", 2)
            process.kill()
            process.wait()
        run_python(tmp_path, *command)
        answered = server.answered
    total, files = ledger_of(tmp_path, args_of(generate_constitutional))
    assert all(len(file.answers) == file.ledger["calls"] for file in files.stages.values())
    assert all(files.stages[stage].answers for stage in records.STAGES if stage != "judge")
    assert total["calls"] <= answered <= total["calls"] + total["lost"] and total["lost"] <= 2
    assert len(rows_of(tmp_path)) >= 8 and not total["errors"]
    source = {"name": "constitutional", "path": "rows.jsonl", "schema": "messages", "examples": "all"}
    (tmp_path / "mixture.json").write_text(json.dumps([source | {"identity_patterns": []}]))
    flags = ["--mixture", "mixture.json", "--base-model", write_tokenizer(tmp_path / "base"), "--data-dir", "data"]
    run_python(tmp_path, ROOT / "prepare_data.py", *flags, "--decontaminate-against", "")
    (prepared,) = json.loads((tmp_path / "data/report.json").read_text())["sources"]
    assert prepared["read"] == len(rows_of(tmp_path)) == prepared["kept"] + prepared["rejected"]


# ---- Checks ----


def item_of(*texts, category="reasoning", kind="", think=False):
    """Return an Item with these turns."""
    rules = constitution.parse(TEXT)
    (found,) = [entry for entry in rules.categories if entry.id == category]
    ask = conversations.Ask(found, 0, "t", constitution.Format(1, 5, 50, think), ["a"])
    item = conversations.Item(f"{category}-0-0{kind[:1]}", ask, "a", kind)
    item.messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
    return item


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("It is four, because two and two make four.", ""),
        ("ChatGPT was made by OpenAI; I was made by one engineer.", ""),
        ("I'm not Claude. I'm Genesis.", ""),
        ("I can't swim, but I can tell you how it is done.", ""),
        ("Four.", "empty or one word"),
        ("It is <|im_end|> four.", "control-token text"),
        ("Hello, I'm Claude, and it is four.", "the teacher's identity"),
        ("As an AI language model by others, I say four.", "the teacher's identity"),
        ("I am an assistant trained by Anthropic.", "the teacher's identity"),
        ("<think>two and two</think> It is four.", "think tags unpaired or not as asked"),
        ("I'm sorry, but I can't help with that.", "refusal of a benign question"),
        ("Genesis is a small, open language model of about one billion parameters. It runs on machines.",
         "quotes the constitution"),
        ("Das ist eine Antwort auf Deutsch, die lang genug ist, damit man die Sprache sicher erkennen kann, und die "
         "deshalb nicht in die Daten kommen darf.", "another language"),
    ],
)  # fmt: skip
def test_each_answer_is_kept_or_has_a_reason(answer, reason):
    check = checks.Checks(constitution.parse(TEXT), TEXT)
    assert check(item_of("What is two and two?", answer)) == reason


def test_think_blocks_must_be_whole_where_they_are_asked_for():
    check = checks.Checks(constitution.parse(TEXT), TEXT)
    for answer, good in [
        ("<think> a b </think> The answer", True),
        ("The answer", False),
        ("<think>\na b\n\nThe answer", False),
        ("<think>a</think><think>b</think>The answer", False),
        ("<think>a</think>", False),
    ]:
        reason = check(item_of("q", conversations.tidy(answer), think=True))
        assert bool(reason) is not good, answer


def test_a_risky_question_may_be_refused_and_a_pair_is_kept_or_rejected_together():
    check = checks.Checks(constitution.parse(TEXT), TEXT)
    risky = item_of("q", "I won't help with that, but here is a safer way.", category="safety", kind="risky")
    benign = item_of("q", "I can't help with that one.", category="safety", kind="benign")
    risky.reason, benign.reason = check(risky), check(benign)
    assert (risky.reason, benign.reason) == ("", "refusal of a benign question")
    checks.mark_twins([risky, benign])
    assert risky.reason == "its twin was rejected"


def test_duplicates_and_near_duplicates_are_found_and_alike_questions_are_one_family():
    random = Random(1)
    text = prose(random, 40)
    near = text.replace(text.split()[5], "zebra", 1)
    items = [item_of(t, "a b") for t in (text, text.upper(), near, prose(random, 40))]
    checks.mark_duplicates(items, "question", lambda item: item.question)
    assert [item.reason for item in items] == ["", "duplicate question", "near duplicate question", ""]


def test_every_constraint_can_be_met_and_missed_by_lm_evals_own_checkers():
    good = {
        "length_constraints:number_words": None,
        "detectable_format:number_bullet_lists": None,
        "detectable_format:number_highlighted_sections": "*one thing* and *two things* and *three things*",
        "keywords:existence": " ".join(constraints.WORDS),
        "keywords:forbidden_words": "Nothing of the kind.",
        "startend:end_checker": None,
        "startend:quotation": '"Quoted."',
        "detectable_format:title": "<<Title>>\ntext",
        "detectable_content:postscript": "Text.\n\nP.S. More.",
        "punctuation:no_comma": "No pause here.",
        "change_case:english_lowercase": "this is a text in small letters and in the english language",
        "change_case:english_capital": "THIS IS A TEXT IN LARGE LETTERS AND IN THE ENGLISH LANGUAGE",
        "detectable_format:json_format": '{"a": 1}',
    }
    bad = "Very good, really: just a thing, always great and nice because, I make it, important. " * 20
    for number in range(120):
        constraint, wording = constraints.draw(Random(number), 80)
        assert "{" not in wording
        name, values = constraint["id"], constraint["arguments"]
        answer = good[name]
        if name == "detectable_format:number_bullet_lists":
            answer = "* point\n" * values["num_bullets"]
        if name == "startend:end_checker":
            answer = f"Text. {values['end_phrase']}"
        if name == "length_constraints:number_words":
            answer = "word " * (values["num_words"] - (values["relation"] == "less than"))
        assert constraints.met(constraint, answer), constraint
        if name != "length_constraints:number_words" or values["relation"] == "less than":
            assert not constraints.met(constraint, bad), constraint


@pytest.mark.parametrize(
    ("text", "pairs", "found"),
    [
        ('["one?", "two?"]', False, ["one?", "two?"]),
        ('Sure:\n```json\n["one?",\n "two\nlines?"]\n```', False, ["one?", "two\nlines?"]),
        ("1. What is it about?\n2) And why is that?\nno", False, ["What is it about?", "And why is that?"]),
        ('[{"risky": "a", "benign": "b"}, {"risky": "c"}, 3]', True, [("a", "b")]),
        ("nonsense", True, []),
        ("[[[", False, []),
    ],
)
def test_questions_are_read_from_what_a_teacher_writes(text, pairs, found):
    assert conversations.parse_questions(text, pairs) == found


def test_questions_are_spread_evenly_over_topics_forms_and_askers():
    rules = constitution.parse(TEXT)
    args = args_of(generate_constitutional)
    for category in rules.categories:
        asks = [conversations.make_ask(rules, category, n, args) for n in range(4 * len(category.topics))]
        assert set(Counter(ask.topic for ask in asks).values()) == {4}
        forms = Counter(ask.form for ask in asks).values()
        assert max(forms) - min(forms) <= 1
        assert all(len(set(ask.askers)) >= 4 for ask in asks)


# ---- The plan and the settings ----


def test_the_plan_for_the_whole_source_names_calls_tokens_and_money(tmp_path, capsys):
    args = args_of(generate_constitutional, PLAN_ONLY=True, OUTPUT=str(tmp_path / "rows.jsonl"), EXAMPLES=1000)
    generate_constitutional.main(args | PRICES)
    plan = capsys.readouterr().out
    stages = {line.split()[0]: line.split()[1:] for line in plan.splitlines()[1:8]}
    calls = {stage: int(cells[1].replace(",", "")) for stage, cells in stages.items()}
    assert calls["answer"] == calls["critique"] == calls["revision"] > 1200 and calls["judge"] == 0
    assert float(stages["all"][-1]) == pytest.approx(sum(float(stages[s][-1]) for s in records.STAGES), abs=0.04)
    generate_constitutional.main(args)
    assert "Prices are unknown" in capsys.readouterr().out and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"PROVIDER": "x"}, "PROVIDER is 'x'; it must be one of"),
        ({"EXAMPLES": 0}, "EXAMPLES is 0; it must be at least 1"),
        ({"MAX_COST": 5.0}, "MAX_COST needs prices"),
        ({"PRICE_INPUT": 1.0}, "PRICES_LOOKED_UP is missing"),
        ({"OUTPUT": "rows.json"}, "must end in .jsonl"),
        ({"CONSTITUTION": "none.md"}, "none.md cannot be read"),
    ],
)
def test_a_setting_that_no_run_can_have_ends_with_a_sentence(changes, complaint):
    with pytest.raises(SystemExit, match=complaint):
        generate_constitutional.main(args_of(generate_constitutional, PLAN_ONLY=True, **changes))


def test_an_error_never_shows_the_key():
    assert (
        providers.without_key(ValueError("bad key sk-ant-secret\nin a header"), "sk-ant-secret")
        == "bad key [key] in a header"
    )
