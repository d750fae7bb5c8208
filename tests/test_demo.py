"""The demo's own data: enough conversations, in the schemas of their sources, and an evaluation held out from them.

Run it alone: bash tests/run.sh tests/test_demo.py
"""

import json
import re

from helpers import ROOT

import prepare_data
from sft.data import conversations, sources

DEMO = ROOT / "demo"


def texts_of(source):
    """Return every text of a source's rows, whatever its schema."""
    lines = (DEMO / source.path).read_text(encoding="utf-8").splitlines()
    reads = conversations.SCHEMAS[source.schema][1]
    return [[content for _, content in reads(json.loads(line))] for line in lines]


def grams(text, size=7):
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}


def test_five_sources_hold_more_than_300_conversations_without_duplicates():
    mixture, _ = sources.read_mixture(str(DEMO / "mixture.json"))
    genesis, _ = sources.read_mixture(prepare_data.MIXTURE)
    assert [source.name for source in mixture] == [source.name for source in genesis]
    assert [source.schema for source in mixture] == [source.schema for source in genesis]
    rows = [tuple(texts) for source in mixture for texts in texts_of(source)]
    assert len(rows) >= 300 and len(set(rows)) == len(rows)


def test_the_questions_are_balanced_and_no_training_text_gives_them_away():
    mixture, _ = sources.read_mixture(str(DEMO / "mixture.json"))
    trained = set().union(*(grams(text) for source in mixture for texts in texts_of(source) for text in texts))
    for task in ("persona", "general"):
        lines = (DEMO / "tasks" / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()
        items = [json.loads(line) for line in lines]
        assert len(items) >= 50
        answers = [item["answer"] for item in items]
        assert all(0.2 < answers.count(index) / len(items) < 0.3 for index in range(4))
        for item in items:
            assert len(set(item["choices"])) == 4
            assert not trained & grams(item["question"]), item
            assert not any(trained & grams(f"{item['question']} {choice}") for choice in item["choices"]), item
