"""Where the rows of a source come from: JSONL, JSON and Parquet files, and the hub. Used by prepare_data.py."""

import errno
import glob
import io
import json
import os
import re
import sys
from array import array
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np

from sft.data import conversations

# ==== Reading ====

DECODER, BETWEEN = json.JSONDecoder(), re.compile(r"[, \t\r\n]*")
UNFINISHED = re.compile(r"[-+.\\\w]*")  # what may stand from an error to the text's end if more text would mend it
LONGEST_ROW = 16 << 20  # characters in a JSON array; without a bound, a lost bracket would take in the whole file
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of an OSError: the disk is full, or one's share of it


class JsonRows:
    """Random access to the rows of a JSONL file or a JSON array, by byte offsets; any process may read at any time."""

    def __init__(self, path):
        spans, self.broken = (line_spans(path), {}) if path.suffix == ".jsonl" else array_spans(path)
        self.spans, self.path = np.frombuffer(spans, np.int64).reshape(-1, 2), path
        self.file = path.open("rb", buffering=0)

    def __len__(self):
        return len(self.spans)

    def take(self, numbers):
        """Return for each row number (the row, None) or (None, (reason, what was found, first words)).

        Raises: SystemExit if the file cannot be read.
        """
        return [self.read(number, *self.spans[number].tolist()) for number in numbers]

    def read(self, number, begin, end):
        reason, found = self.broken.get(number, (None, ""))
        try:  # no file position: forked processes would share it
            data = os.pread(self.file.fileno(), min(80, end - begin) if reason else end - begin, begin)
        except OSError as error:
            raise SystemExit(f"{self.path} cannot be read at byte {begin:,} ({error}). Check its disk.") from None
        if not reason:
            try:
                return json.loads(data.decode()), None
            except UnicodeDecodeError:
                reason = "row is not valid UTF-8"
            except (ValueError, RecursionError):
                reason = "row is not valid JSON"
        return None, (reason, found, data[:80].decode("utf-8", "replace"))


class ArrowRows:
    """Random access to the rows of a `datasets.Dataset`, which lies memory-mapped on the disk."""

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
            text = isinstance(error, UnicodeDecodeError)
            return [(None, ("row is not valid UTF-8" if text else "row has a value out of range", "", ""))]


def line_spans(path):
    """Return where the lines of the file `path` that hold something lie: begin and end of each, in bytes."""
    spans, end = array("q"), 0
    with path.open("rb") as file:
        for line in file:
            begin, end = end, end + len(line)
            if line.strip():
                spans.extend((begin, end))
    return spans


def array_spans(path, chunk=1 << 18):
    """Find the elements of the JSON array in the file `path`, which is read in a stream.

    Returns: (begin and end of each in bytes, {number of one that cannot be decoded: (reason, what was found)}). What
    cannot be decoded counts as one row, up to where an object begins with the first row's first key or the file ends;
    this warns of it. Raises: SystemExit if there is no array.
    """
    with path.open("rb") as file:
        head = file.read(1 << 16)
    opening = re.match(rb"(?:\xef\xbb\xbf)?[ \t\r\n]*\[", head)
    if not opening:
        raise SystemExit(
            f"{path}: expected a JSON array of rows, found {head[:20].decode('utf-8', 'replace')!r}. Name a .jsonl "
            "file as such."
        )
    first = re.compile(rb'[ \t\r\n]*\{[ \t\r\n]*("(?:[^"\\]|\\.)*")').match(head, opening.end())
    start = first and re.compile(rb"\{[ \t\r\n]*" + re.escape(first[1]) + rb"[ \t\r\n]*:")
    spans, broken, position, size = array("q"), {}, opening.end(), path.stat().st_size
    while damage := read_elements(path, position, spans, chunk):
        begin, place, reason, message = damage
        position = (start and find_bytes(path, start, begin + 1)) or size
        if position < size and reason == "truncated file":
            reason = "row is not valid JSON"  # it goes on
        broken[len(spans) // 2] = reason, f"byte {place}: {message}"
        spans.extend((begin, position))
        if position == size:
            break
    if broken:
        lost = sum(spans[2 * row + 1] - spans[2 * row] for row in broken)
        number, (reason, found) = next(iter(broken.items()))
        print(
            f"WARNING: {path}: {lost:,} of its {size:,} bytes are no readable JSON and are left out. They count as "
            f"{len(broken):,} of its {len(spans) // 2:,} rows; the first is row {number} ({reason}, {found}). Get the "
            "whole file again if you need them.",
            file=sys.stderr,
        )
    return spans, broken


def read_elements(path, position, spans, chunk):
    """Add the elements of a JSON array to `spans`, from the byte `position` of the file `path` on.

    Returns: None at the array's end, or what cannot be decoded: (byte where it begins, byte of the error, reason, what
    the error says).
    """
    with path.open("rb") as raw:
        raw.seek(position)
        file = io.TextIOWrapper(raw, encoding="utf-8", errors="surrogateescape", newline="")
        buffer, place, more = "", 0, True  # `place` in the buffer is the byte `position` of the file
        while True:
            begin, error = BETWEEN.match(buffer, place).end(), None
            try:
                end = DECODER.raw_decode(buffer, begin)[1]
                open_ended = end == len(buffer)  # a number may go on
            except json.JSONDecodeError as caught:
                error, end = caught.msg, caught.pos
                open_ended = error.startswith("Unterminated") or bool(UNFINISHED.fullmatch(buffer, end))
            except (ValueError, RecursionError) as caught:  # a number of over 4,300 digits, a thousand brackets
                error, end, open_ended = str(caught), begin, False
            if open_ended and more and len(buffer) - place < LONGEST_ROW:
                buffer, place = buffer[place:], 0
                more = file.read(max(chunk, len(buffer)))  # doubling: a huge row is not decoded again for every chunk
                buffer += more
                continue
            first = position + size_in_bytes(buffer[place:begin])
            if not error:
                place, position = end, first + size_in_bytes(buffer[begin:end])
                spans.extend((first, position))
            elif not buffer.startswith("]", begin):
                reason = "row is not valid JSON"
                if open_ended:
                    reason = "truncated file" if not more else "longer than a million characters"
                return first, first + size_in_bytes(buffer[begin:end]), reason, error
            elif (buffer[begin + 1 :] + file.read(chunk)).strip():
                return first, first + 1, "row is not valid JSON", "text behind the array's end"
            else:
                return None


def find_bytes(path, pattern, position):
    """Return where `pattern` (a compiled expression) matches next in the file `path`, in bytes, or None."""
    with path.open("rb") as file:
        file.seek(position)
        data = b""
        while more := file.read(1 << 18):
            position, data = position - len(data[-1000:]), data[-1000:] + more  # a match may lie across two reads
            if found := pattern.search(data):
                return position + found.start()
            position += len(data)
    return None


def size_in_bytes(text):
    """Return how many bytes of UTF-8 `text` was read from."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogateescape"))


def find_source(source, folder):
    """Find the file or hub data of a source without reading its rows; relative paths start from `folder`.

    Returns: (a function that opens the rows, an object with a length and `take`; facts, a dict that differs when the
    rows do, with the hub's commit or files under "revision").
    Raises: SystemExit if the file, the hub or a column is missing.
    """
    columns = [*conversations.SCHEMAS[source["schema"]][0], *source.get("exclude", {})]
    revision = None
    if "path" in source:
        path = folder / source["path"]
        if not os.path.isfile(path):  # Path.is_file raises for a name that is too long
            raise SystemExit(f"{source['name']}: no file {path}. Put it there or change the source's path.")
    elif "file" in source:  # as it lies on the hub: `datasets` would hold a JSON array of 2 GB in memory
        asked = {"repo_id": source["hub"], "filename": source["file"], "revision": source.get("revision")}
        path = Path(fetch(source, lambda: huggingface_hub.hf_hub_download(**asked, repo_type="dataset")))
        revision = path.parents[len(Path(source["file"]).parts) - 1].name
    else:
        asked = {"name": source.get("config"), "split": source.get("split", "train")}
        asked["revision"] = source.get("revision")
        rows = with_columns(source, fetch(source, lambda: datasets.load_dataset(source["hub"], **asked)), columns)
        revision = sorted(rows.info.download_checksums or ())
        return lambda: ArrowRows(rows), {"rows": len(rows), "revision": revision}
    if path.suffix not in (".jsonl", ".json", ".parquet"):
        raise SystemExit(f"{source['name']}: {path} is no .jsonl, .json or .parquet file.")
    facts = {"bytes": path.stat().st_size, "modified": path.stat().st_mtime_ns, "revision": revision}
    if path.suffix != ".parquet":
        return lambda: json_rows(source, path), facts
    rows = fetch(source, lambda: datasets.load_dataset("parquet", data_files=glob.escape(str(path)), split="train"))
    rows = with_columns(source, rows, columns)
    return lambda: ArrowRows(rows), facts


def json_rows(source, path):
    """Return the JsonRows of a local file. Raises: SystemExit if it cannot be read or lacks a column to exclude by."""
    rows = fetch(source, lambda: JsonRows(path))
    missing = set(source.get("exclude", ()))  # rows may lack it, but not all of them
    for number in range(len(rows)):
        if not missing:
            break
        row, _ = rows.take([number])[0]
        missing -= set(row if isinstance(row, dict) else ())
    if missing:
        raise SystemExit(f'{source["name"]}: no row of {path} has {min(missing)!r}, a column of its "exclude".')
    return rows


def fetch(source, load):
    """Return load()'s result. Raises: SystemExit, with the source and the remedy, if it cannot be had."""
    try:
        return load()
    except Exception as error:  # the hub client, `datasets` and pyarrow each raise their own
        chain = [error]
        while chain[-1].__cause__:
            chain.append(chain[-1].__cause__)
        full = next((e for e in chain if getattr(e, "errno", None) in FULL or "enough disk space" in str(e)), None)
        if full:
            remedy = f"Free disk space: the hub's cache {huggingface_hub.constants.HF_HOME} (HF_HOME) takes a copy."
        elif "path" in source:
            remedy = "Check that the file is whole and that you may read it."
        else:
            remedy = 'Check the network and the name, or download it and give its "path".'
        where, told = source.get("path") or source["hub"], full or (error if "hub" in source else chain[-1])
        raise SystemExit(
            f"{source['name']}: {where} cannot be read ({type(told).__name__}: {str(told)[:200]}). {remedy}"
        ) from None


def with_columns(source, rows, columns):
    """Return the `datasets.Dataset` with only `columns`. Raises: SystemExit if one is missing."""
    if missing := [column for column in columns if column not in rows.column_names]:
        where = source.get("path") or source["hub"]
        raise SystemExit(
            f"{source['name']}: {where} has no column {missing[0]}; it has {', '.join(rows.column_names)}."
        )
    return rows.select_columns(columns)
