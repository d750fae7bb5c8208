"""Step 1: turn conversations from several sources into token ids with assistant masks, and extend the tokenizer.

Reads   the base model's tokenizer and the sources of the mixture (the hub, or local JSONL, JSON and Parquet files).
Writes  data/sft_v1/: a `datasets` folder (train, validation), tokenizer/, report.json|md|png, rejected.jsonl.

    python prepare_data.py                                   the Genesis mixture
    python prepare_data.py --mixture demo/mixture.json       another one
    python prepare_data.py --show 2                          look at two finished sequences per source
    the same command after a kill                            goes on after the last finished source

A conversation is ChatML (chatml.py). Trained are the assistant's content and the `<|im_end|>` that closes it, nothing
else. Every row has a fate: kept, or a line in rejected.jsonl that says why not. The bytes written depend on the
sources, the base's tokenizer and the settings, not on the number of workers.
"""

import contextlib
import hashlib
import itertools
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tokenizers
import transformers
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from sft import settings, system
from sft.data import chatml, conversations, data_report, decontamination
from sft.data import sources as data_sources
from sft.data import workers as data_workers

# ---- Files ----
BASE_TOKENIZER = "models/base"  # folder with the base's tokenizer.json and tokenizer_config.json
OUTPUT_DIR = "data/sft_v1"  # folder to write; it must not hold anything yet
# ---- Mixture ----
# A source has a name, where it is ("path" of a local file, relative to the mixture file, or "hub" with "revision" and
# either "config" and "split" or a "file"), its schema (SCHEMAS in conversations.py), "examples" (conversations kept for
# training, or "all"), and optionally "seed" (of the draw), "repeat" (times each conversation is trained), "exclude"
# (column: values whose rows are left out) and "identity_patterns" (in place of IDENTITY_PATTERNS; [] = none).
# fmt: off
MIXTURE = [  # the sources; as a flag, the path of a JSON file with such a list
    {"name": "constitutional", "path": "data/constitutional.jsonl", "schema": "messages", "examples": 10_000,
     "seed": 42, "identity_patterns": []},  # it may say who it is not: "ChatGPT was made by OpenAI"
    {"name": "smoltalk", "hub": "HuggingFaceTB/smoltalk", "config": "smol-magpie-ultra", "revision": "main",
     "split": "train", "schema": "messages", "examples": 100_000, "seed": 42},
    {"name": "openhermes", "hub": "teknium/OpenHermes-2.5", "file": "openhermes2_5.json", "revision": "main",
     "schema": "conversations", "examples": 200_000, "seed": 42},
    {"name": "tulu", "hub": "allenai/tulu-3-sft-mixture", "revision": "main",
     "split": "train", "schema": "messages", "examples": 100_000, "seed": 42,
     "exclude": {"source": ["ai2-adapt-dev/tulu_hard_coded_repeated_10"]}},  # 240 rows that say who Tülu is
    {"name": "metamath", "hub": "meta-math/MetaMathQA", "revision": "main",
     "split": "train", "schema": "query/response", "examples": 50_000, "seed": 42},
]
# fmt: on
VALIDATION_CONVERSATIONS = 100  # per source, beside its examples; of what "all" gives every tenth, up to this number
# ---- What is rejected, beside rows that cannot be used ----
DEDUPLICATE = "normalised"  # within and across sources: "normalised" (case, white space, NFKC) | "exact" | "off"
IDENTITY_PATTERNS = (  # regular expressions (RE2, any letter case) of answers by an assistant that is another model
    r"\b(?:developed|created|trained|made|built|designed) by (?:OpenAI|Anthropic)\b",
    r"\b(?:I am|I['’]m|my name is) (?:called )?(?:ChatGPT|GPT-?[345]|Claude|Gemini|Llama|Alpaca|Vicuna|Qwen|Tulu)\b",
    r"\bI(?: am|['’]m| was)[^.\n]*\b(?:language model|chatbot|assistant)[^.\n]* (?:by|from) "
    r"(?:Google|Meta|Microsoft|Mistral|Alibaba|Ai2|the Allen Institute)\b",
    r"\bTülu\b",
)
DECONTAMINATE_AGAINST = (  # lm_eval tasks whose questions are not to be trained, those of run_eval.sh; "" = none
    *("hellaswag", "piqa", "winogrande", "arc_easy", "arc_challenge", "lambada_openai", "mmlu"),
)
TASKS_INCLUDE_PATH = ""  # folder with task definitions of your own, lm_eval's --include_path
DECONTAMINATION_NGRAM = 13  # words in a row shared with a question that reject a conversation; 13 as for GPT-3
# ---- Sequences ----
MAX_SEQ_LEN = 2048  # tokens; the base's context
OVERFLOW = "split"  # longer conversations: "split" at turn boundaries | "truncate" at the end | "drop"
TRAIN_ON_SPECIAL_TOKENS = True  # train the closing <|im_end|> and the think markers; without it no model learns to stop
KEEP_PAST_THINKING = True  # keep <think> blocks of earlier answers; False drops them and trains the bare answers
# ---- Speed ----
WORKERS = 0  # processes that read and encode; 0 = one per core
# ---- A look at the result ----
SHOW = 0  # print this many finished sequences per source from OUTPUT_DIR and stop; 0 = prepare

# ==== Facts ====

# the data depends on their code
RULES = ("prepare_data.py", *(f"sft/data/{name}.py" for name in ("sources", "conversations", "chatml", "workers")))
RULES += ("sft/data/decontamination.py",)
HISTOGRAM_BINS = 32  # of sequence lengths, from 0 to MAX_SEQ_LEN


# ==== Writing ====


class Split:
    """What one source gives to one split, on its way to disk: an Arrow stream, its digest and its counts."""

    def __init__(self, path, name, repeat, id_type, max_seq_len):
        self.path, self.name, self.repeat = path, name, repeat
        fields = {"input_ids": pa.list_(pa.from_numpy_dtype(id_type)), "assistant_masks": pa.list_(pa.bool_())}
        self.schema = pa.schema(fields | {"source": pa.string()})
        self.stream = pa.ipc.new_stream(str(path), self.schema)
        self.hashes = [hashlib.sha256() for _ in range(3)]
        self.counts = Counter(sequences=0, tokens=0, trainable_tokens=0)
        self.edges = np.linspace(0, max_seq_len, HISTOGRAM_BINS + 1)
        self.histogram = np.zeros(HISTOGRAM_BINS, np.int64)

    def write(self, lengths, ids, mask):
        """Append sequences laid end to end, `repeat` times. lengths: int32 [sequences]; ids, mask: [tokens]."""
        if not len(lengths):
            return
        offsets = pa.array(np.cumsum([0, *lengths], dtype=np.int32))
        lists = [pa.ListArray.from_arrays(offsets, pa.array(column)) for column in (ids, mask)]
        table = pa.table([*lists, pa.array([self.name] * len(lengths))], schema=self.schema)
        for _ in range(self.repeat):
            self.stream.write_table(table)
            for digest, column in zip(self.hashes, (lengths, ids, mask), strict=True):
                digest.update(column)
        counts = {"sequences": len(lengths), "tokens": len(ids), "trainable_tokens": int(mask.sum())}
        self.counts.update({name: count * self.repeat for name, count in counts.items()})
        self.histogram += np.histogram(lengths, self.edges)[0] * self.repeat

    def close(self):
        """Put the stream on the disk; return the digest of lengths, ids and mask, 64 hex digits."""
        self.stream.close()
        system.durable(self.path)
        return hashlib.sha256("".join(part.hexdigest() for part in self.hashes).encode()).hexdigest()


class Seen:
    """The keys of all conversations kept so far and the rows they came from; about 150 bytes each."""

    def __init__(self, names):
        self.names, self.codes = names, {}

    def where(self, key):
        """Return the source and row of the conversation with this key, as text, or None."""
        code = self.codes.get(key)
        return None if code is None else f"{self.names[code >> 40]} row {code % (1 << 40)}"

    def add(self, key, place, row):
        """Remember the row `row` of the source at `place` of the mixture."""
        self.codes[key] = place << 40 | row

    def save(self, path, place):
        """Write the keys of the source at `place`."""
        own = {key: code for key, code in self.codes.items() if code >> 40 == place}
        keys = np.frombuffer(b"".join(own), np.uint8).reshape(-1, 16)
        np.savez(path, keys=keys, codes=np.array(list(own.values()), np.int64))

    def load(self, path):
        """Add what `save` wrote."""
        with np.load(path) as stored:
            self.codes.update(zip(map(bytes, stored["keys"]), stored["codes"].tolist(), strict=True))


def files_of(folder, place):
    """Return the Paths of what the source at `place` of the mixture adds to the unfinished `folder`."""
    return {
        "train": folder / "data" / "train" / f"data-{place:05}.arrow",
        "validation": folder / "data" / "validation" / f"data-{place:05}.arrow",
        "ledger": folder / "progress" / f"{place:05}.jsonl",
        "keys": folder / "progress" / f"{place:05}.npz",
        "done": folder / "progress" / f"{place:05}.json",  # written last: without it the others do not count
    }


def finished(paths, chain):
    """Return the report's line of a source that an earlier run finished from the same facts, or None."""
    try:
        done = json.loads(paths["done"].read_text(encoding="utf-8"))
        whole = all(paths[name].stat().st_size == size for name, size in done["bytes"].items())
        return done["line"] if whole and done["chain"] == chain else None
    except (OSError, ValueError, KeyError):
        return None


def prepare_source(work, place, paths, seen, workers):
    """Read rows in a drawn order until the source has given its number; write its files, all but "done".

    Returns: the source's line of the report. Raises: SystemExit if the source has too few usable rows.
    """
    source, run, rows = work.source, work.run, len(work.rows)
    name, wanted, held_out = source["name"], source["examples"], run["VALIDATION_CONVERSATIONS"]
    goal, every = (
        (rows, 10) if wanted == "all" else (wanted + held_out, 1)
    )  # each 10th or 1st kept row may be for validation
    order = np.random.default_rng(source.get("seed", 42)).permutation(rows)
    splits = {
        split: Split(paths[split], name, repeat, work.encoder.id_type, run["MAX_SEQ_LEN"])
        for split, repeat in (("validation", 1), ("train", source.get("repeat", 1)))
    }
    line = Counter(read=0, kept=0, rejected=0, conversations=0, validation_conversations=0, control_text=0)
    reasons, changes = Counter(), Counter()
    with (
        paths["ledger"].open("w", encoding="utf-8") as ledger,
        tqdm(total=goal, desc=name, unit="row", dynamic_ncols=True) as bar,
        contextlib.closing(data_workers.results(work, order, workers)) as batches,
    ):
        for fates, lengths, ids, mask in batches:
            homes = [None] * len(fates)  # the split that each row goes to
            for index, fate in enumerate(fates):
                if line["kept"] == goal:
                    break
                if not fate.reason and (first := seen.where(fate.key)):
                    fate.reason, fate.found = "duplicate", first
                line["read"] += 1
                if fate.reason:
                    line["rejected"] += 1
                    reasons[fate.reason] += 1
                else:
                    line.update(kept=1, control_text=fate.control_text)
                    aside = line["validation_conversations"] < held_out and line["kept"] % every == 0
                    homes[index] = "validation" if aside else "train"
                    line["validation_conversations" if aside else "conversations"] += 1
                    changes.update(fate.changes)
                    if fate.key:
                        seen.add(fate.key, place, fate.row)
                for entry in ledger_lines(name, fate):
                    ledger.write(json.dumps(entry) + "\n")
            for split, part in splits.items():
                taken = np.repeat([home == split for home in homes], [fate.sequences for fate in fates])
                tokens = np.repeat(taken, lengths)
                part.write(lengths[taken], ids[tokens], mask[tokens])
            bar.update(len(homes) - homes.count(None))
            if line["kept"] == goal:
                break
    told = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common()) or "none rejected"
    if wanted != "all" and line["kept"] < goal:
        raise SystemExit(
            f"{name}: {wanted:,} conversations and {held_out:,} for validation were asked, {line['kept']:,} of "
            f'{line["read"]:,} rows can be used ({told}). Lower "examples" or say "all".'
        )
    if not line["conversations"]:
        raise SystemExit(f"{name}: none of {line['read']:,} rows can be trained on ({told}). Is its schema right?")
    seen.save(paths["keys"], place)
    digest = {split: part.close() for split, part in splits.items()}
    more = {"reasons": dict(reasons.most_common()), "changes": dict(changes.most_common()), "digest": digest}
    return {"name": name, **line, **splits["train"].counts, **more, "lengths": splits["train"].histogram.tolist()}


def ledger_lines(name, fate):
    """Yield a row's lines of rejected.jsonl (dicts): that it was rejected, or what was moved or left out."""
    told = (
        [("rejected", fate.reason)]
        if fate.reason
        else [("changed", c) for c in fate.changes if c in conversations.LOSSES]
    )
    for kind, reason in told:
        found = {"found": fate.found} if fate.found else {}
        yield {"source": name, "row": fate.row, "fate": kind, "reason": reason} | found | {"start": fate.start}


def dataset_metadata(folder, places, schema, digest):
    """Make the folder of one split's Arrow files one that `datasets.load_from_disk` reads.

    Its own save_to_disk would copy every byte and map the whole data into memory; the format is checked by loading it.
    """
    features = datasets.Features.from_arrow_schema(schema)
    datasets.DatasetInfo(features=features).write_to_directory(str(folder))
    state = {"_data_files": [{"filename": f"data-{place:05}.arrow"} for place in range(places)]}
    state |= {"_fingerprint": digest[:16], "_format_columns": None, "_format_kwargs": {}, "_format_type": None}
    state |= {"_output_all_columns": False, "_split": folder.name}
    (folder / "state.json").write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")


# ==== Gates ====


def read_mixture(mixture):
    """Return (list of sources, folder their paths are relative to); `mixture` is the list or a JSON file's path.

    Raises: SystemExit with the source and the key that is wrong.
    """
    folder = Path()
    if isinstance(mixture, str):
        folder = Path(mixture).parent
        try:
            mixture = json.loads(Path(mixture).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise SystemExit(f"the mixture file {mixture} cannot be read: {error}") from None
    if not isinstance(mixture, list) or not mixture or not all(isinstance(source, dict) for source in mixture):
        raise SystemExit(
            "a mixture must be a non-empty list of sources, each an object with name, path or hub, schema."
        )
    known = {"name", "path", "hub", "file", "config", "revision", "split"}
    known |= {"schema", "examples", "seed", "repeat", "exclude", "identity_patterns"}
    for place, source in enumerate(mixture, start=1):
        name = f"source {place} ({source.get('name')})"
        if unknown := sorted(set(source) - known):
            raise SystemExit(f"{name} has the unknown key {unknown[0]!r}; known are {', '.join(sorted(known))}.")
        if not isinstance(source.get("name"), str) or not source["name"] or not conversations.utf8(source["name"]):
            raise SystemExit(f'{name} needs a "name" of valid text.')
        if ("path" in source) == ("hub" in source):
            raise SystemExit(f'{name} needs either "path" or "hub".')
        texts = [key for key in ("path", "hub", "file", "config", "revision", "split") if key in source]
        if wrong := [key for key in texts if not isinstance(source[key], str)]:
            raise SystemExit(f"{name}: {wrong[0]} is {source[wrong[0]]!r}; it must be text.")
        if "file" in source and ("path" in source or {"config", "split"} & set(source)):
            raise SystemExit(f'{name}: "file" is a file of a "hub" source and needs no "config" or "split".')
        exclude = source.get("exclude", {})
        if not isinstance(exclude, dict) or not all(isinstance(values, list) for values in exclude.values()):
            raise SystemExit(f"{name}: exclude is {exclude!r}; it must be an object of column: [values].")
        check_patterns(source.get("identity_patterns", []), f"{name}: identity_patterns")
        if not isinstance(source.get("schema"), str) or source["schema"] not in conversations.SCHEMAS:
            raise SystemExit(
                f"{name} has the schema {source.get('schema')!r}; known are {', '.join(conversations.SCHEMAS)}."
            )
        for key, least, default in (("examples", 1, None), ("seed", 0, 42), ("repeat", 1, 1)):
            value = source.get(key, default)
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= least
            if not whole and not (key == "examples" and value == "all"):
                either = ' or "all"' if key == "examples" else ""
                raise SystemExit(f"{name}: {key} is {value!r}; it must be a whole number of at least {least}{either}.")
    names = [source["name"] for source in mixture]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise SystemExit(f"two sources have the name {twice[0]!r}.")
    return mixture, folder


def validate_settings(run):
    """Raise SystemExit with a sentence for a value that no run can have. run: dict of all settings."""
    for name, values in {
        "OVERFLOW": ("split", "truncate", "drop"),
        "DEDUPLICATE": ("normalised", "exact", "off"),
    }.items():
        if run[name] not in values:
            raise SystemExit(f"{name} is {run[name]!r}; it must be one of {', '.join(values)}.")
    least = {"MAX_SEQ_LEN": 16, "VALIDATION_CONVERSATIONS": 1, "DECONTAMINATION_NGRAM": 5, "WORKERS": 0, "SHOW": 0}
    for name, value in least.items():
        if run[name] < value:
            raise SystemExit(f"{name} is {run[name]}; it must be at least {value}.")
    check_patterns(list(run["IDENTITY_PATTERNS"]), "IDENTITY_PATTERNS")


def check_patterns(patterns, what):
    """Raise SystemExit unless `patterns` is a list of regular expressions of RE2."""
    if not isinstance(patterns, list) or not all(isinstance(p, str) and conversations.utf8(p) for p in patterns):
        raise SystemExit(f"{what} is {patterns!r}; it must be a list of regular expressions.")
    for pattern in patterns:
        try:
            pc.extract_regex(pa.array([""]), f"(?i)(?P<found>{pattern})")  # refuses plain groups, too: write (?:...)
        except pa.ArrowInvalid as error:
            raise SystemExit(f"{what}: {pattern!r} is no regular expression of RE2 ({error}).") from None


# ==== Main ====


def build_encoder(run, folder):
    """Extend the base's tokenizer, save it in `folder`, test it. Returns: (saved and reloaded tokenizer, Encoder).

    Raises: SystemExit if the base's tokenizer.json is missing or damaged.
    """
    rules = run["TRAIN_ON_SPECIAL_TOKENS"], run["KEEP_PAST_THINKING"]
    try:
        tokenizer, adds_bos = chatml.extend_tokenizer(run["BASE_TOKENIZER"], *rules)
        tokenizer.save_pretrained(folder)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)  # what others will load
        encoder = chatml.Encoder(tokenizer, adds_bos, *rules)
        result = chatml.self_test(tokenizer, encoder)
    except (SystemExit, KeyboardInterrupt, OSError):
        raise
    except BaseException as error:  # the tokenizers library raises plain Exception, and panics, which are none
        raise SystemExit(
            f"{run['BASE_TOKENIZER']}: its tokenizer.json is damaged ({type(error).__name__}: {error}). Get it again."
        ) from None
    tokens = chatml.CHATML + chatml.THINK
    placed = ", ".join(f"{token} {tokenizer.convert_tokens_to_ids(token)}" for token in tokens)
    print(f"tokenizer: {len(tokenizer):,} tokens; {placed}; {'begins with' if adds_bos else 'no'} BOS")
    print(result)
    return tokenizer, encoder


def find_overlap(run, path):
    """Collect the n-grams of the evaluation's questions in `path`; return the Overlap, or None if none is asked.

    In a process of its own: lm_eval and torch would stay in this one's memory.
    """
    if not run["DECONTAMINATE_AGAINST"]:
        return None
    flags = {"--tasks": ",".join(run["DECONTAMINATE_AGAINST"]), "--include-path": run["TASKS_INCLUDE_PATH"]}
    flags |= {"--ngram": str(run["DECONTAMINATION_NGRAM"]), "--output": str(path)}
    command = [sys.executable, "-m", "sft.data.decontamination", *itertools.chain.from_iterable(flags.items())]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parent)}
    done = subprocess.run(command, env=env, preexec_fn=system.leave_to_parent)
    if done.returncode < 0:
        raise SystemExit(
            f"Reading the evaluation's questions was ended by signal {-done.returncode}, mostly for want of memory. "
            'Free it, or go on without them: --decontaminate-against "" (the comparison before/after then proves less).'
        )
    if done.returncode:
        raise SystemExit(done.returncode)  # it has said why
    return decontamination.Overlap(path)


def prepare(run, sources, folder, staging):
    """Write everything into `staging`/data, source by source; return the report. folder: where relative paths start.

    A source that an earlier run finished there from the same facts (`staging`/progress) is left as it is. The facts of
    a source are a chain: its own and those of the sources before it, whose conversations it must not repeat.
    Raises: SystemExit with the source that is wrong, OSError if the disk is full.
    """
    data = staging / "data"
    for part in (data / "tokenizer", data / "train", data / "validation", staging / "progress"):
        part.mkdir(parents=True, exist_ok=True)
    tokenizer, encoder = build_encoder(run, data / "tokenizer")
    found = [data_sources.find_source(source, folder) for source in sources]
    overlap = find_overlap(run, ngrams := staging / "progress" / "evaluation.npz")
    elsewhere = ("OUTPUT_DIR", "BASE_TOKENIZER", "MIXTURE", "WORKERS", "SHOW")  # what the bytes do not depend on
    versions = {m.__name__: m.__version__ for m in (np, tokenizers, transformers, datasets)}
    chain = [
        [(Path(__file__).parent / name).read_text(encoding="utf-8").partition("\n# ====")[2] for name in RULES],
        {name: value for name, value in run.items() if name not in elsewhere},
        [versions, system.folder_digest(data / "tokenizer", "*"), overlap and system.sha256(ngrams)],
    ]
    workers = run["WORKERS"] or len(os.sched_getaffinity(0))
    seen, lines = Seen([source["name"] for source in sources]), []
    for place, (source, (open_rows, facts)) in enumerate(zip(sources, found, strict=True)):
        chain = hashlib.sha256(json.dumps([chain, source, facts], sort_keys=True).encode()).hexdigest()
        paths = files_of(staging, place)
        if line := finished(paths, chain):
            print(f"{source['name']}: finished by an earlier run")
            seen.load(paths["keys"])
        else:
            paths["done"].unlink(missing_ok=True)
            try:
                work = data_workers.Work(source, open_rows(), encoder, overlap, run)
                line = prepare_source(work, place, paths, seen, workers)
            except BaseException:
                for path in paths.values():  # a full disk stays usable
                    path.unlink(missing_ok=True)
                raise
            line |= {"source": source, "revision": facts["revision"]}
            sizes = {name: path.stat().st_size for name, path in paths.items() if name != "done"}
            system.write_whole(paths["done"], json.dumps({"chain": chain, "bytes": sizes, "line": line}))
        lines.append(line)
    digest = {
        split: hashlib.sha256("".join(line["digest"][split] for line in lines).encode()).hexdigest()
        for split in ("train", "validation")
    }
    current = {path for place in range(len(sources)) for path in files_of(staging, place).values()}
    for path in {*data.glob("*/data-*.arrow"), *staging.glob("progress/[0-9]*")} - current:
        path.unlink()  # of an earlier mixture with more sources
    for split in digest:
        schema = pa.ipc.open_stream(paths[split]).schema
        dataset_metadata(data / split, len(sources), schema, digest[split])
    (data / "dataset_dict.json").write_text(json.dumps({"splits": list(digest)}) + "\n", encoding="utf-8")
    with (data / "rejected.jsonl").open("wb") as ledger:
        for place in range(len(sources)):
            with files_of(staging, place)["ledger"].open("rb") as part:
                shutil.copyfileobj(part, ledger)
    report = {
        "settings": run,
        "versions": {"python": platform.python_version()} | versions,
        "tokenizer_sha256": system.sha256(data / "tokenizer" / "tokenizer.json"),
        "base_tokenizer": run["BASE_TOKENIZER"],
        "base_vocab_size": Tokenizer.from_file(str(Path(run["BASE_TOKENIZER"]) / "tokenizer.json")).get_vocab_size(),
        "vocab_size": len(tokenizer),
        "max_seq_len": run["MAX_SEQ_LEN"],
        "digest": digest,
        "sources": lines,
        "totals": {key: sum(line[key] for line in lines) for key, value in lines[0].items() if isinstance(value, int)},
        "evaluation": overlap.counts if overlap else [],
    }
    (data / "report.md").write_text(data_report.markdown(report), encoding="utf-8")
    data_report.draw(report, data / "report.png")
    loaded = datasets.load_from_disk(str(data))
    assert len(loaded["train"]) == report["totals"]["sequences"]
    system.write_whole(data / "report.json", json.dumps(report, indent=1) + "\n")
    return report


def main(run):
    """Prepare the mixture as the settings `run` (dict) say, or show what was prepared."""
    validate_settings(run)
    if SHOW:
        data_report.show(OUTPUT_DIR, SHOW)
        return
    sources, folder = read_mixture(MIXTURE)
    output, started = Path(OUTPUT_DIR), time.perf_counter()
    system.refuse_unless_empty(output, "--output-dir")
    staging = output.with_name(f"{output.name}.unfinished")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads of its own would not survive the fork; see start_worker
    later = f"Finished sources, if any, stay in {staging}; the same command goes on after them."
    try:
        staging.mkdir(parents=True, exist_ok=True)
        with system.lock(staging, "--output-dir"):
            try:
                report = prepare(run, sources, folder, staging)
                if output.exists():
                    output.rmdir()
                (staging / "data").rename(output)
                shutil.rmtree(staging, ignore_errors=True)
            finally:
                if not any((staging / "progress").glob("*.json")):  # nothing is finished: nothing to keep
                    shutil.rmtree(staging, ignore_errors=True)
    except ChildProcessError:
        raise SystemExit(f"A worker process was killed, mostly for want of memory: lower WORKERS. {later}") from None
    except OSError as error:
        remedy = "Free disk space." if error.errno in data_sources.FULL else "Check the folder and your rights to it."
        raise SystemExit(f"{output} cannot be written ({error}). {remedy} {later}") from None
    except KeyboardInterrupt:
        raise SystemExit(f"Stopped. {later}") from None
    seconds, digest = time.perf_counter() - started, {split: text[:16] for split, text in report["digest"].items()}
    print(f"\n{data_report.markdown(report)}\ndigest: train {digest['train']}, validation {digest['validation']}")
    print(f"written: {output} in {seconds:.0f} s; every rejected row in {output}/rejected.jsonl")


if __name__ == "__main__":
    main(settings.from_flags(globals()))
