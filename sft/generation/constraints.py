"""Requirements on an answer that code can check: our wordings, and lm_eval's own IFEval checkers.

The wordings are ours on purpose: rows in the words of the benchmark would teach the benchmark. Importing the checkers
takes seconds, so they are imported when the first answer is checked. Left out are those that need NLTK's data.
"""

import functools
import re

WORDS = ("garden", "window", "river", "bread", "letter", "winter", "pocket", "market", "bridge", "lantern", "quiet")
BANNED = ("very", "really", "just", "good", "important", "thing", "great", "nice", "always", "make", "because")
ENDINGS = ("That is all.", "Over to you.", "Make of that what you will.", "And so it goes.", "Have a good day.")


def fewer_words(random, most_words):
    return {"relation": "less than", "num_words": max(20, most_words - random.randrange(0, max(1, most_words // 3), 5))}


def more_words(random, most_words):
    return {"relation": "at least", "num_words": max(10, most_words // 2 - random.randrange(0, 10))}


CONSTRAINTS = (  # lm_eval's name, what draws its arguments from (random, most words of the answer), wordings
    (
        "length_constraints:number_words",
        fewer_words,
        ("Use fewer than {num_words} words.", "Keep it under {num_words} words."),
    ),
    (
        "length_constraints:number_words",
        more_words,
        ("Write at least {num_words} words.", "No less than {num_words} words, please."),
    ),
    (
        "detectable_format:number_bullet_lists",
        lambda random, _: {"num_bullets": random.randint(3, 6)},
        (
            'Give exactly {num_bullets} bullet points, each starting with "* ".',
            "A list of exactly {num_bullets} points, each with an asterisk.",
        ),
    ),
    (
        "detectable_format:number_highlighted_sections",
        lambda random, _: {"num_highlights": random.randint(2, 3)},
        ("Put at least {num_highlights} phrases *between asterisks*.", "Mark {num_highlights} or more phrases *so*."),
    ),
    (
        "keywords:existence",
        lambda random, _: {"keywords": random.sample(WORDS, random.randint(1, 2))},
        ("Work in: {keywords}.", "It has to contain these words: {keywords}."),
    ),
    (
        "keywords:forbidden_words",
        lambda random, _: {"forbidden_words": random.sample(BANNED, random.randint(1, 3))},
        ("Avoid these words: {forbidden_words}.", "Don't use: {forbidden_words}."),
    ),
    (
        "startend:end_checker",
        lambda random, _: {"end_phrase": random.choice(ENDINGS)},
        ('The last words must be "{end_phrase}"', 'Close with exactly this: "{end_phrase}"'),
    ),
    ("startend:quotation", lambda *_: {}, ("Put the whole answer between double quotation marks.",)),
    ("detectable_format:title", lambda *_: {}, ("Give it a title in double angle brackets, like <<this>>.",)),
    (
        "detectable_content:postscript",
        lambda *_: {"postscript_marker": "P.S."},
        ("Add a postscript that begins with {postscript_marker}", "Finish with a {postscript_marker} of one sentence."),
    ),
    ("punctuation:no_comma", lambda *_: {}, ("No commas, please.", "Do it without a single comma.")),
    ("change_case:english_lowercase", lambda *_: {}, ("all in lower case, no capitals at all.",)),
    ("change_case:english_capital", lambda *_: {}, ("ALL CAPITALS, the whole answer.",)),
    ("detectable_format:json_format", lambda *_: {}, ("Answer with valid JSON and nothing else.",)),
)
SHARE = 0.6  # of the instruction-following questions get one


def draw(random, most_words):
    """Return (constraint: {"id", "arguments"}, its wording)."""
    name, arguments, wordings = random.choice(CONSTRAINTS)
    arguments = arguments(random, most_words)
    shown = {key: ", ".join(value) if isinstance(value, list) else value for key, value in arguments.items()}
    return {"id": name, "arguments": arguments}, random.choice(wordings).format(**shown)


@functools.cache
def checkers():
    """Return lm_eval's {name: class of the checker}."""
    from lm_eval.tasks.ifeval import instructions_registry

    return instructions_registry.INSTRUCTION_DICT


def met(constraint, answer):
    """Return whether an answer, without its <think> block, meets a constraint."""
    checker = checkers()[constraint["id"]](constraint["id"])
    checker.build_description(**constraint["arguments"])
    return bool(answer.strip()) and bool(checker.check_following(answer))


def bare(answer):
    """Return the answer without its <think> block."""
    return re.sub(r"\A<think>.*?</think>\s*", "", answer, flags=re.DOTALL)
