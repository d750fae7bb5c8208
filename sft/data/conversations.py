"""From a row of a source to a conversation: each schema, the rules for rejection, the repairs, the duplicates' key.

A row becomes a list of (role, content) that alternates from user to assistant, after at most one system turn, or it is
rejected with a reason. Used by prepare_data.py.
"""

import hashlib
import unicodedata

# ==== Schemas and roles ====

SCHEMAS = {  # schema -> (the columns it needs, what makes (role, content) pairs of a row)
    "messages": (("messages",), lambda row: [(turn["role"], turn["content"]) for turn in row["messages"]]),
    "conversations": (("conversations",), lambda row: [(turn["from"], turn["value"]) for turn in row["conversations"]]),
    "query/response": (("query", "response"), lambda row: [("user", row["query"]), ("assistant", row["response"])]),
    "prompt/response": (("prompt", "response"), lambda row: [("user", row["prompt"]), ("assistant", row["response"])]),
}
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
}
TOOL_ROLES = ("tool", "function", "ipython", "function_call", "function_response", "observation", "tool_call")


def read_turns(row, source):
    """Return (raw turns of a row of the Source, None, or the reason why it has none or the source excludes it)."""
    try:
        turns = SCHEMAS[source.schema][1](row)
        for column, values in source.exclude.items():
            if row.get(column) in values:
                return turns, f"excluded: {column} is {row[column]}"
    except (KeyError, TypeError, AttributeError):
        return [], "no turns in the schema's columns"
    return turns, None


# ==== Rules ====


def is_utf8(text):
    """Return whether `text` can be written as UTF-8, which a lone surrogate cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


REJECTIONS = [  # (reason, predicate of the raw turns); a row is rejected for the first that holds
    ("no turns", lambda turns: not turns),
    ("content is not text", lambda turns: not all(isinstance(content, str) for _, content in turns)),
    # Its tokens would take 150 bytes of memory per character; a window holds a hundredth of it.
    ("longer than a million characters", lambda turns: sum(len(content) for _, content in turns) > 1_000_000),
    ("role is not text", lambda turns: not all(isinstance(role, str) for role, _ in turns)),
    ("tool turn", lambda turns: any(role in TOOL_ROLES for role, _ in turns)),
    ("unknown role", lambda turns: not all(role in ROLES for role, _ in turns)),
    ("text is not valid Unicode", lambda turns: not all(is_utf8(content) for _, content in turns)),
    ("system turn in the middle", lambda turns: any(ROLES[role] == "system" for role, _ in turns[1:])),
    ("empty user turn", lambda turns: any(ROLES[role] == "user" and not text.strip() for role, text in turns)),
    ("empty assistant turn", lambda turns: any(ROLES[role] == "assistant" and not t.strip() for role, t in turns)),
    ("no assistant turn", lambda turns: not any(ROLES[role] == "assistant" for role, _ in turns)),
]


def reason_to_reject(turns):
    """Return the first reason of REJECTIONS that holds for the raw turns, or None."""
    return next((reason for reason, holds in REJECTIONS if holds(turns)), None)


# ==== Repairs ====

LOGGED_CHANGES = (  # changes that leave text out or move it: each has a line in rejected.jsonl
    "assistant turn before the first user turn left out",
    "two turns of one role merged",
    "unanswered last user turn left out",
    "end cut off at the window",
    "exchange without a trained token in the window left out",
)


def repair(turns):
    """Return (turns as trimmed (role, content) that alternate from user to assistant, list of what was changed)."""
    repaired, changes = [], []
    for role, content in turns:
        role, text = ROLES[role], content.strip()
        if text != content:
            changes.append("white space trimmed")
        if role == "system" and not text:
            changes.append("empty system turn left out")
        elif role == "assistant" and (not repaired or repaired[-1][0] == "system"):
            changes.append("assistant turn before the first user turn left out")
        elif repaired and repaired[-1][0] == role:
            repaired[-1] = (role, f"{repaired[-1][1]}\n\n{text}")
            changes.append("two turns of one role merged")
        else:
            repaired.append((role, text))
    if repaired and repaired[-1][0] == "user":
        repaired.pop()
        changes.append("unanswered last user turn left out")
    return repaired, sorted(set(changes))


# ==== What identifies a conversation ====


def first_words(turns):
    """Return the beginning of the first turn that is not empty, for rejected.jsonl; a lone surrogate becomes "?"."""
    texts = (str(text).strip() for _, text in turns)
    words = next((text for text in texts if text), "")
    return words[:80].encode("utf-8", "replace").decode()


def duplicate_key(turns, how):
    """Return 16 bytes that two conversations share when they are duplicates.

    how: "exact" compares roles and texts; "normalised" leaves out white space, letter case and Unicode's compatibility
    variants (NFKC, then case folding).
    """
    text = "\x1e".join(f"{role}\x1f{content}" for role, content in turns)
    if how == "normalised":
        folded = unicodedata.normalize("NFKC", text).casefold().encode()
        data = folded.translate(None, b" \t\r\n\f\v")
    else:
        data = text.encode()
    return hashlib.blake2b(data, digest_size=16).digest()
