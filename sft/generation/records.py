"""The stages' files: a line per answer of the teacher, keyed by a hash of what determines it. Their sum is the ledger.

A stage's file STAGE.jsonl is only appended to. Its lines are

    {"key": ..., "sent": [input tokens, output tokens]}    before a request: at most what it may cost
    {"key": ..., "text": ..., "stop_reason": ..., "model": ..., "input_tokens": ..., "output_tokens": ..., "cost": ...}
    {"key": ..., "error": ...}                             the teacher refuses this request for good
    {"key": ..., "unanswered": ...}                        it answered nothing, after all retries; costs nothing

A request that was sent but has no answer, because the script was killed, is asked again; the ledger counts it as lost.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections import Counter

from sft import system

STAGES = ("questions", "followup", "answer", "critique", "revision", "judge")
KEY_FIELDS = ("stage", "model", "system", "messages", "max_tokens", "temperature", "seed")
CHARACTERS_PER_TOKEN = 4  # of English, for the plan


@dataclasses.dataclass(frozen=True)
class Call:
    """One request to the teacher.

    stage: one of STAGES; system: its instructions; messages: [{"role", "content"}]; seed: tells calls apart that are
    equal otherwise; expected: a text as long as the answer should be, which stands for it in a plan.
    """

    stage: str
    model: str
    system: str
    messages: list
    max_tokens: int
    temperature: float
    seed: int
    expected: str = dataclasses.field(compare=False)

    @functools.cached_property
    def key(self):
        """The hash of what determines the answer, 64 hex digits."""
        parts = {name: getattr(self, name) for name in KEY_FIELDS}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @property
    def input_characters(self):
        """Characters of all that is sent."""
        return len(self.system) + sum(len(message["content"]) for message in self.messages)

    @property
    def expected_tokens(self):
        """(input tokens, output tokens) by rule of thumb."""
        return self.input_characters // CHARACTERS_PER_TOKEN + 10, len(self.expected) // CHARACTERS_PER_TOKEN + 1

    @property
    def most_tokens(self):
        """(input tokens, output tokens) that the call can cost at most, for English text."""
        return self.input_characters // 2 + 100, self.max_tokens


def valid(record):
    """Return whether a parsed line has the form of one of the four kinds."""
    if not isinstance(record, dict) or not isinstance(record.get("key"), str):
        return False
    if "text" in record:
        tokens = record.get("input_tokens"), record.get("output_tokens")
        texts = record["text"], record.get("stop_reason"), record.get("model"), record.get("date")
        return all(type(value) is int for value in tokens) and all(isinstance(text, str) for text in texts)
    if "sent" in record:
        return isinstance(record["sent"], list) and [type(value) for value in record["sent"]] == [int, int]
    return isinstance(record.get("error"), str) or isinstance(record.get("unanswered"), str)


def parse(line):
    """Return the record in a line (bytes), or None if it is damaged."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if valid(record) else None


def repair(path, whole=parse):
    """Make the file end with a whole line. Returns: the number of bytes of a torn line that were cut off.

    A last line that lacks only its newline is whole: it gets the newline. whole(line): whether a line is.
    """
    if not path.exists():
        return 0
    with path.open("rb+") as file:
        data = file.read()
        tail = data[data.rfind(b"\n") + 1 :]
        if not tail:
            return 0
        if whole(tail):
            file.write(b"\n")
            return 0
        file.truncate(len(data) - len(tail))
    return len(tail)


def is_json(line):
    """Return whether a line (bytes) is JSON."""
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def parse_lines(path):
    """Return the JSON objects in the file `path` as system.read_lines does, after cutting off a torn last line."""
    repair(path, is_json)
    return system.read_lines(path)


class StageFile:
    """The records of one stage: `answers` {key: record}, `errors` {key: record}, and the open file behind them.

    retry_errors: forget the errors, so that their requests are made again. writes: whether to repair the file and
    append to it; a plan only reads.
    """

    def __init__(self, path, retry_errors=False, writes=True):
        self.path = path
        self.answers, self.errors, self.pending = {}, {}, {}
        self.ledger = Counter()  # calls, input_tokens, output_tokens, cost, and unpriced calls, of all answers
        self.lost, self.lost_tokens, self.damaged = 0, [0, 0], 0
        self.torn = repair(path) if writes else 0
        self.file = None
        if path.exists():
            with path.open("rb") as file:
                for line in file:
                    self.read(line)
        for tokens in self.pending.values():
            self.lose(tokens)
        self.pending.clear()
        if retry_errors:
            self.errors.clear()
        if writes:
            self.file = path.open("ab")

    def read(self, line):
        """Take a line of the file into account."""
        record = parse(line)
        if record is None:
            self.damaged += 1
            return
        key = record["key"]
        if "sent" in record:
            if key in self.pending:
                self.lose(self.pending[key])
            self.pending[key] = record["sent"]
            return
        self.pending.pop(key, None)
        if "text" in record:
            self.answers.setdefault(key, record)
            self.errors.pop(key, None)
            self.count(record)
        elif "error" in record and key not in self.answers:
            self.errors[key] = record

    def count(self, record):
        """Add an answer to the ledger."""
        self.ledger["calls"] += 1
        self.ledger["input_tokens"] += record["input_tokens"]
        self.ledger["output_tokens"] += record["output_tokens"]
        if record.get("cost") is None:
            self.ledger["unpriced"] += 1
        else:
            self.ledger["cost"] += record["cost"]

    def lose(self, tokens):
        """Count a request as lost: it was sent, and no line says what became of it."""
        self.lost += 1
        self.lost_tokens = [before + now for before, now in zip(self.lost_tokens, tokens, strict=True)]

    def append(self, record, durable=True):
        """Write a record and take it into account. durable: wait until it is on the disk."""
        line = json.dumps(record).encode() + b"\n"
        self.file.write(line)
        self.file.flush()
        if durable:
            os.fsync(self.file.fileno())
        self.read(line)

    def close(self):
        """Close the file."""
        if self.file:
            self.file.close()
