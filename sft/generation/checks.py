"""Which conversations are kept: rules for each answer, then duplicates, constraints, twins and the judge's grade.

Every conversation is kept or has one reason. Used by generate_constitutional.py.
"""

import functools
import re

from sft.generation import constraints

CONTROL_TEXT = re.compile(r"<\|[a-z_]+\|>|\[/?INST\]|<</?SYS>>|</?s>")
IDENTITY = re.compile(  # the teacher speaks as itself
    r"\bas an? (?:AI|artificial intelligence) (?:language )?(?:model|assistant)\b"
    r"|\b(?:I am|I['’]m|my name is|call me) (?:called )?(?:Claude|ChatGPT|GPT-?\d|Gemini|Llama|Qwen|Mistral|DeepSeek)\b"
    r"|\bI(?: am|['’]m| was)(?! not\b)[^.\n]{0,60}\b(?:made|created|trained|developed|built|designed) by "
    r"(?:Anthropic|OpenAI|Google|Meta|Mistral|Alibaba|Microsoft|DeepSeek)\b",
    re.IGNORECASE,
)
REFUSAL = re.compile(
    r"\A\W*(?:I['’]?m sorry\b[^.\n]{0,20}|Sorry\b[^.\n]{0,20}|I apologi[sz]e\b[^.\n]{0,20})?"
    r"\bI(?: can(?:no|['’])t| am not able to| am unable to|['’]m not able to|['’]m unable to| won['’]t| will not)"
    r" (?:help|assist|provide|answer|write|give|do that|discuss|comply|share|support|explain|tell)",
    re.IGNORECASE,
)
QUOTED_WORDS = 12  # in a row that an answer may not share with the constitution
LEAST_WORDS_FOR_LANGUAGE = 20  # below, the language cannot be told reliably
PERMUTATIONS = 64
SIMILAR = {"question": 0.7, "answer": 0.7}  # share of equal word triples from which two are near duplicates
RELATED = 0.3  # from which two questions are of one family
SHINGLE = 3  # words

# ==== One answer ====


@functools.lru_cache(maxsize=100_000)
def language_of(text):
    """Return the code of the language that a text is in, or "" if it cannot be told."""
    import langdetect

    langdetect.DetectorFactory.seed = 0
    try:
        return langdetect.detect(text)
    except langdetect.LangDetectException:
        return ""


def word_runs(text, length):
    """Return the set of runs of `length` words in a row."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}


def tags_wrong(item, answer):
    """Return whether think tags are missing, unpaired, out of place, or there although not asked for."""
    if not item.form.think:
        return "<think>" in answer or "</think>" in answer
    whole = re.fullmatch(r"<think>\n.+\n</think>\n\n.+", answer, re.DOTALL)
    return not whole or answer.count("<think>") != 1 or answer.count("</think>") != 1


def too_short(item, answer):
    """Return whether nothing or one word is left; one word may be what an instruction asks for."""
    least = 1 if item.category.id == "instruction_following" else 2
    return len(constraints.bare(answer).split()) < least


class Checks:
    """The rules for single answers. rules: Constitution; text: of its file."""

    def __init__(self, rules, text):
        self.language, self.quotable = rules.language, word_runs(text, QUOTED_WORDS)
        self.rejections = [  # (reason, predicate of an Item and its last answer)
            ("empty or one word", too_short),
            ("control-token text", lambda item, answer: CONTROL_TEXT.search(item.messages[-2]["content"] + answer)),
            ("think tags unpaired or not as asked", tags_wrong),
            ("the teacher's identity", lambda item, answer: IDENTITY.search(answer)),
            ("quotes the constitution", lambda item, answer: word_runs(answer, QUOTED_WORDS) & self.quotable),
            ("refusal of a benign question", self.refuses),
            ("another language", self.other_language),
        ]

    @staticmethod
    def refuses(item, answer):
        """Return whether an answer to anything but a risky question refuses."""
        return item.kind != "risky" and REFUSAL.search(constraints.bare(answer))

    def other_language(self, item, answer):
        """Return whether question or answer is in another language; a question may ask for one by name."""
        texts = (item.messages[-2]["content"], constraints.bare(answer))
        long = [text for text in texts if len(re.findall(r"[^\W\d_]{2,}", text)) >= LEAST_WORDS_FOR_LANGUAGE]
        return any(language_of(text.lower()) not in (self.language, "") for text in long)

    def __call__(self, item):
        """Return why the last answer of an Item cannot be used, or ""."""
        answer = item.messages[-1]["content"]
        return next((reason for reason, holds in self.rejections if holds(item, answer)), "")


# ==== Duplicates ====


def sketch(text):
    """Return the MinHash of a text's word triples."""
    from datasketch import MinHash

    mark = MinHash(num_perm=PERMUTATIONS)
    runs = word_runs(text, SHINGLE) or {tuple(re.findall(r"\w+", text.lower()))}
    mark.update_batch([" ".join(run).encode() for run in sorted(runs)])
    return mark


def normal(text):
    """Return a text without case, punctuation and white space, for exact comparison."""
    return "".join(re.findall(r"\w+", text.casefold()))


def mark_duplicates(items, kind, text_of):
    """Give each Item whose text equals or nearly equals that of an earlier one a reason. kind: of SIMILAR."""
    from datasketch import MinHashLSH

    index, seen = MinHashLSH(threshold=SIMILAR[kind], num_perm=PERMUTATIONS), set()
    for number, item in enumerate(items):
        if item.reason:
            continue
        text = text_of(item)
        if normal(text) in seen:
            item.reason = f"duplicate {kind}"
            continue
        mark = sketch(text)
        if index.query(mark):
            item.reason = f"near duplicate {kind}"
            continue
        seen.add(normal(text))
        index.insert(number, mark)


def find_families(items):
    """Set `family` of each Item: questions of one ask, twins, and questions that are alike belong together."""
    from datasketch import MinHashLSH

    parents = {}

    def root(name):
        while parents.setdefault(name, name) != name:
            name = parents[name]
        return name

    index = MinHashLSH(threshold=RELATED, num_perm=PERMUTATIONS)
    for number, item in enumerate(items):
        mark = sketch(item.question)
        for other in index.query(mark):
            low, high = sorted((root(items[other].ask.id), root(item.ask.id)))
            parents[high] = low
        index.insert(number, mark)
    for item in items:
        item.family = root(item.ask.id)


# ==== All of them ====


def mark_twins(items):
    """Reject what lacks its twin: a refusal without the look-alike teaches to refuse by keyword."""
    by_id = {item.id: item for item in items}
    reasons = {item.id: item.reason for item in items}
    for item in items:
        if item.kind and not item.reason:
            twin = item.id[:-1] + ("b" if item.kind == "risky" else "r")
            if twin not in by_id or reasons[twin]:
                item.reason = "its twin was rejected"


def mark_all(items, threshold):
    """Give a reason to each Item that is not to be kept, after the rules for single answers. threshold: grade or 0."""
    for item in items:
        if (
            not item.reason
            and item.constraint
            and not constraints.met(item.constraint, constraints.bare(item.answers[0]))
        ):
            item.reason = "constraint not met"
        if not item.reason and threshold and (item.score is None or item.score < threshold):
            item.reason = "judged too low" if item.score is not None else "no grade"
    mark_duplicates(items, "answer", lambda item: "\n".join(map(constraints.bare, item.answers)))
    mark_twins(items)
