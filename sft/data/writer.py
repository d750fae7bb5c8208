"""The files of a prepared folder: each source's sequences, what it rejected, and what was already kept.

A source has its own files, so that a killed run keeps the finished ones. Used by prepare_data.py.
"""

import hashlib
import json
from collections import Counter

import datasets
import numpy as np
import pyarrow as pa

from sft import system

HISTOGRAM_BINS = 32  # of sequence lengths, from 0 to MAX_SEQ_LEN

# ==== One source ====


def source_files(folder, index):
    """Return the Paths of what the source `index` of the mixture adds to the unfinished `folder`."""
    return {
        "train": folder / "data" / "train" / f"data-{index:05}.arrow",
        "validation": folder / "data" / "validation" / f"data-{index:05}.arrow",
        "rejected": folder / "progress" / f"{index:05}.jsonl",
        "keys": folder / "progress" / f"{index:05}.npz",
        "done": folder / "progress" / f"{index:05}.json",  # written last: without it the others do not count
    }


def mark_done(paths, inputs, line):
    """Write the file that says the source is finished. inputs: digest of what it depends on; line: for the report."""
    sizes = {name: path.stat().st_size for name, path in paths.items() if name != "done"}
    system.write_whole(paths["done"], json.dumps({"inputs": inputs, "bytes": sizes, "line": line}))


def finished_line(paths, inputs):
    """Return the report's line of a source that an earlier run finished from the same inputs, or None."""
    try:
        done = json.loads(paths["done"].read_text(encoding="utf-8"))
        whole = all(paths[name].stat().st_size == size for name, size in done["bytes"].items())
        return done["line"] if whole and done["inputs"] == inputs else None
    except (*system.JSON_ERRORS, KeyError):
        return None


class SequencesDigest:
    """One SHA-256 over the lengths (int32), the ids and the masks of sequences, however they are cut into batches."""

    def __init__(self):
        self.hashes = [hashlib.sha256() for _ in range(3)]

    def update(self, lengths, ids, mask):
        """Add sequences that lie end to end. lengths: int32 [sequences]; ids, mask: [tokens]."""
        for digest, column in zip(self.hashes, (lengths, ids, mask), strict=True):
            digest.update(column)

    def hexdigest(self):
        return digest_of_digests(part.hexdigest() for part in self.hashes)


def digest_of_digests(digests):
    """Return the SHA-256 over digests in hexadecimal, in order: 64 hex digits."""
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def file_digest(path):
    """Return what `SplitWriter.close` returned for the Arrow stream `path`. It holds one batch in memory at a time.

    Raises: OSError or ValueError (pyarrow's) if it cannot be read.
    """
    digest = SequencesDigest()
    with pa.OSFile(str(path)) as file, pa.ipc.open_stream(file) as stream:
        for batch in stream:
            ids, masks = batch.column("input_ids"), batch.column("assistant_masks")
            if not ids.offsets.equals(masks.offsets):
                raise ValueError("a sequence has another number of ids than of mask values")
            lengths = np.diff(ids.offsets.to_numpy()).astype(np.int32)
            digest.update(lengths, ids.flatten().to_numpy(), masks.flatten().to_numpy(zero_copy_only=False))
    return digest.hexdigest()


class SplitWriter:
    """What one source gives to one split, on its way to the disk: an Arrow stream, its digest and its counts."""

    def __init__(self, path, source_name, repeat, id_type, max_seq_len):
        self.path, self.source_name, self.repeat = path, source_name, repeat
        self.schema = pa.schema(
            {
                "input_ids": pa.list_(pa.from_numpy_dtype(id_type)),
                "assistant_masks": pa.list_(pa.bool_()),
                "source": pa.string(),
            }
        )
        self.stream = pa.ipc.new_stream(str(path), self.schema)
        self.digest = SequencesDigest()
        self.counts = Counter(sequences=0, tokens=0, trainable_tokens=0)
        self.edges = np.linspace(0, max_seq_len, HISTOGRAM_BINS + 1)
        self.histogram = np.zeros(HISTOGRAM_BINS, np.int64)

    def write(self, lengths, ids, mask):
        """Append concatenated sequences, `repeat` times. lengths: int32 [sequences]; ids, mask: [tokens]."""
        if not len(lengths):
            return
        offsets = pa.array(np.cumsum([0, *lengths], dtype=np.int32))
        lists = [pa.ListArray.from_arrays(offsets, pa.array(column)) for column in (ids, mask)]
        table = pa.table([*lists, pa.array([self.source_name] * len(lengths))], schema=self.schema)
        for _ in range(self.repeat):
            self.stream.write_table(table)
            self.digest.update(lengths, ids, mask)
        self.counts["sequences"] += len(lengths) * self.repeat
        self.counts["tokens"] += len(ids) * self.repeat
        self.counts["trainable_tokens"] += int(mask.sum()) * self.repeat
        self.histogram += np.histogram(lengths, self.edges)[0] * self.repeat

    def close(self):
        """Put the stream on the disk; return the SequencesDigest of what it holds, 64 hex digits."""
        self.stream.close()
        system.durable(self.path)
        return self.digest.hexdigest()


class SeenKeys:
    """The keys of all conversations kept so far and the rows they came from; about 150 bytes each."""

    def __init__(self, names):
        self.names = names  # of the mixture's sources
        self.codes = {}  # key -> source's index and row in one number

    def find(self, key):
        """Return the source and row of the conversation with this key, as text, or None."""
        code = self.codes.get(key)
        return None if code is None else f"{self.names[code >> 40]} row {code % (1 << 40)}"

    def add(self, key, index, row):
        """Remember the row `row` of the source `index` of the mixture."""
        self.codes[key] = index << 40 | row

    def save(self, path, index):
        """Write the keys of the source `index`."""
        codes = {key: code for key, code in self.codes.items() if code >> 40 == index}
        keys = np.frombuffer(b"".join(codes), np.uint8).reshape(-1, 16)
        np.savez(path, keys=keys, codes=np.array(list(codes.values()), np.int64))

    def load(self, path):
        """Add what `save` wrote."""
        with np.load(path) as stored:
            self.codes.update(zip(map(bytes, stored["keys"]), stored["codes"].tolist(), strict=True))


# ==== The folder ====


def write_dataset_metadata(folder, files, schema, digest):
    """Turn the folder of one split's Arrow files, as many as `files`, into one that `datasets.load_from_disk` reads.

    `save_to_disk` would copy every byte and map the whole data into memory; the format is checked by loading it.
    """
    features = datasets.Features.from_arrow_schema(schema)
    datasets.DatasetInfo(features=features).write_to_directory(str(folder))
    state = {
        "_data_files": [{"filename": f"data-{index:05}.arrow"} for index in range(files)],
        "_fingerprint": digest[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": folder.name,
    }
    (folder / "state.json").write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
