"""From the rows of a source to conversations: reading files and hub data, each schema, each row's fate.

A row becomes a list of (role, content) that alternates from user to assistant, after at most one system turn, or it is
rejected with a reason. Used by prepare_data.py.
"""

import json
import sys

import datasets
import numpy as np

# ==== What is known ====

SCHEMAS = {  # schema -> (the columns it needs, what makes (role, content) pairs of a row)
    "messages": (("messages",), lambda row: [(turn["role"], turn["content"]) for turn in row["messages"]]),
    "conversations": (("conversations",), lambda row: [(turn["from"], turn["value"]) for turn in row["conversations"]]),
    "query/response": (("query", "response"), lambda row: [("user", row["query"]), ("assistant", row["response"])]),
    "prompt/response": (("prompt", "response"), lambda row: [("user", row["prompt"]), ("assistant", row["response"])]),
}
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
ROLES |= {"chatgpt": "assistant", "bing": "assistant", "bard": "assistant", "model": "assistant"}
TOOL_ROLES = ("tool", "function", "ipython", "function_call", "function_response", "observation", "tool_call")


# ==== Reading ====


class JsonRows:
    """Random access to the rows of a JSONL file or a JSON array, by byte offsets; the file is read in a stream."""

    def __init__(self, path, spool):
        self.is_array = path.suffix != ".jsonl"
        if not self.is_array:
            self.file = path.open("rb")
        else:
            self.file = spool.open("w+b")
            for record in json_array(path):
                self.file.write(record + b"\n")
            self.file.seek(0)
        spans, end = [], 0
        for line in self.file:
            begin, end = end, end + len(line)
            if line.strip():
                spans.append((begin, end))
        self.spans = np.array(spans, np.int64)

    def __len__(self):
        return len(self.spans)

    def __getitem__(self, number):
        begin, end = self.spans[number].tolist()
        self.file.seek(begin)
        try:
            return json.loads(self.file.read(end - begin))
        except (ValueError, RecursionError):  # JSONDecodeError and UnicodeDecodeError are ValueErrors
            # Of an array only the end can be unreadable: json_array stops there.
            raise ValueError("truncated file" if self.is_array else "row is not valid JSON") from None


def json_array(path, chunk=1 << 20):
    """Yield each element of the JSON array in the file `path` as one line of bytes, holding one element at a time.

    Where it cannot be decoded (mostly a cut-off end) it stops, warns, and yields the rest's start as it stands, so
    that it is counted as a row of a truncated file.
    Raises: SystemExit if the file does not begin an array.
    """
    decoder, buffer, rows = json.JSONDecoder(), "", 0
    with path.open(encoding="utf-8", errors="surrogateescape") as file:
        buffer = file.read(chunk).lstrip("\ufeff \t\r\n")
        if not buffer.startswith("["):
            raise SystemExit(
                f"{path}: expected a JSON array of rows, found {buffer[:20]!r}. Name a .jsonl file as such."
            )
        buffer, more = buffer[1:], True
        while True:
            buffer = buffer.lstrip(", \t\r\n")
            try:
                value, end = decoder.raw_decode(buffer)
                complete = end < len(buffer) or not more  # a number at the buffer's end may go on
            except (ValueError, RecursionError):
                complete = False
            if complete:
                yield json.dumps(value).encode()
                rows += 1
                buffer = buffer[end:]
            elif more and not buffer.startswith("]"):
                more = file.read(max(chunk, len(buffer)))  # doubling: a huge row is not decoded again for every chunk
                buffer += more
            else:
                break
    if not buffer.startswith("]"):
        print(
            f"WARNING: {path} is cut off or invalid after {rows:,} rows: its last {len(buffer):,} characters are left "
            "out. Get the whole file again if you need them.",
            file=sys.stderr,
        )
        yield buffer.replace("\n", " ").encode("utf-8", "surrogateescape")[:1000]


def open_source(source, folder, spool):
    """Return the rows of a source: an object with a length and random access by row number.

    Raises: SystemExit if the file, the hub or a column is missing.
    """
    where = source.get("path") or source["hub"]
    if "path" in source:
        path = folder / source["path"]
        if not path.is_file():
            raise SystemExit(f"{source['name']}: no file {path}. Put it there or change the source's path.")
        if path.suffix in (".json", ".jsonl"):
            return JsonRows(path, spool)
        if path.suffix != ".parquet":
            raise SystemExit(f"{source['name']}: {path} is no .jsonl, .json or .parquet file.")
        arguments = {"path": "parquet", "data_files": str(path), "split": "train"}
    else:
        arguments = {"path": source["hub"], "name": source.get("config"), "split": source.get("split", "train")}
        arguments["revision"] = source.get("revision")
    try:
        rows = datasets.load_dataset(**arguments)
    except Exception as error:  # the hub client, datasets and pyarrow each raise their own
        raise SystemExit(
            f"{source['name']}: {where} cannot be read ({type(error).__name__}: {str(error)[:200]}). Check the network "
            'and the name, or download it and give its "path".'
        ) from None
    columns = SCHEMAS[source["schema"]][0]
    if missing := [column for column in columns if column not in rows.column_names]:
        raise SystemExit(
            f"{source['name']}: {where} has no column {missing[0]}; it has {', '.join(rows.column_names)}."
        )
    return rows.select_columns(list(columns))


def read_turns(rows, number, schema):
    """Return (raw turns of row `number`, None), or ([], reason) if the row cannot be read."""
    try:
        row = rows[number]
    except ValueError as error:
        return [], str(error)
    try:
        return SCHEMAS[schema][1](row), None
    except (KeyError, TypeError):
        return [], "no turns in the schema's columns"


# ==== The fate of a row ====


def utf8(text):
    """Return whether `text` can be written as UTF-8, which a lone surrogate cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


REJECTIONS = [  # (reason, predicate of the raw turns); the first that holds is the row's fate
    ("no turns", lambda turns: not turns),
    ("content is not text", lambda turns: not all(isinstance(content, str) for _, content in turns)),
    ("role is not text", lambda turns: not all(isinstance(role, str) for role, _ in turns)),
    ("tool turn", lambda turns: any(role in TOOL_ROLES for role, _ in turns)),
    ("unknown role", lambda turns: not all(role in ROLES for role, _ in turns)),
    ("text is not valid Unicode", lambda turns: not all(utf8(content) for _, content in turns)),
    ("system turn in the middle", lambda turns: any(ROLES[role] == "system" for role, _ in turns[1:])),
    ("empty user turn", lambda turns: any(ROLES[role] == "user" and not text.strip() for role, text in turns)),
    ("empty assistant turn", lambda turns: any(ROLES[role] == "assistant" and not t.strip() for role, t in turns)),
    ("no assistant turn", lambda turns: not any(ROLES[role] == "assistant" for role, _ in turns)),
]


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
