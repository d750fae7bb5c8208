"""conversations.py: the rules and repairs of a row, its first words, and the key of duplicates.

Run it alone: bash tests/run.sh tests/test_conversations.py
"""

import pytest
from helpers import chat, source

from sft.data import conversations


def turns_of(row, **fields):
    return conversations.read_turns(row, source(**fields))


@pytest.mark.parametrize(
    ("schema", "row"),
    [
        ("messages", chat("a", "b")),
        ("conversations", {"conversations": [{"from": "user", "value": "a"}, {"from": "assistant", "value": "b"}]}),
        ("query/response", {"query": "a", "response": "b"}),
        ("prompt/response", {"prompt": "a", "response": "b"}),
    ],
)
def test_every_schema_gives_the_same_turns(schema, row):
    assert turns_of(row, schema=schema) == ([("user", "a"), ("assistant", "b")], None)
    for other in ({}, [], None, "x", {schema: 1}):
        assert turns_of(other, schema=schema) == ([], "no turns in the schema's columns")


def test_a_row_is_excluded_by_the_value_of_a_column():
    row = chat("a", "b") | {"kind": "bad"}
    assert turns_of(row, exclude={"kind": ["bad"]})[1] == "excluded: kind is bad"
    assert turns_of(row, exclude={"kind": ["worse"], "other": ["x"]})[1] is None


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([], "no turns"),
        ([("user", None)], "content is not text"),
        ([("user", "a"), ("assistant", "b" * 1_000_000)], "longer than a million characters"),
        ([(1, "x")], "role is not text"),
        ([("user", "x"), ("tool", "y")], "tool turn"),
        ([("wizard", "x")], "unknown role"),
        ([("user", "\ud800")], "text is not valid Unicode"),
        ([("user", "a"), ("assistant", "b"), ("system", "c")], "system turn in the middle"),
        ([("user", " "), ("assistant", "b")], "empty user turn"),
        ([("user", "a"), ("assistant", "\n")], "empty assistant turn"),
        ([("user", "a")], "no assistant turn"),
        ([("system", ""), ("human", "a"), ("gpt", "b")], None),
    ],
)
def test_a_row_is_rejected_for_the_first_reason_that_holds(turns, reason):
    assert conversations.reason_to_reject(turns, "messages") == reason


CALL = {"role": "assistant", "content": "Let me look.", "tool_calls": [{"id": 1}]}


def masked(*turns):
    """Return a `messages` row of (role, content, train); without a third, a turn has no "train"."""
    names = ("role", "content", "train")
    return {"messages": [dict(zip(names, turn, strict=False)) for turn in turns]}


def test_an_assistant_turn_with_train_false_is_kept_and_marked():
    row = masked(("user", "a", False), ("gpt", "b", False), ("user", "c", None), ("assistant", "d", True))
    turns, reason = turns_of(row)
    assert turns == [("user", "a"), (conversations.MASKED, "b"), ("user", "c"), ("assistant", "d")] and not reason
    assert conversations.reason_to_reject(turns, "messages") is None
    assert conversations.repair(turns) == (turns, ['assistant turn with "train": false masked'])
    other = turns_of(masked(("user", "a"), ("gpt", "b"), ("user", "c"), ("assistant", "d")))[0]
    assert conversations.duplicate_key(turns, "normalised") != conversations.duplicate_key(other, "normalised")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (masked(("user", "a"), ("assistant", "b", "no")), '"train" is neither true nor false'),
        (masked(("user", "a"), ("assistant", "b", 0)), '"train" is neither true nor false'),
        (masked(("user", "a"), ("assistant", "b", [])), '"train" is neither true nor false'),
        (masked(("user", "a", True), ("assistant", "b")), '"train" is true outside an assistant turn'),
        (masked(("user", "a"), ("assistant", "b", False)), 'every assistant turn has "train": false'),
        (
            masked(("user", "a"), ("assistant", "b", False), ("assistant", "c")),
            'of two assistant turns in a row, one has "train": false',
        ),
        (masked(("user", "a"), ("assistant", " ", False), ("user", "b"), ("assistant", "c")), "empty assistant turn"),
        (masked(("user", "a"), (conversations.MASKED, "b"), ("user", "c"), ("assistant", "d")), "unknown role"),
        (
            {
                "messages": [
                    *chat("a", "b")["messages"],
                    {"role": "assistant", "content": "x", "tool_calls": [{"id": 1}]},
                ]
            },
            "tool turn",
        ),
        (masked(("user", "a"), (["assistant"], "b", False)), "role is not text"),
        (masked(("user", "a"), ("assistant", None, False)), "content is not text"),
    ],
)
def test_a_train_that_cannot_be_followed_is_a_reason_to_reject(row, expected):
    turns, reason = turns_of(row)
    assert (reason or conversations.reason_to_reject(turns, "messages")) == expected


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": " Plain text.\n"}, None),
        ({"text": None}, "content is not text"),
        ({"text": ["a"]}, "content is not text"),
        ({"text": " \n"}, "empty text"),
        ({"text": "\ud800"}, "text is not valid Unicode"),
        ({"text": "x" * 1_000_001}, "longer than a million characters"),
        ({"content": "x"}, "no turns in the schema's columns"),
    ],
)
def test_a_row_of_plain_text_is_one_text_or_is_rejected_with_a_reason(row, expected):
    turns, reason = turns_of(row, schema="text")
    assert (reason or conversations.reason_to_reject(turns, "text")) == expected
    if not expected:
        assert conversations.repair(turns) == ([("text", "Plain text.")], ["white space trimmed"])


def test_repair_trims_merges_and_leaves_out_and_says_so():
    turns = [("system", " "), ("assistant", "Hello"), ("user", " a"), ("human", "b"), ("gpt", "c"), ("user", "d")]
    repaired, changes = conversations.repair(turns)
    assert repaired == [("user", "a\n\nb"), ("assistant", "c")]
    assert changes == [
        "assistant turn before the first user turn left out",
        "empty system turn left out",
        "two turns of one role merged",
        "unanswered last user turn left out",
        "white space trimmed",
    ]
    assert conversations.repair([("assistant", "a"), ("user", "b")])[0] == []


def test_first_words_are_of_the_first_turn_that_is_not_empty():
    assert conversations.first_words([("system", " "), ("user", ""), ("assistant", " b ")]) == "b"
    assert conversations.first_words([("user", "\ud800" + "x" * 100)]) == "?" + "x" * 79
    assert conversations.first_words([]) == ""


def test_duplicates_share_a_key():
    def key(how, *texts):
        return conversations.duplicate_key(
            [("user" if n % 2 == 0 else "assistant", t) for n, t in enumerate(texts)], how
        )

    for how, variant, same in (
        ("normalised", ("Q  1", "ANSWER\n1"), True),
        ("normalised", ("ｑ1", "answer 1"), True),
        ("normalised", ("q1 answer", "1"), False),
        ("exact", ("q1", "answer 1"), True),
        ("exact", ("q1", "Answer 1"), False),
    ):
        assert (key(how, "q1", "answer 1") == key(how, *variant)) is same, (how, variant)
