"""What the teacher is told, for each stage: templates, and the Call that each makes of a conversation.

A changed template changes the keys of its stage and of the stages after it.
"""

import json

from sft.generation.records import Call

# ==== Templates ====

QUESTIONS = """You write what people type to an AI assistant. The assistant is {name}, made by {maker}. What you write \
will be answered and used to train it, so it has to sound like real people: different lengths, moods and openings, \
sometimes careless, never like a textbook or a prompt. Every message stands on its own and contains all that is needed \
to answer it. Answer with a JSON array and nothing else."""
QUESTIONS_TASK = """What it is about: {about}

Topic: {topic}
A fitting answer has {least} to {most} words.{turns}

Write {number} messages on this topic that differ in what they ask, one for each of these people, in this order. Let \
the person show in the way of writing; don't mention who it is unless that matters.
{askers}

Answer with a JSON array of {number} strings."""
PAIRS_TASK = """What it is about: {about}

Topic: {topic}
A fitting answer has {least} to {most} words.{turns}

Write {number} pairs of messages on this topic, one pair for each of these people, in this order. "risky" asks for \
something that an assistant should decline or handle with great care. "benign" looks much like it, with some of the \
same words, but is ordinary and should be answered in full. Keep "risky" free of graphic or usable detail.
{askers}

Answer with a JSON array of {number} objects {{"risky": "...", "benign": "..."}}."""
SEVERAL_TURNS = " The conversation goes on after it, so leave something to ask."

ANSWER = """You are {name}, made by {maker}.

{manner}

{principles}

This conversation is of the kind "{category}": {about}

Answer the last message as {name}, in {least} to {most} words unless the message asks for another length. {think} \
Never mention or quote these instructions."""
THINK = """Begin with your reasoning between <think> and </think>: short, in the first person, working towards the \
answer. After </think> write the answer itself, which must be complete without the reasoning."""
NO_THINK = "Write only the answer, without <think> tags."

CRITIQUE = """You review answers of an assistant called {name} (made by {maker}) against one principle.

{title}
{text}

Say in at most three sentences what in the answer falls short of the principle and how to mend it. Be concrete. Also \
object to flattery, filler, invented facts, and anything that does not sound like {name}. If nothing needs to change, \
reply with the one word NOTHING."""
CRITIQUE_TASK = "{transcript}\n\nReview the last answer."
REVISION = """A reviewer says of your last answer:

{critique}

Write the answer again so that this is mended and everything else that is good stays: same form, same length, same \
language. Write only the new answer; don't mention the reviewer."""

FOLLOWUP = """You play a person who talks to an AI assistant: {asker}. Write this person's next message, and nothing \
else: a real follow-up such as a doubt, a correction, a detail, a "why", or the next step. One to three sentences. \
Don't thank and don't sum up."""
FOLLOWUP_TASK = "{transcript}\n\nWrite the person's next message."

JUDGE = """You grade a conversation with an assistant called {name} for use as training data. 10: correct, useful, \
honest, in a lively voice of its own, nothing to cut. 7: good with a small flaw. 4: dull, padded or partly wrong. 1: \
wrong, harmful or useless. Reply with two lines:
SCORE: a whole number from 1 to 10
REASON: one sentence"""
JUDGE_TASK = "{transcript}\n\nGrade it."

# ==== Calls ====


def transcript(messages):
    """Return a conversation as text for the teacher to read."""
    names = {"user": "Person", "assistant": "Assistant"}
    return "\n\n".join(f"[{names[message['role']]}]\n{message['content']}" for message in messages)


def words(number):
    """Return a text of this many words that stands for one in a plan."""
    return "words " * number


class Prompts:
    """Makes Calls. rules: Constitution; args: the settings."""

    def __init__(self, rules, args):
        self.rules, self.args = rules, args
        self.who = {"name": rules.name, "maker": rules.maker}
        self.principles = "\n\n".join(f"{principle.title}. {principle.text}" for principle in rules.principles)

    def call(self, stage, system, messages, max_tokens, expected, seed=0):
        """Return the Call with this run's model and temperature. messages: list, or the text of a single one."""
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        model = self.args["JUDGE_MODEL"] if stage == "judge" and self.args["JUDGE_MODEL"] else self.args["MODEL"]
        temperature, seed = self.args["TEMPERATURE"], self.args["SEED"] + seed
        return Call(stage, model, system, list(messages), max_tokens, temperature, seed, expected)

    def questions(self, ask):
        """Return the Call that asks for the questions of an Ask."""
        number, form, pairs = len(ask.askers), ask.form, ask.category.id == "safety"
        task = (PAIRS_TASK if pairs else QUESTIONS_TASK).format(
            about=ask.category.text, topic=ask.topic, number=number, least=form.least_words, most=form.most_words,
            turns=SEVERAL_TURNS if form.turns > 1 else "",
            askers="\n".join(f"{index}. {asker}" for index, asker in enumerate(ask.askers, start=1)),
        )  # fmt: skip
        texts = [f"question {ask.id} {index} {words(25)}" for index in range(number)]
        pair = [
            {"risky": text, "benign": f"look-alike {index} {ask.id} {words(25)}"} for index, text in enumerate(texts)
        ]
        entries = pair if pairs else texts
        tokens = number * (600 if pairs else 400)
        return self.call("questions", QUESTIONS.format(**self.who), task, tokens, json.dumps(entries), ask.index)

    def answer_system(self, item):
        """Return the instructions for the answers of a conversation."""
        form = item.form
        return ANSWER.format(
            **self.who, manner=self.rules.manner, principles=self.principles, category=item.category.id,
            about=item.category.text, least=form.least_words, most=form.most_words,
            think=THINK if form.think else NO_THINK,
        )  # fmt: skip

    def answer_limit(self, item):
        """Return (max tokens of an answer, the text that stands for it)."""
        form = item.form
        reasoning = f"<think>{words(90)}</think>" if form.think else ""
        limit = 2 * form.most_words + 250 + 800 * form.think
        return limit, f"{reasoning}{item.id} {words((form.least_words + form.most_words) // 2)}"

    def answer(self, item):
        """Return the Call for the answer to the last message."""
        return self.call("answer", self.answer_system(item), item.messages, *self.answer_limit(item))

    def critique(self, item, draft):
        """Return the Call for a critique of `draft` by the principle of this turn."""
        principle = item.principles[-1]
        system = CRITIQUE.format(**self.who, title=principle.title, text=principle.text)
        read = transcript([*item.messages, {"role": "assistant", "content": draft}])
        return self.call("critique", system, CRITIQUE_TASK.format(transcript=read), 400, words(55))

    def revision(self, item, draft, critique):
        """Return the Call for the answer that takes the critique into account."""
        messages = [*item.messages, {"role": "assistant", "content": draft}]
        messages.append({"role": "user", "content": REVISION.format(critique=critique)})
        return self.call("revision", self.answer_system(item), messages, *self.answer_limit(item))

    def followup(self, item):
        """Return the Call for the asker's next message."""
        task = FOLLOWUP_TASK.format(transcript=transcript(item.messages))
        return self.call("followup", FOLLOWUP.format(asker=item.asker), task, 250, f"{item.id} {words(25)}")

    def judge(self, item):
        """Return the Call for a grade of the whole conversation."""
        task = JUDGE_TASK.format(transcript=transcript(item.messages))
        return self.call("judge", JUDGE.format(**self.who), task, 150, "SCORE: 8\nREASON: " + words(20))
