"""From asks to finished conversations: which question is asked for, and the stages that each conversation goes through.

What is asked for depends on the seed and on an index alone, so a larger run begins with the asks of a smaller one.
"""

import dataclasses
import json
import re
from random import Random

from sft.generation import constraints
from sft.generation.constitution import Category, Format

CUT_OFF = ("max_tokens", "length", "model_context_window_exceeded")  # stop reasons of an answer without its end
NUMBERED = re.compile(r"^\s*(?:\d+[.):]|[-*])\s+(.{8,})$", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Ask:
    """One request for questions: a topic and a form, and the askers, one per question."""

    category: Category
    index: int
    topic: str
    form: Format
    askers: list

    @property
    def id(self):
        return f"{self.category.id}-{self.index}"


@dataclasses.dataclass
class Item:
    """A conversation in the making, and what is known about it. kind: "risky" and "benign" for pairs, else ""."""

    id: str
    ask: Ask
    asker: str
    kind: str = ""
    constraint: dict | None = None
    messages: list = dataclasses.field(default_factory=list)
    drafts: list = dataclasses.field(default_factory=list)  # the first answer of each turn
    critiques: list = dataclasses.field(default_factory=list)
    principles: list = dataclasses.field(default_factory=list)
    model: str = ""
    date: str = ""
    score: int | None = None
    score_reason: str = ""
    reason: str = ""  # why it is rejected
    family: str = ""  # of questions that are alike

    @property
    def category(self):
        return self.ask.category

    @property
    def form(self):
        return self.ask.form

    @property
    def question(self):
        return self.messages[0]["content"]

    @property
    def answers(self):
        return [message["content"] for message in self.messages if message["role"] == "assistant"]


def spread(values, index, *seeds):
    """Return entry `index` of an endless sequence of shuffled copies of `values`, so that each comes equally often."""
    copy, offset = divmod(index, len(values))
    order = list(values)
    Random("/".join(map(str, (*seeds, copy)))).shuffle(order)
    return order[offset]


def make_ask(rules, category, index, args):
    """Return the Ask number `index` of a category."""
    seed, number = (args["SEED"], category.id), args["QUESTIONS_PER_CALL"]
    askers = [spread(rules.askers, index * number + i, *seed, "asker") for i in range(number)]
    topic = spread(category.topics, index, *seed, "topic")
    return Ask(category, index, topic, spread(category.formats, index, *seed, "format"), askers)


def parse_questions(text, pairs):
    """Return the questions in a teacher's answer: texts, or with `pairs` tuples (risky, benign)."""
    begin, end = text.find("["), text.rfind("]")
    try:
        entries = json.loads(text[begin : end + 1], strict=False) if begin >= 0 else []
    except (ValueError, RecursionError):
        entries = []
    if pairs:
        made = [(entry.get("risky"), entry.get("benign")) for entry in entries if isinstance(entry, dict)]
        return [pair for pair in made if all(isinstance(part, str) and part.strip() for part in pair)]
    found = [entry.strip() for entry in entries if isinstance(entry, str) and entry.strip()]
    return found or [match.strip().strip('"') for match in NUMBERED.findall(text)]


def make_items(ask, text, seed):
    """Return the Items of the teacher's answer to an Ask."""
    items = []
    for index, question in enumerate(parse_questions(text, ask.category.id == "safety")[: len(ask.askers)]):
        kinds = zip(("risky", "benign"), question, strict=True) if isinstance(question, tuple) else [("", question)]
        for kind, content in kinds:
            item = Item(f"{ask.id}-{index}{kind[:1]}", ask, ask.askers[index], kind)
            random = Random(f"{seed}/{item.id}")
            if ask.category.id == "instruction_following" and random.random() < constraints.SHARE:
                item.constraint, wording = constraints.draw(random, ask.form.most_words)
                content = f"{content.strip()} {wording}"
            item.messages = [{"role": "user", "content": content.strip()}]
            items.append(item)
    return items


# ==== Stages ====


def converse(items, teacher, prompts, rules, check):
    """Take Items through answer, critique, revision and follow-up, as many turns as their form has.

    teacher.ask(calls, name) returns the records of calls, None where the teacher refused. check(item): returns why the
    last answer cannot be used, or "". An Item that gets a `reason` costs nothing more.
    """
    for turn in (1, 2, 3):
        active = [item for item in items if not item.reason and item.form.turns >= turn]
        if turn > 1 and active:
            replies = teacher.ask([prompts.followup(item) for item in active], f"followup {turn}")
            active = [item for item, reply in zip(active, replies, strict=True) if usable(item, reply)]
            for item, reply in zip(active, filter(usable_record, replies), strict=True):
                item.messages.append({"role": "user", "content": reply["text"].strip()})
        if active:
            one_turn(active, teacher, prompts, rules, check, turn)


def usable_record(record):
    """Return whether a record is a whole answer."""
    return record is not None and record["stop_reason"] not in CUT_OFF and bool(record["text"].strip())


def usable(item, record):
    """Return whether a record is a whole answer; otherwise say in item.reason why not."""
    if record is None:
        item.reason = "the teacher refused the request"
    elif record["stop_reason"] in CUT_OFF:
        item.reason = "cut off"
    elif not record["text"].strip():
        item.reason = "empty or one word"
    return not item.reason


def one_turn(items, teacher, prompts, rules, check, turn):
    """Add an answer to each Item: a first one, a critique of it, and unless it finds nothing, a revision."""
    drafts = teacher.ask([prompts.answer(item) for item in items], f"answer {turn}")
    drafted = [(item, reply) for item, reply in zip(items, drafts, strict=True) if usable(item, reply)]
    for item, reply in drafted:
        item.principles.append(Random(f"{prompts.args['SEED']}/{item.id}/{turn}").choice(rules.principles))
        item.drafts.append(tidy(reply["text"]))
    calls = [prompts.critique(item, item.drafts[-1]) for item, _ in drafted]
    critiques = teacher.ask(calls, f"critique {turn}")
    finished, revised = [], []
    for (item, reply), critique in zip(drafted, critiques, strict=True):
        if critique is None:
            item.reason = "the teacher refused the request"
            continue
        item.critiques.append(critique["text"].strip())
        nothing = item.critiques[-1].strip(" .!*").upper() == "NOTHING" or not item.critiques[-1]
        (finished if nothing else revised).append((item, reply))
    calls = [prompts.revision(item, item.drafts[-1], item.critiques[-1]) for item, _ in revised]
    for (item, _), reply in zip(revised, teacher.ask(calls, f"revision {turn}"), strict=True):
        if usable(item, reply):
            finished.append((item, reply))
    for item, reply in finished:
        item.messages.append({"role": "assistant", "content": tidy(reply["text"])})
        item.model, item.date = reply["model"], reply["date"]
        item.reason = check(item)


def tidy(text):
    """Return an answer with its <think> block, if any, in the form that sft/data/chatml.py expects."""
    match = re.fullmatch(r"\s*<think>(.*?)</think>(.*)", text, re.DOTALL)
    return f"<think>\n{match[1].strip()}\n</think>\n\n{match[2].strip()}" if match else text.strip()


def judge(items, teacher, prompts):
    """Have the teacher grade the Items that have no `reason` yet."""
    active = [item for item in items if not item.reason]
    for item, reply in zip(active, teacher.ask([prompts.judge(item) for item in active], "judge"), strict=True):
        match = re.search(r"SCORE:\s*(\d+)", reply["text"]) if reply else None
        item.score = int(match[1]) if match else None
        if match:
            item.score_reason = reply["text"].partition("REASON:")[2].strip()
