"""The sources of a mixture, and where their rows come from: JSONL, JSON, text and Parquet files, and the hub.

Used by prepare_data.py.
"""

import dataclasses
import glob
import io
import json
import os
import re
import sys
from array import array
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sft import system
from sft.data import conversations, hub
from sft.text import one_line

# ==== A mixture ====

TEXT_FIELDS = ("path", "hub", "file", "config", "revision", "split")
AT_LEAST = {"examples": 1, "seed": 0, "repeat": 1}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """One source of the mixture; the fields are explained at MIXTURE in prepare_data.py.

    Raises: TypeError for a missing or unknown field, ValueError for a value that no source can have.
    """

    name: str
    schema: str
    examples: int | str
    path: str | None = None
    hub: str | None = None
    file: str | None = None
    config: str | None = None
    revision: str | None = None
    split: str | None = None
    seed: int = 42
    repeat: int = 1
    exclude: dict = dataclasses.field(default_factory=dict)
    identity_patterns: list | None = None

    def __post_init__(self):
        if not isinstance(self.name, str) or not self.name or not conversations.is_utf8(self.name):
            raise ValueError('it needs a "name" of valid text')
        if self.name != one_line(self.name):
            raise ValueError("its name must be one line of printable text, with single spaces")
        if (self.path is None) == (self.hub is None):
            raise ValueError('it needs either "path" or "hub"')
        for field in TEXT_FIELDS:
            value = getattr(self, field)
            if value is not None and not isinstance(value, str):
                raise ValueError(f"{field} is {value!r}; it must be text")
        if self.file is not None and (self.hub is None or self.config or self.split):
            raise ValueError('"file" is a file of a "hub" source and needs no "config" or "split"')
        if not isinstance(self.schema, str) or self.schema not in conversations.SCHEMAS:
            raise ValueError(f"it has the schema {self.schema!r}; known are {', '.join(conversations.SCHEMAS)}")
        if not isinstance(self.exclude, dict) or not all(isinstance(v, list) for v in self.exclude.values()):
            raise ValueError(f"exclude is {self.exclude!r}; it must be an object of column: [values]")
        if self.identity_patterns is not None:
            check_patterns(self.identity_patterns, "identity_patterns")
        for field, least in AT_LEAST.items():
            value = getattr(self, field)
            if field == "examples" and value == "all":
                continue
            if type(value) is not int or value < least:  # a bool is an int
                either = ' or "all"' if field == "examples" else ""
                raise ValueError(f"{field} is {value!r}; it must be a whole number of at least {least}{either}")

    @property
    def location(self):
        """The path of its file or the name of its hub data set, as given in the mixture."""
        return self.hub if self.path is None else self.path


def read_mixture(mixture):
    """Return (list of Source, folder their paths are relative to). mixture: list of dicts, or a JSON file's path.

    Raises: SystemExit with the source and the field that is wrong.
    """
    folder = Path()
    if isinstance(mixture, str):
        path = Path(mixture)
        folder = path.parent
        try:
            mixture = json.loads(path.read_text(encoding="utf-8"))
        except system.JSON_ERRORS as error:
            raise SystemExit(f"The mixture file {path} cannot be read ({error}). Correct it or --mixture.") from None
    if not isinstance(mixture, list) or not mixture or not all(isinstance(row, dict) for row in mixture):
        raise SystemExit(
            "A mixture must be a non-empty list of sources, each an object with name, path or hub, schema, "
            "examples. Correct --mixture."
        )
    known = [field.name for field in dataclasses.fields(Source)]
    sources = []
    for number, row in enumerate(mixture, start=1):
        try:
            unknown = sorted(set(row) - set(known))
            if unknown:
                raise ValueError(f"it has the unknown key {unknown[0]!r}; known are {', '.join(sorted(known))}")
            sources.append(Source(**row))
        except (TypeError, ValueError) as error:
            problem = str(error).removeprefix("Source.__init__() ")
            raise SystemExit(f"Source {number} of the mixture ({row.get('name')!r}): {problem}. Correct it.") from None
    for name, count in Counter(source.name for source in sources).items():
        if count > 1:
            raise SystemExit(f"Two sources of the mixture have the name {name!r}. Rename one.")
    return sources, folder


def check_patterns(patterns, name):
    """Raise ValueError unless `patterns` is a list of regular expressions of RE2. name: of the setting."""
    if not isinstance(patterns, list | tuple):
        raise ValueError(f"{name} is {patterns!r}; it must be a list of regular expressions")
    for pattern in patterns:
        if not isinstance(pattern, str) or not conversations.is_utf8(pattern):
            raise ValueError(f"{name} is {patterns!r}; it must be a list of regular expressions")
        try:
            # Both, as workers.reject_identities compiles them: 'x)|(?P<b>y' is whole only inside the other's brackets.
            pc.match_substring_regex(pa.array([""]), pattern, ignore_case=True)
            pc.extract_regex(pa.array([""]), f"(?i)(?P<match>{pattern})")  # refuses plain groups, too: write (?:...)
        except pa.ArrowInvalid as error:
            raise ValueError(f"{name}: {pattern!r} isn't a valid RE2 expression ({error})") from None


# ==== Rows of a file ====

DECODER, SEPARATORS = json.JSONDecoder(), re.compile(r"[, \t\r\n]*")
UNFINISHED = re.compile(r"[-+.\\\w]*")  # the text from an error to its end, if more text could mend the error
LONGEST_ROW = 16 << 20  # characters in a JSON array; without a bound, a lost bracket would take in the whole file


@dataclasses.dataclass
class Damage:
    """The part of a JSON array that cannot be read: from one of its rows to the end of the file."""

    row: int  # number of the first row that is lost
    begin: int  # its first byte
    bytes: int  # from there to the end of the file
    reason: str  # for rejected.jsonl
    detail: str  # the byte of the error and what is wrong there

    def __str__(self):
        return f"from row {self.row} on, {self.bytes:,} bytes are not read ({self.reason}, {self.detail})"


class FileRows:
    """Random access to the rows of a file, by byte offsets; any process may read at any time.

    They are the lines of a JSONL file, the elements of a JSON array or, as {"text": ...}, a text file's paragraphs.
    damage: the Damage of a JSON array, or None; the damaged part counts as one row, which cannot be read.
    """

    def __init__(self, path):
        self.path, self.damage, self.parse = path, None, json.loads
        if path.suffix == ".jsonl":
            spans = line_spans(path)
        elif path.suffix == ".txt":
            spans, self.parse = paragraph_spans(path), paragraph_row
        else:
            spans, self.damage = array_spans(path)
        if self.damage:
            spans.extend((self.damage.begin, self.damage.begin + self.damage.bytes))
            print(f"WARNING: {path}: {self.damage}. Get the whole file again if you need them.", file=sys.stderr)
        self.spans = np.frombuffer(spans, np.int64).reshape(-1, 2)
        self.file = path.open("rb", buffering=0)

    def __len__(self):
        return len(self.spans)

    def take(self, numbers):
        """Return for each row number (the row, None) or (None, (reason, detail, first words)) if it cannot be read.

        Raises: SystemExit if the file cannot be read.
        """
        return [self.read(number) for number in numbers]

    def read(self, number):
        """Return one row as `take` does."""
        begin, end = self.spans[number].tolist()
        if self.damage and number == self.damage.row:
            start = self.read_bytes(begin, min(80, end - begin))
            return None, (self.damage.reason, self.damage.detail, start.decode("utf-8", "replace"))
        data = self.read_bytes(begin, end - begin)
        try:
            return self.parse(data.decode()), None
        except UnicodeDecodeError:
            reason = "row is not valid UTF-8"
        except system.JSON_ERRORS:
            reason = "row is not valid JSON"
        return None, (reason, "", data[:80].decode("utf-8", "replace"))

    def read_bytes(self, begin, size):
        """Return `size` bytes of the file. Raises: SystemExit if they cannot be read."""
        try:
            return os.pread(self.file.fileno(), size, begin)  # no file position: forked processes would share it
        except OSError as error:
            raise SystemExit(f"{self.path} cannot be read at byte {begin:,} ({error}). Check its disk.") from None


class ArrowRows:
    """Random access to the rows of a `datasets.Dataset`, which lies memory-mapped on the disk."""

    damage = None  # a damaged Parquet file is not opened at all

    def __init__(self, dataset):
        self.dataset = dataset.with_format("arrow")

    def __len__(self):
        return len(self.dataset)

    def take(self, numbers):
        """Return for each row number (the row, None) or (None, (reason, "", "")) if it cannot be read."""
        try:
            return [(row, None) for row in self.dataset[numbers].to_pylist()]
        except (ValueError, OverflowError) as error:  # what reads Parquet checks neither text nor dates
            if len(numbers) > 1:
                return [self.take([number])[0] for number in numbers]
            not_utf8 = isinstance(error, UnicodeDecodeError)
            return [(None, ("row is not valid UTF-8" if not_utf8 else "row has a value out of range", "", ""))]


def line_spans(path):
    """Return where the lines of the file `path` that hold something lie: begin and end of each, in bytes."""
    spans, end = array("q"), 0
    with path.open("rb") as file:
        for line in file:
            begin, end = end, end + len(line)
            if line.strip():
                spans.extend((begin, end))
    return spans


def paragraph_spans(path):
    """Return where the paragraphs of the file `path` lie, which blank lines part: begin and end of each, in bytes."""
    spans, end, inside = array("q"), 0, False
    with path.open("rb") as file:
        for line in file:
            begin, end = end, end + len(line)
            if not line.strip():
                inside = False
            elif inside:
                spans[-1] = end
            else:
                spans.extend((begin, end))
                inside = True
    return spans


def paragraph_row(text):
    """Return the row of a paragraph, without what an editor adds: a byte order mark in front, Windows's line ends."""
    return {"text": text.removeprefix("\ufeff").replace("\r\n", "\n")}


def array_spans(path, chunk=1 << 18):
    """Find the elements of the JSON array in the file `path`, which is read in a stream, `chunk` characters at a time.

    Returns: (begin and end of each element in bytes, Damage or None). What comes before damage is kept; nothing after
    it is read. Raises: SystemExit if there is no array.
    """
    spans, byte = array("q"), array_start(path)
    with path.open("rb") as raw:
        raw.seek(byte)
        file = io.TextIOWrapper(raw, encoding="utf-8", errors="surrogateescape", newline="")
        text, index, at_end = "", 0, False  # text[index] is the file's `byte`
        while True:
            begin = SEPARATORS.match(text, index).end()
            end, error, open_ended = decode_element(text, begin)
            if open_ended and not at_end and len(text) - index < LONGEST_ROW:
                text, index = text[index:], 0
                more = file.read(max(chunk, len(text)))  # doubling: a huge row is not decoded again for every chunk
                text, at_end = text + more, not more
                continue
            first = byte + size_in_bytes(text[index:begin])
            if error:
                break
            index, byte = end, first + size_in_bytes(text[begin:end])
            spans.extend((first, byte))
        if text.startswith("]", begin):
            if not (text[begin + 1 :] + file.read(chunk)).strip():
                return spans, None
            end, error = begin + 1, "text after the end of the array"
    reason = "row is not valid JSON"
    if open_ended:
        reason = "truncated file" if at_end else "longer than a million characters"
    detail = f"byte {first + size_in_bytes(text[begin:end])}: {error}"
    return spans, Damage(len(spans) // 2, first, path.stat().st_size - first, reason, detail)


def array_start(path):
    """Return the byte after the "[" of the JSON array in the file `path`. Raises: SystemExit if there is none."""
    with path.open("rb") as file:
        head = file.read(1 << 16)
    opening = re.match(rb"(?:\xef\xbb\xbf)?[ \t\r\n]*\[", head)
    if not opening:
        raise SystemExit(
            f"{path}: expected a JSON array of rows, found {head[:20].decode('utf-8', 'replace')!r}. Name a .jsonl "
            "file as such."
        )
    return opening.end()


def decode_element(text, begin):
    """Try to decode the JSON value that begins at the index `begin` of `text`.

    Returns: (index of its end or of the error, the error's message or None, whether more text could change that).
    """
    try:
        end = DECODER.raw_decode(text, begin)[1]
    except json.JSONDecodeError as error:
        open_ended = error.msg.startswith("Unterminated") or bool(UNFINISHED.fullmatch(text, error.pos))
        return error.pos, error.msg, open_ended
    except system.JSON_ERRORS as error:  # a number of over 4,300 digits, a thousand brackets
        return begin, str(error), False
    return end, None, end == len(text)  # a number may continue


def size_in_bytes(text):
    """Return how many bytes of UTF-8 `text` was read from."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogateescape"))


# ==== Where a source is ====


def find_source(source, folder):
    """Find the file or hub data of a Source without reading its rows; relative paths start from `folder`.

    Returns: (a function that opens the rows, an object with a length, `take` and `damage`; the fingerprint, a dict that
    differs when the rows do, with the hub's commit, or None, under "revision").
    Raises: SystemExit if the file, the hub or a column is missing.
    """
    file = source.path if source.hub is None else source.file
    if file is not None and Path(file).suffix not in (".jsonl", ".json", ".parquet", ".txt"):
        raise SystemExit(f"{source.name}: {file} isn't a .jsonl, .json, .parquet or .txt file. Convert it to one.")
    if source.hub is not None:
        found, commit = hub.fetch(source)  # one file as it lies there: `datasets` would hold a JSON array in memory
        fingerprint = {"revision": commit}
    else:
        found = folder / source.path
        if not os.path.isfile(found):  # Path.is_file raises for a name that is too long
            raise SystemExit(f"{source.name}: no file {found}. Put it there or change the source's path.")
        fingerprint = {"bytes": found.stat().st_size, "modified": found.stat().st_mtime_ns, "revision": None}
    if file is not None and found.suffix != ".parquet":
        return lambda: open_rows(source, found), fingerprint
    rows = with_columns(source, found if file is None else read_file(source, found, load_parquet))
    return lambda: ArrowRows(rows), fingerprint


def load_parquet(path):
    """Return the `datasets.Dataset` of a Parquet file."""
    return datasets.load_dataset("parquet", data_files=glob.escape(str(path)), split="train")


def open_rows(source, path):
    """Return the FileRows of a file. Raises: SystemExit if it cannot be read or lacks a column to exclude by."""
    rows = read_file(source, path, FileRows)
    missing = set(source.exclude)  # rows may lack it, but not all of them
    for number in range(len(rows)):
        if not missing:
            break
        row, _ = rows.read(number)
        if isinstance(row, dict):
            missing -= set(row)
    if missing:
        raise SystemExit(
            f'{source.name}: no row of {path} has {min(missing)!r}, a column of its "exclude". Correct that.'
        )
    return rows


def with_columns(source, rows):
    """Return the `datasets.Dataset` with only the source's columns. Raises: SystemExit if one is missing."""
    columns = [*conversations.SCHEMAS[source.schema][0], *source.exclude]
    for column in columns:
        if column not in rows.column_names:
            raise SystemExit(
                f"{source.name}: {source.location} has no column {column}; it has "
                f"{one_line(', '.join(rows.column_names))}. "
                "Correct the source's schema or exclude."
            )
    return rows.select_columns(columns)


def read_file(source, path, read):
    """Return read(path). Raises: SystemExit, with the source, the cause and the remedy, if it fails."""
    try:
        return read(path)
    except Exception as error:  # `datasets` and pyarrow each raise their own
        remedy, problem, _ = hub.diagnose(error)
    if source.hub is None and remedy is not hub.FREE_DISK:
        remedy = "Check that the file is whole and that you may read it."
    raise hub.refusal(source, problem, remedy)
