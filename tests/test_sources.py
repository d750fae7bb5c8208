"""sources.py: a mixture and its refusals; rows from JSONL, JSON and Parquet files; damaged files.

Run it alone: bash tests/run.sh tests/test_sources.py
"""

import json
import os
import re

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import chat, full_disk, source

from sft.data import sources

ROWS = [chat(f"a{n}", "b") for n in range(20)]
ROW = {"name": "s", "path": "s.jsonl", "schema": "messages", "examples": "all"}


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def open_rows(folder, **fields):
    """Return the rows of a source, as prepare_data.py opens them."""
    return sources.find_source(source(**fields), folder)[0]()


# ---- The mixture ----


def test_a_source_has_defaults_and_attributes(tmp_path):
    (tmp_path / "mixture.json").write_text(json.dumps([ROW, ROW | {"name": "t", "examples": 5, "seed": 7}]))
    [first, second], folder = sources.read_mixture(str(tmp_path / "mixture.json"))
    assert folder == tmp_path and (first.seed, first.repeat, first.exclude, first.hub) == (42, 1, {}, None)
    assert first.identity_patterns is None and first.location == "s.jsonl" and first.examples == "all"
    assert (second.name, second.examples, second.seed) == ("t", 5, 7)
    assert source(hub="owner/name").location == "owner/name"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"schema": "alpaca"}, "it has the schema 'alpaca'; known are messages, conversations"),
        ({"shema": "messages"}, "it has the unknown key 'shema'; known are config, examples"),
        ({"examples": 0}, 'examples is 0; it must be a whole number of at least 1 or "all".'),
        ({"examples": True}, "examples is True"),
        ({"seed": -1}, "seed is -1; it must be a whole number of at least 0."),
        ({"repeat": 1.5}, "repeat is 1.5; it must be a whole number of at least 1."),
        ({"hub": "a/b"}, 'it needs either "path" or "hub"'),
        ({"path": 3}, "path is 3; it must be text"),
        ({"name": ""}, 'it needs a "name"'),
        ({"name": "\ud800"}, 'it needs a "name" of valid text'),
        ({"file": "x.json"}, '"file" is a file of a "hub" source'),
        ({"identity_patterns": "x"}, "identity_patterns is 'x'; it must be a list of regular expressions."),
        ({"identity_patterns": ["("]}, "identity_patterns: '(' isn't a valid RE2 expression"),
        ({"identity_patterns": ["x)|(?P<b>y"]}, "'x)|(?P<b>y' isn't a valid RE2 expression"),
        ({"name": "s\n| forged"}, "its name must be one line of printable text"),
        ({"name": "\x1b[2Js"}, "its name must be one line of printable text"),
        ({"exclude": ["x"]}, "exclude is ['x']; it must be an object of column: [values]"),
    ],
)
def test_a_wrong_source_is_a_sentence(change, sentence):
    with pytest.raises(SystemExit, match=re.escape(sentence)) as error:
        sources.read_mixture([ROW | {"name": "first"}, ROW | change])
    assert str(error.value).startswith("Source 2 of the mixture (") and str(error.value).endswith(".")


def test_a_mixture_that_is_no_list_of_different_sources_is_a_sentence(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    for path in (tmp_path / "none.json", tmp_path / "thesis.txt"):
        with pytest.raises(SystemExit, match=r"mixture file .* cannot be read"):
            sources.read_mixture(str(path))
    for mixture in ([], {}, ["s"]):
        with pytest.raises(SystemExit, match="A mixture must be a non-empty list of sources"):
            sources.read_mixture(mixture)
    with pytest.raises(SystemExit, match="Two sources of the mixture have the name 's'"):
        sources.read_mixture([ROW, ROW])
    lacks_examples = {key: ROW[key] for key in ("name", "path", "schema")}
    with pytest.raises(SystemExit, match="missing 1 required keyword-only argument: 'examples'"):
        sources.read_mixture([lacks_examples])


# ---- Files ----


def test_wrong_files_are_a_sentence(tmp_path):
    (tmp_path / "object.json").write_text('{"a": 1}')
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "text.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 not really")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "unreadable.jsonl").symlink_to("/proc/self/mem")
    for path, sentence in [
        ("none.jsonl", "no file"),
        ("x" * 300 + ".jsonl", "no file"),
        ("unreadable.jsonl", "s: unreadable.jsonl cannot be read (OSError: [Errno 5] Input/output error). Check that"),
        ("object.json", "expected a JSON array of rows, found '{\"a\": 1}'"),
        ("text.parquet", "has no column messages; it has text"),
        ("broken.parquet", "not a parquet file). Check that the file is whole and that you may read it."),
        ("notes.md", "isn't a .jsonl, .json, .parquet or .txt file"),
    ]:
        with pytest.raises(SystemExit, match=re.escape(sentence)):
            open_rows(tmp_path, path=path)


def test_parquet_with_odd_names_broken_text_and_dates_is_read_and_its_rows_are_rejected(tmp_path):
    texts = pa.array([b"ok", b"\xff", b"ok"], pa.binary()).view(pa.string())
    dates = pa.array([1, 1, 2**31 - 1], pa.date32())
    pq.write_table(pa.table({"query": texts, "response": dates}), tmp_path / "it's [0-9]*.parquet")
    rows = open_rows(tmp_path, path="it's [0-9]*.parquet", schema="query/response")
    reasons = [unreadable and unreadable[0] for _, unreadable in rows.take([0, 1, 2])]
    assert reasons == [None, "row is not valid UTF-8", "row has a value out of range"]


def test_the_paragraphs_of_a_text_file_are_rows_and_one_that_is_not_utf8_is_alone_unreadable(tmp_path):
    (tmp_path / "s.txt").write_bytes(b"\xef\xbb\xbfOne\r\nline two\n\n \t\n\nTwo \xff\r\n\r\n\xc3\xa4 three")
    rows = open_rows(tmp_path, path="s.txt", schema="text")
    one, two, three = rows.take([0, 1, 2])
    assert one == ({"text": "One\nline two\n"}, None) and three == ({"text": "ä three"}, None) and len(rows) == 3
    assert two == (None, ("row is not valid UTF-8", "", "Two \ufffd\r\n"))
    with pytest.raises(SystemExit, match=r"no row of .* has 'kind', a column of its"):
        open_rows(tmp_path, path="s.txt", schema="text", exclude={"kind": ["x"]})


def test_a_column_to_exclude_by_that_no_row_has_is_refused(tmp_path):
    rows = [row | ({"sauce": "x"} if number == 19 else {}) for number, row in enumerate(ROWS)]
    write_lines(tmp_path / "s.jsonl", rows)
    with pytest.raises(SystemExit, match="has 'source', a column of its \"exclude\""):
        open_rows(tmp_path, exclude={"source": ["x"]})
    assert len(open_rows(tmp_path, exclude={"sauce": ["x"]})) == 20


def test_a_file_that_fails_while_it_is_read_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("{}\n")
    rows = sources.FileRows(path)
    os.close(rows.file.fileno())
    with pytest.raises(SystemExit, match=r"rows.jsonl cannot be read at byte 0 \(\[Errno 9\] Bad file descriptor\)"):
        rows.take([0])


def test_a_full_cache_of_the_hub_gets_no_advice_on_the_network(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    pq.write_table(
        pa.table({"query": [os.urandom(1000).hex()] * 9000, "response": ["r"] * 9000}), tmp_path / "a.parquet"
    )
    says = r"s: a.parquet cannot be read .*too large.*\. Free disk space: the hub's"
    with full_disk(1_000_000), pytest.raises(SystemExit, match=says):
        sources.find_source(source(path="a.parquet", schema="query/response"), tmp_path)


# ---- JSON arrays ----

NESTED = [{"a": "x" * n, "b": [n, {"c": "]},"}]} for n in range(50)] + [7, 1234567, "é\u2028\\", None]


def elements(path, chunk=64):
    """Return (the bytes of each element that array_spans finds in the file, the Damage or None)."""
    data, (spans, damage) = path.read_bytes(), sources.array_spans(path, chunk)
    return [data[begin:end] for begin, end in zip(spans[::2], spans[1::2], strict=True)], damage


@pytest.mark.parametrize("ascii", [True, False])
def test_json_arrays_are_read_in_a_stream_whatever_the_chunk(tmp_path, ascii):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(NESTED, ensure_ascii=ascii, indent=1))
    for chunk in (1, 2, 7, 1000, 1 << 20):
        whole, damage = elements(path, chunk)
        assert [json.loads(element) for element in whole] == NESTED and not damage


def test_json_arrays_that_are_cut_off_keep_what_is_whole(tmp_path, capsys):
    path, data = tmp_path / "rows.json", json.dumps(NESTED[:50]).encode()
    for size in range(len(data) - 200, len(data)):
        path.write_bytes(data[:size])
        whole, damage = elements(path)
        whole = [json.loads(element) for element in whole]
        assert whole == NESTED[: len(whole)] and len(whole) > 46
        assert damage.reason == "truncated file" and damage.row == len(whole)
        assert damage.begin + damage.bytes == size
    rows = sources.FileRows(path)
    assert len(rows) == damage.row + 1 and rows.damage == damage
    warning = f"rows.json: from row {damage.row} on, {damage.bytes} bytes are not read (truncated file, byte {size}: "
    assert warning in capsys.readouterr().err


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda row: row.replace(b'"c":', b'"c"!', 1), "Expecting ':' delimiter"),
        (lambda row: row[:-1], "Expecting property name enclosed in double quotes"),
        (lambda row: row.replace(b'"', b"", 1), "Expecting property name enclosed in double quotes"),
        (lambda row: row.replace(b"x", b'x"', 1), "Expecting ',' delimiter"),
        (lambda row: row.replace(b"x", b"\n", 1), "Invalid control character at"),
        (lambda row: row.replace(b"x", b"\\x", 1), "Invalid \\escape"),
        (lambda row: row.replace(b"[", b"[" * 5000, 1), "recursion"),
        (lambda row: row.replace(b"[", b"[%b, " % (b"9" * 5000), 1), "Exceeds the limit"),
        (lambda row: row + b"]", "text after the end of the array"),
        (lambda row: row[:-2], "Expecting ',' delimiter"),
    ],
)
def test_damage_in_a_json_array_costs_its_row_and_what_is_behind(tmp_path, capsys, damage, says):
    path, lines = tmp_path / "rows.json", [json.dumps(row).encode() for row in NESTED[:50]]
    lines[7] = damage(lines[7])
    path.write_bytes(b"[" + b", ".join(lines) + b"]")
    size, number = path.stat().st_size, 7 + (says == "text after the end of the array")
    ends_inside = lines[7].endswith(b'"}')  # a lost bracket takes in all rows behind it, and then the file ends
    reason = "truncated file" if ends_inside else "row is not valid JSON"
    for chunk in (64, 1 << 18):
        whole, lost = elements(path, chunk)
        assert lost.row == number and lost.reason == reason
        assert says in lost.detail
        byte = int(lost.detail.removeprefix("byte ").partition(":")[0])
        assert path.read_bytes().index(lines[7]) <= byte
        assert [json.loads(element) for element in whole] == NESTED[:number]
        assert lost.begin + lost.bytes == size
    rows = sources.FileRows(path)
    assert f"from row {number} on, {lost.bytes:,} bytes are not read" in capsys.readouterr().err
    start = path.read_bytes()[lost.begin :][:80].decode()
    assert rows.take([number]) == [(None, (lost.reason, lost.detail, start))]
    assert len(rows) == number + 1


def test_damage_in_a_json_array_is_not_read_to_the_files_end(tmp_path, monkeypatch):
    """The rest is lost: this is reported, and it is neither kept in memory nor read for that."""
    monkeypatch.setattr(sources, "LONGEST_ROW", 10_000)
    path = tmp_path / "rows.json"
    sizes, pread = [], os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, begin: sizes.append(size) or pread(file, size, begin))
    for damage, reason in (("{!", "row is not valid JSON"), ('{"a": "', "longer than a million characters")):
        path.write_text('[{"a": 1}, ' + damage + "x" * 1_000_000)
        rows = sources.FileRows(path)
        assert len(rows) == 2
        [(row, (reported, _, start))] = rows.take([1])
        assert row is None and reported == reason and start.startswith(damage)
    assert sizes == [80, 80]
