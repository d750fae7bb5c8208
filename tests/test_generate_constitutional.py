"""generate_constitutional.py: the constitution, the stages' files, the plan, the providers, the checks, whole runs.

Run it alone: bash tests/run.sh tests/test_generate_constitutional.py
"""

import re

import pytest
from helpers import ROOT
from hypothesis import given
from hypothesis import strategies as st

from sft.generation import constitution

TEXT = (ROOT / "constitution.md").read_text()

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
