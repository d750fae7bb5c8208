"""From a row of a source to a conversation: each schema, the rules for rejection, the repairs, the duplicates' key.

A row becomes a list of (role, content) that alternates from user to assistant, after at most one system turn, or it is
rejected with a reason. A row of plain text becomes a list of one turn, ("text", content). Used by prepare_data.py.
"""

import hashlib
import unicodedata

# ==== Schemas and roles ====

SCHEMAS = {  # schema -> (the columns it needs, what makes (role, content) pairs of a row)
    "messages": (("messages",), lambda row: [(turn["role"], turn["content"]) for turn in row["messages"]]),
    "conversations": (("conversations",), lambda row: [(turn["from"], turn["value"]) for turn in row["conversations"]]),
    "query/response": (("query", "response"), lambda row: [("user", row["query"]), ("assistant", row["response"])]),
    "prompt/response": (("prompt", "response"), lambda row: [("user", row["prompt"]), ("assistant", row["response"])]),
    "text": (("text",), lambda row: [("text", row["text"])]),
}
MASKED = "masked assistant"  # role of an assistant's turn with "train": false
ASSISTANT = ("assistant", MASKED)
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
    MASKED: MASKED,
}
TOOL_ROLES = ("tool", "function", "ipython", "function_call", "function_response", "observation", "tool_call")


def read_turns(row, source):
    """Return (raw turns of a row of the Source, None, or the reason why it has none or the source excludes it)."""
    try:
        turns = SCHEMAS[source.schema][1](row)
        if any(role == MASKED for role, _ in turns):  # the name is ours, no data set's
            return turns, "unknown role"
        for column, values in source.exclude.items():
            if row.get(column) in values:
                return turns, f"excluded: {column} is {row[column]}"
        if source.schema == "messages":
            return mark_masked(row["messages"], turns)
    except (KeyError, TypeError, AttributeError):
        return [], "no turns in the schema's columns"
    return turns, None


def mark_masked(messages, turns):
    """Give the assistant's turns with "train": false the role MASKED.

    messages: the row's list of dicts; turns: its (role, content). Returns: (turns, None or a reason to reject the row).
    """
    marked = []
    for message, (role, content) in zip(messages, turns, strict=True):
        train = message.get("train")  # None: a column that only other turns have
        assistant = isinstance(role, str) and ROLES.get(role) == "assistant"
        if message.get("tool_calls"):
            return turns, "tool turn"
        if train is not None and not isinstance(train, bool):
            return turns, '"train" is neither true nor false'
        if train and not assistant:
            return turns, '"train" is true outside an assistant turn'
        marked.append((MASKED if assistant and train is False else role, content))
    return marked, None


# ==== Rules ====


def is_utf8(text):
    """Return whether `text` can be written as UTF-8, which a lone surrogate cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


NOT_TEXT = ("content is not text", lambda turns: not all(isinstance(content, str) for _, content in turns))
# Its tokens would take 150 bytes of memory per character; a window holds a hundredth of it.
TOO_LONG = ("longer than a million characters", lambda turns: sum(len(content) for _, content in turns) > 1_000_000)
NOT_UNICODE = ("text is not valid Unicode", lambda turns: not all(is_utf8(content) for _, content in turns))
REJECTIONS = [  # (reason, predicate of the raw turns); a row is rejected for the first that holds
    ("no turns", lambda turns: not turns),
    NOT_TEXT,
    TOO_LONG,
    ("role is not text", lambda turns: not all(isinstance(role, str) for role, _ in turns)),
    ("tool turn", lambda turns: any(role in TOOL_ROLES for role, _ in turns)),
    ("unknown role", lambda turns: not all(role in ROLES for role, _ in turns)),
    NOT_UNICODE,
    ("system turn in the middle", lambda turns: any(ROLES[role] == "system" for role, _ in turns[1:])),
    ("empty user turn", lambda turns: any(ROLES[role] == "user" and not text.strip() for role, text in turns)),
    ("empty assistant turn", lambda turns: any(ROLES[role] in ASSISTANT and not t.strip() for role, t in turns)),
    ("no assistant turn", lambda turns: not any(ROLES[role] in ASSISTANT for role, _ in turns)),
    ('every assistant turn has "train": false', lambda turns: not any(ROLES[role] == "assistant" for role, _ in turns)),
    ('of two assistant turns in a row, one has "train": false', lambda turns: any(map(half_masked, turns, turns[1:]))),
]
DOCUMENT_REJECTIONS = [NOT_TEXT, TOO_LONG, NOT_UNICODE, ("empty text", lambda turns: not turns[0][1].strip())]


def half_masked(first, second):
    """Return whether two raw turns are the assistant's and only one is trained: merged, they would be neither."""
    return {ROLES[first[0]], ROLES[second[0]]} == set(ASSISTANT)


def reason_to_reject(turns, schema):
    """Return the first reason of the schema's rules that holds for the raw turns, or None."""
    rules = DOCUMENT_REJECTIONS if schema == "text" else REJECTIONS
    return next((reason for reason, holds in rules if holds(turns)), None)


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
        role, text = ROLES.get(role, role), content.strip()
        if text != content:
            changes.append("white space trimmed")
        if role == "system" and not text:
            changes.append("empty system turn left out")
        elif role in ASSISTANT and (not repaired or repaired[-1][0] == "system"):
            changes.append("assistant turn before the first user turn left out")
        elif repaired and repaired[-1][0] == role:
            repaired[-1] = (role, f"{repaired[-1][1]}\n\n{text}")
            changes.append("two turns of one role merged")
        else:
            repaired.append((role, text))
    if repaired and repaired[-1][0] == "user":
        repaired.pop()
        changes.append("unanswered last user turn left out")
    if any(role == MASKED for role, _ in repaired):
        changes.append('assistant turn with "train": false masked')
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
