"""decontamination.py: the real lm_eval's texts of every kind of task on small data, and look-ups in what it wrote.

Run it alone: bash tests/run.sh tests/test_decontamination.py
"""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT, copy_lm_eval, write_dataset
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from sft.data import decontamination

LESS = 'or continue without it: --decontaminate-against "" (contaminated scores may then look better than they are).'
# Twelve questions of one form: what they share is boilerplate, twelve being more than ten.
FORMULA = "please read the following riddle with great care and then give one single short answer"
# A passage of which twelve questions ask, and a formula around twelve short passages with two questions each.
PASSAGE = "The ferry left Vorlund at dawn with nine sheep, two priests and a crate of clocks that nobody had ordered."
SHARED = "Below the old quarry a spring fills three stone basins before it turns the wheel of the last flax mill."
INSTRUCTION = "Read what is written above and answer with the shortest span that is in it word for word"
EXAM = "This item refers to the letter in which a surveyor complains that both bridges were built on the wrong river."
ANIMALS = ("otter", "heron", "badger", "lynx", "adder", "plover", "stoat", "curlew", "vole", "dormouse", "kite", "mole")


# ---- Small tasks of every kind ----


def write_own_tasks(folder):
    """A task that generates, one that rolls over a text, and a group within a group."""
    folder.mkdir()
    riddles = [{"q": f"{FORMULA}: which {animal} swims?", "a": [f"the {animal} of", "none"]} for animal in ANIMALS]
    reading = [
        {
            "id": f"{animal} {part}",
            "story": f"At night the {animal} walks by itself along the wall of the harbour until"
            f" the {animal} sees the first of the fishing boats return.",
            "ask": f"{part} does it walk?",
            "a": ["by night"],
        }
        for animal in ANIMALS
        for part in ("When", "Where")
    ]
    exam = [{"q": f"{EXAM} What does line {n} say?", "a": ["no"]} for n in range(12)]
    exam += [{"q": f"Item {n} of {n * n} stands alone: is {n} + {n + 1} odd?", "a": ["yes"]} for n in range(300)]
    rolling = [{"text": "A rolling text tells of rain on slate roofs while nobody in the village looks up at all."}]
    for name, rows in (("riddles", riddles), ("rolling", rolling), ("reading", reading), ("exam", exam)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = {
        "own_riddles": ("riddles", "generate_until", "{{q}}", "a", "exact_match"),
        "own_reading": ("reading", "generate_until", f"{{{{story}}}} {INSTRUCTION}: {{{{ask}}}}", "a", "exact_match"),
        "own_exam": ("exam", "generate_until", "{{q}}", "a", "exact_match"),
        "own_rolling": ("rolling", "loglikelihood_rolling", "", "{{text}}", "word_perplexity"),
    }
    for name, (data, kind, text, target, metric) in tasks.items():
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: own_tasks/{data}.jsonl\n"
            f'test_split: test\noutput_type: {kind}\ndoc_to_text: "{text}"\ndoc_to_target: "{target}"\n'
            f"metric_list:\n  - metric: {metric}\nmetadata:\n  version: 1\n"
        )
    (folder / "inner.yaml").write_text("group: own_inner\ntask:\n  - mmlu_anatomy\n")
    (folder / "outer.yaml").write_text("group: own_group\ntask:\n  - own_inner\n  - mmlu_astronomy\n")


def write_data(root):
    arc = {
        "question": "Which of these materials, all found in an old kitchen drawer, carries an electric current best?",
        "choices": {"text": ["a spoon made of copper", "a cork", "a candle", "a napkin"], "label": list("ABCD")},
        "answerKey": "A",
    }
    short = {"question": "What is ice?", "choices": {"text": list("wxyz"), "label": list("ABCD")}, "answerKey": "B"}
    wino = {"option1": "trophy", "option2": "suitcase", "answer": "2"}
    wino["sentence"] = "The heavy trophy never fitted into the brown suitcase because the _ was simply far too small."
    lambada = "She whistled twice across the frozen lake, and out of the fog came running her old dog"
    mmlu = [{"question": "Which part is where?", "choices": ["up", "down", "left", "right"], "answer": 1}]
    stars = {"question": "Seen from a boat at anchor near the equator, which stars stand nearly still at night?"}
    stars |= {"choices": ["those close to either pole", "all", "none", "the red ones"], "answer": 0}
    splits = {"train": [arc], "validation": [arc], "test": [arc, short]}
    write_dataset(root, "allenai/ai2_arc", {"ARC-Easy": splits})
    write_dataset(root, "allenai/winogrande", {"winogrande_xl": {"train": [wino], "validation": [wino]}})
    write_dataset(root, "EleutherAI/lambada_openai", {"default": {"test": [{"text": lambada}]}})
    instruction = {"key": 1000, "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{"num_words": None}]}
    instruction["prompt"] = "Describe the lighthouse of Vorlund to a child who has never been there and use no commas."
    problem = {
        "question": "A ferryman rows nine sheep across in three trips; how many sheep are in the boat each time?"
    }
    problem["answer"] = "Each trip carries 9/3=<<9/3=3>>3 sheep.\n#### 3"
    write_dataset(root, "google/IFEval", {"default": {"train": [instruction]}})
    write_dataset(root, "openai/gsm8k", {"main": {"train": [problem], "test": [problem]}})
    (root / "nltk_data/tokenizers/punkt_tab").mkdir(parents=True)  # else ifeval would look for it on the net
    # The layouts of DROP and SQuAD: a row per question, its passage again in each.
    numbers = {"number": "", "date": {"day": "", "month": "", "year": ""}, "spans": ["nine"]}
    none = {"number": [], "date": [], "spans": []}
    asked = [f"How many {animal}s can there be?" for animal in ANIMALS]
    answers = {"answer": numbers, "validated_answers": none}
    drop = [{"query_id": question, "passage": PASSAGE, "question": question} | answers for question in asked]
    write_dataset(root, "EleutherAI/drop", {"default": {"train": drop, "validation": drop}})
    squad = [{"title": "Mill", "context": SHARED, "question": q, "answers": {"text": ["none"]}} for q in asked]
    write_dataset(root, "lighteval/squad_v2", {"default": {"train": squad, "validation": squad}})
    subjects = {"anatomy": mmlu, "astronomy": [stars]}
    write_dataset(root, "cais/mmlu", {name: {"test": rows, "dev": rows} for name, rows in subjects.items()})


KINDS = ["arc_easy", "winogrande", "lambada_openai", "own_group", "own_riddles", "own_rolling", "ifeval", "gsm8k"]
PROGRAM = """
import contextlib, io, json, sys
from sft.data import decontamination

for tasks, path in json.loads(sys.argv[1]):
    refusal, printed = None, io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            decontamination.write_ngrams(tasks, "own_tasks", path)
        except SystemExit as error:
            refusal = error.code
    print(json.dumps([refusal, printed.getvalue()]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("decontamination")
    copy_lm_eval(
        root / "fewer_tasks",
        ("winogrande", "arc", "lambada", "mmlu/default", "sciq", "drop", "squadv2", "ifeval", "gsm8k"),
    )
    write_data(root)
    write_own_tasks(root / "own_tasks")
    (root / "demo").symlink_to(ROOT / "demo")
    for path in (ROOT / "demo" / "tasks").glob("*.yaml"):
        (root / "own_tasks" / path.name).symlink_to(path)
    return root


@pytest.fixture(scope="module")
def runs(folder):
    """{run: (the refusal or None, what it printed)} of write_ngrams, all in one process with the real lm_eval."""
    wanted = {
        "demo": (["demo_persona", "demo_general", "demo_persona"], "demo.npz"),
        "kinds": (KINDS, "kinds.npz"),
        "passages": (["drop", "squadv2", "own_reading", "own_exam"], "passages.npz"),
        "unreachable": (["own_rolling", "sciq"], "none.npz"),
        "unknown": (["nonsense"], "none.npz"),
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(list(wanted.values()))],
        cwd=folder,
        env=os.environ
        | {"PYTHONPATH": f"{folder}/fewer_tasks:{ROOT}", "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
        | {"NLTK_DATA": str(folder / "nltk_data")},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return dict(zip(wanted, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.fixture(scope="module")
def overlap(folder, runs):
    assert runs["kinds"][0] is None
    return decontamination.Overlap(folder / "kinds.npz")


# ---- What is written and printed ----


def test_the_demos_own_tasks(folder, runs):
    refusal, printed = runs["demo"]
    assert refusal is None
    overlap = decontamination.Overlap(folder / "demo.npz")
    assert [row["task"] for row in overlap.counts] == ["demo_persona", "demo_general"]
    row = overlap.counts[1]
    assert printed.splitlines()[1] == (
        f"demo_general: 64 questions, {row['ngrams']} n-grams, {row['too_short']} questions too short, 0 n-grams of "
        "boilerplate"
    )
    for task, file in (("demo_persona", "persona"), ("demo_general", "general")):
        rows = [json.loads(line) for line in (ROOT / f"demo/tasks/{file}.jsonl").read_text().splitlines()]
        texts = [f"Question: {row['question']} Answer: {row['choices'][row['answer']]}" for row in rows]
        long = [text for text in texts if len(decontamination.words_of(text)) >= 13]
        assert long and all(overlap.find([text])[0] == task for text in long)


def test_file_is_sorted_and_needs_no_pickle(folder, overlap):
    with np.load(folder / "kinds.npz", allow_pickle=False) as file:
        assert file["hashes"].dtype == np.uint64 and (np.diff(file["hashes"]) > 0).all()
        assert len(file["task_of"]) == len(file["hashes"]) and int(file["n"]) == 13
        words = file["words"].tobytes().decode().split("\n")
    assert words == sorted(set(words)) and {"trophy", "whistled", "slate"} <= set(words)
    assert sorted(path.name for path in folder.glob("*.npz*")) == ["demo.npz", "kinds.npz", "passages.npz"]


def test_counts(overlap):
    rows = {row.pop("task"): row for row in map(dict, overlap.counts)}
    assert list(rows) == KINDS
    assert rows["own_group"].pop("parts") == ["own_group", "own_inner", "mmlu_anatomy", "mmlu_astronomy"]
    assert all(row.pop("parts") == [name] for name, row in rows.items() if name != "own_group")
    # "Question", 16 words, "Answer" and 5 words make 11 n-grams; each of the other choices ends in a new one.
    assert rows["arc_easy"] == {"questions": 2, "ngrams": 11 + 3, "too_short": 1, "boilerplate": 0}
    assert rows["own_group"]["questions"] == 2
    # 15 words of the formula and "which" make four n-grams that all twelve riddles share.
    assert rows["own_riddles"]["boilerplate"] == 16 - 13 + 1 and rows["own_riddles"]["too_short"] == 0
    assert rows["own_rolling"] == {"questions": 1, "ngrams": 18 - 13 + 1, "too_short": 0, "boilerplate": 0}


# ---- Look-ups ----


@pytest.mark.parametrize(
    ("task", "texts"),
    [
        ("arc_easy", ["Which of these materials, all found in an old kitchen drawer, carries an electric current?"]),
        ("arc_easy", ["which OF these\n\nmaterials - all found in an “old” kitchen drawer; carries", "an electric..."]),
        ("winogrande", ["The heavy trophy never fitted into the brown suitcase because the suitcase was small."]),
        ("winogrande", ["never fitted into the brown suitcase", "because the trophy was simply far too small"]),
        ("lambada_openai", ["twice across the frozen lake and out of the fog came running her", "Old dog!"]),
        ("own_group", ["which stars stand nearly still at night? A. those close to either pole", "B. All"]),
        ("own_riddles", ["with great care and then give one single short answer: which vole swims?", "The vole."]),
        ("own_riddles", ["care, and then give one single short answer: which vole swims?", "The vole of"]),
        ("own_riddles", ["great care, and then give one single short answer: which vole swims?", "None"]),
        ("ifeval", ["Please describe the lighthouse of Vorlund to a child who has never been there", "Sure!"]),
        ("gsm8k", ["A ferryman rows nine sheep across in three trips. How many sheep are in the boat?", "Three."]),
        ("own_rolling", ["He reads:", "tells of rain on slate roofs while nobody in the ｖｉｌｌａｇｅ looks up."]),
    ],
)
def test_a_question_is_found(overlap, task, texts):
    match = overlap.find(texts)
    assert match is not None and match[0] == task
    assert len(match[1].split()) == 13 and match[1] in " ".join(decontamination.words_of(" ".join(texts)))


@pytest.mark.parametrize(
    "texts",
    [
        ["The heavy trophy never fitted into the brown suitcase because my", "trophy was simply far too small"],
        ["rain on slate roofs while nobody in the village looks up at"],  # twelve words
        [f"{FORMULA}: which"],  # boilerplate
        ["The following are multiple choice questions (with answers) about anatomy. Which part is"],
        [""],
        [],
    ],
)
def test_less_is_not_found(overlap, texts):
    assert overlap.find(texts) is None


def test_a_passage_that_many_questions_share_is_found_and_a_formula_around_many_passages_is_not(folder, runs):
    assert runs["passages"][0] is None
    overlap = decontamination.Overlap(folder / "passages.npz")
    for task, text in (("drop", PASSAGE), ("squadv2", SHARED), ("own_exam", EXAM)):
        words = text.split()
        for part in (words[:13], words[-13:]):
            match = overlap.find(["Tell me a story.", " ".join(part)])
            assert match is not None and match[0] == task
    story = "at night the vole walks by itself along the wall of the harbour until"
    assert overlap.find(["Go on:", story]) == ("own_reading", " ".join(story.split()[:13]))
    assert overlap.find([INSTRUCTION]) is None
    rows = {row.pop("task"): row for row in map(dict, overlap.counts)}
    assert rows["drop"]["boilerplate"] == rows["squadv2"]["boilerplate"] == rows["own_exam"]["boilerplate"] == 0
    # All share 26 words, from "sees the first" to the instruction's end; six more differ between When and Where.
    assert rows["own_reading"]["boilerplate"] == 26 - 13 + 1 + 2 * 6
    assert (rows["own_reading"]["questions"], rows["own_exam"]["questions"]) == (24, 312)


few_words = st.lists(st.sampled_from("abcd"), max_size=30)


@given(st.lists(few_words, min_size=1, max_size=4), st.lists(few_words, max_size=3), st.integers(1, 6))
@hypothesis_settings(deadline=None, max_examples=200)
def test_find_agrees_with_sets_of_words(tmp_path_factory, questions, turns, n):
    """The questions of even index are the first task's, the others the second's."""
    path = tmp_path_factory.getbasetemp() / "property.npz"
    sets = {}
    for task, part in (("first", questions[::2]), ("second", questions[1::2])):
        sets[task] = {tuple(question[i : i + n]) for question in part for i in range(len(question) - n + 1)}
    hashes = [
        np.array([decontamination.ngram_hashes(hashes_of(ngram), n)[0] for ngram in ngrams], np.uint64)
        for ngrams in sets.values()
    ]
    decontamination.save_ngrams(
        path, n, {task: [task] for task in sets}, hashes, [(0, 0, 0, 0)] * 2, {word for q in questions for word in q}
    )
    flat = [word for turn in turns for word in turn]
    windows = [tuple(flat[i : i + n]) for i in range(len(flat) - n + 1)]
    expected = ((task, " ".join(window)) for window in windows for task, ngrams in sets.items() if window in ngrams)
    assert decontamination.Overlap(path).find([" ".join(turn) for turn in turns]) == next(expected, None)


def hashes_of(words):
    return np.array([decontamination.word_hash(word) for word in words], np.uint64)


def test_hashes_are_the_same_everywhere():
    """Pinned: a file written on one machine is read on another."""
    assert decontamination.word_hash("cat") == 0x3327DD2C7B9D982F
    row = np.array([1, 2, 3], np.uint64)
    base = int(decontamination.BASE)
    assert decontamination.ngram_hashes(row, 3).tolist() == [(base**2 + 2 * base + 3) % 2**64]


# ---- What is wrong ----


@pytest.mark.parametrize(
    ("run", "task", "says"),
    [
        ("unreachable", "sciq", "Couldn't reach 'allenai/sciq' on the Hub"),
        ("unknown", "nonsense", "lm_eval knows no task of this name"),
    ],
)
def test_a_task_that_cannot_be_compared(folder, runs, run, task, says):
    refusal, _ = runs[run]
    assert "\n" not in refusal and "Traceback" not in refusal
    assert refusal.startswith(f"{task} cannot be compared: ") and says in refusal
    assert refusal.endswith(f"Make it reachable, {LESS}")
    assert not list(folder.glob("none.npz*"))


def test_a_folder_that_is_not_there_is_refused_at_once_and_no_task_needs_no_process(tmp_path):
    with pytest.raises(SystemExit, match=r"No folder nowhere. Name a folder with .* --tasks-include-path"):
        decontamination.find_overlap(("x",), "nowhere", tmp_path / "x.npz")
    assert decontamination.find_overlap((), "nowhere", tmp_path / "x.npz") is None


def refusing_child(names, include_path, path):
    raise SystemExit(f"{names[0]} cannot be compared.")


def killed_child(names, include_path, path):
    os.kill(os.getpid(), signal.SIGKILL)


def writing_child(names, include_path, path):
    words, hashes = ["a", "b"], decontamination.ngram_hashes(hashes_of(["a", "b"]), 2)
    decontamination.save_ngrams(path, 2, {names[0]: names}, [hashes], [(1, 1, 0, 0)], words)


def test_what_the_spawned_child_says_arrives(tmp_path, monkeypatch, capfd):
    """A refusal as the sentence it is, a kill with the remedy, and the n-grams."""
    for child, says in (
        (refusing_child, "1"),
        (killed_child, "ended by signal 9, most likely out of memory. Free some"),
    ):
        monkeypatch.setattr(decontamination, "child_main", child)
        with pytest.raises(SystemExit, match=says):
            decontamination.find_overlap(("x",), "", tmp_path / "x.npz")
    assert capfd.readouterr().err == "x cannot be compared.\n"
    monkeypatch.setattr(decontamination, "child_main", writing_child)
    assert decontamination.find_overlap(("x",), "", tmp_path / "x.npz").find(["A, b!"]) == ("x", "a b")


def test_files_that_cannot_be_read_or_written(tmp_path):
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04 and no more")
    (tmp_path / "text.npz").write_text("text")
    (tmp_path / "empty.npz").write_bytes(b"")
    np.savez(tmp_path / "other.npz", n=3)
    for name in ("missing", "cut", "text", "empty", "other"):
        with pytest.raises(SystemExit, match=r"cannot be read .* Run prepare_data.py again."):
            decontamination.Overlap(tmp_path / f"{name}.npz")
    with pytest.raises(SystemExit, match="cannot be written"):
        decontamination.save_ngrams(
            tmp_path / "text.npz/x.npz", 3, {"a": ["a"]}, [np.empty(0, np.uint64)], [(0, 0, 0, 0)], set()
        )


def test_import_needs_no_torch():
    code = (
        "import sys; from sft.data import decontamination; sys.exit('torch' in sys.modules or 'lm_eval' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
