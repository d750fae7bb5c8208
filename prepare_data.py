"""Step 1: turn conversations from several sources into token ids with assistant masks, and extend the tokenizer.

Reads   the base model's tokenizer and the sources of the mixture (the hub, or local JSONL, JSON, Parquet, text files).
Writes  data/sft_v1/: a `datasets` folder (train, validation), tokenizer/, report.json|md|png, rejected.jsonl.

    python prepare_data.py                                   the Genesis mixture
    python prepare_data.py --limit 1000 --data-dir data/try  a quick look at it: 1,000 conversations per source
    python prepare_data.py --mixture mixtures/dolci.json     another mixture: those in mixtures/, or your own
    python prepare_data.py --show 2                          print two finished sequences per source
    the same command after a kill                            continues after the last finished source

A conversation is ChatML (sft/data/chatml.py). The loss will cover the assistant's text and its closing `<|im_end|>`,
nothing else. Plain text, which a source may hold against forgetting, has no markers, and the loss covers all of it.
Every input row is accounted for: it is kept, or a line in rejected.jsonl says why not. The bytes written depend on the
sources, the base's tokenizer and the settings, not on the number of workers.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import shutil
import time
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import tokenizers
import transformers
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from sft import eval_tasks, hf_folder, settings, system
from sft.data import chatml, conversations, data_report, decontamination, hub, sources, workers, writer
from sft.text import one_line

# ---- Files ----
BASE_MODEL = "models/base"  # folder with the base's tokenizer.json and tokenizer_config.json
DATA_DIR = "data/sft_v1"  # folder to write; must be empty or missing
# ---- Mixture ----
# A source has
#   name               as it is called in the report
#   path               a local .jsonl, .json, .parquet or .txt file, relative to the mixture file; or
#   hub                a hub data set, which is read with `datasets`, or one "file" of it
#   schema             its columns: a name in SCHEMAS in sft/data/conversations.py
#   examples           conversations or documents kept for training, after all rejections, or "all"
# and optionally
#   revision           of a hub data set: its branch, tag or commit ("main"); report.json records the commit
#   config, split      of a hub data set (its default config, "train"); a "file" needs neither
#   file               the path of one file in a hub data set, read like a local one: a JSON array in little memory
#   seed               of the draw (42)
#   repeat             times each conversation is trained on (1)
#   exclude            {column: [values whose rows are left out]}
#   identity_patterns  used instead of IDENTITY_PATTERNS; [] = none
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
    {"name": "metamath", "hub": "meta-math/MetaMathQA", "file": "MetaMathQA-395K.json", "revision": "main",
     "schema": "query/response", "examples": 50_000, "seed": 42},
]
# fmt: on
VALIDATION_CONVERSATIONS = 100  # per source, on top of its examples; of "all" every tenth, up to this number
LIMIT = 0  # for a quick look: train on at most this many conversations per source (a tenth of it validates); 0 = all
# ---- What is rejected, besides rows that cannot be used ----
DEDUPLICATE = "normalised"  # reject later copies: "normalised" ignores case, white space, NFKC | "exact" | "off"
IDENTITY_PATTERNS = (  # regular expressions (RE2, any letter case) of answers by an assistant that is another model
    r"\b(?:developed|created|trained|made|built|designed) by (?:OpenAI|Anthropic)\b",
    r"\b(?:I am|I['’]m|my name is) (?:called )?"
    r"(?:ChatGPT|GPT-?[345]|Claude|Gemini|Llama|Alpaca|Vicuna|Qwen|Tulu|OLMo)\b",
    r"\bI(?: am|['’]m| was)[^.\n]*\b(?:language model|chatbot|assistant)[^.\n]* (?:by|from) "
    r"(?:Google|Meta|Microsoft|Mistral|Alibaba|Ai2|the Allen Institute)\b",
    r"\bTülu\b",
)
DECONTAMINATE_AGAINST = eval_tasks.MEASURED  # lm_eval tasks whose questions must not be trained on; "" = none
TASKS_INCLUDE_PATH = ""  # folder with your own task definitions, lm_eval's --include_path
# ---- Sequences ----
MAX_SEQ_LEN = 2048  # tokens; the base's context
OVERFLOW = "split"  # longer conversations: "split" at turn boundaries | "truncate" at the end | "drop"
TRAIN_ON_SPECIAL_TOKENS = True  # on the closing <|im_end|> and the think markers; else no model learns to stop
KEEP_PAST_THINKING = True  # keep <think> blocks of earlier answers; False drops them and trains on the bare answers
# ---- Speed ----
WORKERS = 0  # processes that read and encode; 0 = one per core
# ---- A look at the result ----
SHOW = 0  # print this many finished sequences per source of DATA_DIR and stop; 0 = prepare

# ==== Constants ====

CHOICES = {"OVERFLOW": ("split", "truncate", "drop"), "DEDUPLICATE": ("normalised", "exact", "off")}
AT_LEAST = {"MAX_SEQ_LEN": 16, "VALIDATION_CONVERSATIONS": 1, "LIMIT": 0, "WORKERS": 0, "SHOW": 0}
SETTINGS_WITHOUT_EFFECT = ("BASE_MODEL", "DATA_DIR", "MIXTURE", "WORKERS", "SHOW")  # on the bytes
FILES_WITHOUT_EFFECT = ("__init__.py", "data_report.py", "sentencepiece_tokenizer.py")  # of sft/data; on rows and ids
VERSIONS = {module.__name__: module.__version__ for module in (np, tokenizers, transformers, datasets)}


# ==== One source ====


class Selection:
    """Decides which rows of a source are kept, and for which split, until the source has given its number.

    seen: the SeenKeys of the whole mixture; index: of the source in it; rows: of the source.
    """

    def __init__(self, source, index, rows, seen, args):
        self.index, self.seen = index, seen
        self.counts = Counter(read=0, kept=0, rejected=0, conversations=0, validation_conversations=0, control_text=0)
        self.reasons, self.changes = Counter(), Counter()
        limit, self.held_out = args["LIMIT"], args["VALIDATION_CONVERSATIONS"]
        if limit:
            self.held_out = min(self.held_out, max(1, limit // 10))
        if source.examples == "all":
            self.every = 10  # each tenth kept row may go to validation
            self.goal = rows
        else:
            self.every = 1
            self.goal = source.examples + self.held_out
        if limit:
            self.every = min(self.every, limit)
            self.goal = min(self.goal, limit + self.held_out)

    @property
    def complete(self):
        """Whether the source has given its number."""
        return self.counts["kept"] == self.goal

    def choose(self, result):
        """Count the RowResult of one row; return the split that it goes to, or None if it is rejected."""
        self.counts["read"] += 1
        if not result.reason:
            first = self.seen.find(result.key)
            if first:
                result.reason, result.detail = "duplicate", first
        if result.reason:
            self.counts["rejected"] += 1
            self.reasons[result.reason] += 1
            return None
        self.counts["kept"] += 1
        self.counts["control_text"] += result.control_text
        self.changes.update(result.changes)
        if result.key:
            self.seen.add(result.key, self.index, result.row)
        if self.counts["validation_conversations"] < self.held_out and self.counts["kept"] % self.every == 0:
            self.counts["validation_conversations"] += 1
            return "validation"
        self.counts["conversations"] += 1
        return "train"


def prepare_source(work, index, paths, seen, processes):
    """Read rows in a drawn order until the source has given its number; write its files, all but "done".

    work: workers.Work; index: of the source in the mixture; paths: its writer.source_files; processes: number of them.
    Returns: the source's line of the report. Raises: SystemExit if the source has too few usable rows.
    """
    source, rows = work.source, len(work.rows)
    selection = Selection(source, index, rows, seen, work.args)
    splits = {}
    for split, repeat in (("train", source.repeat), ("validation", 1)):
        splits[split] = writer.SplitWriter(
            paths[split], source.name, repeat, work.encoder.id_type, work.args["MAX_SEQ_LEN"]
        )
    order = np.random.default_rng(source.seed).permutation(rows)
    with (
        paths["rejected"].open("w", encoding="utf-8") as rejected,
        tqdm(total=selection.goal, desc=source.name, unit="row", dynamic_ncols=True) as bar,
        contextlib.closing(workers.prepare_batches(work, order, processes)) as batches,
    ):
        for batch in batches:
            homes = [None] * len(batch.results)  # the split that each row goes to
            for i, result in enumerate(batch.results):
                if selection.complete:
                    break
                homes[i] = selection.choose(result)
                for entry in rejected_entries(source.name, result):
                    rejected.write(json.dumps(entry) + "\n")
            write_batch(batch, homes, splits)
            bar.update(len(homes) - homes.count(None))
            if selection.complete:
                break
    refuse_too_few(source, selection)
    seen.save(paths["keys"], index)
    return {
        "name": source.name,
        **selection.counts,
        **splits["train"].counts,
        "reasons": dict(selection.reasons.most_common()),
        "changes": dict(selection.changes.most_common()),
        "digest": {split: splits[split].close() for split in ("train", "validation")},
        "lengths": splits["train"].histogram.tolist(),
        "damage": work.rows.damage and str(work.rows.damage),
    }


def write_batch(batch, homes, splits):
    """Write the sequences of a batch to their splits. homes: for each row "train", "validation" or None."""
    sequences_per_row = [result.sequences for result in batch.results]
    for split, split_writer in splits.items():
        sequences = np.repeat([home == split for home in homes], sequences_per_row)
        tokens = np.repeat(sequences, batch.lengths)
        split_writer.write(batch.lengths[sequences], batch.ids[tokens], batch.mask[tokens])


def rejected_entries(source_name, result):
    """Yield a row's lines of rejected.jsonl (dicts): that it was rejected, or what was moved or left out."""
    if result.reason:
        events = [("rejected", result.reason)]
    else:
        events = [("changed", change) for change in result.changes if change in conversations.LOGGED_CHANGES]
    for status, reason in events:
        entry = {"source": source_name, "row": result.row, "status": status, "reason": reason}
        if result.detail:
            entry["detail"] = result.detail
        entry["start"] = result.start
        yield entry


def refuse_too_few(source, selection):
    """Raise SystemExit if the rows of a source did not suffice."""
    counts = selection.counts
    reasons = ", ".join(f"{count:,} {one_line(reason)}" for reason, count in selection.reasons.most_common())
    reasons = reasons or "none rejected"
    if counts["kept"] and source.examples != "all" and not selection.complete:
        raise SystemExit(
            f"{source.name}: {selection.goal:,} conversations are needed, {selection.held_out:,} of them to validate. "
            f"Of {counts['read']:,} rows, {counts['kept']:,} are usable ({reasons}). "
            'Lower "examples" or say "all".'
        )
    if not counts["conversations"]:
        raise SystemExit(
            f"{source.name}: none of {counts['read']:,} rows can be trained on ({reasons}). Correct its schema, "
            "or the settings that reject its rows."
        )


# ==== The folder ====


def build_encoder(args, folder):
    """Extend the base's tokenizer, save it in `folder`, test it. Returns: (saved and reloaded tokenizer, Encoder).

    Raises: SystemExit if the base's tokenizer.json is missing or damaged.
    """
    rules = args["TRAIN_ON_SPECIAL_TOKENS"], args["KEEP_PAST_THINKING"]
    try:
        tokenizer, adds_bos = chatml.extend_tokenizer(args["BASE_MODEL"], *rules)
        tokenizer.save_pretrained(folder)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)  # what others will load
        encoder = chatml.Encoder(tokenizer, adds_bos, *rules)
        result = chatml.self_test(tokenizer, encoder)
    except (SystemExit, KeyboardInterrupt, OSError):
        raise
    except BaseException as error:  # the tokenizers library raises plain Exception, and panics that aren't Exceptions
        raise SystemExit(
            f"{args['BASE_MODEL']}: its tokenizer.json is damaged ({type(error).__name__}: {error}). Get it again."
        ) from None
    ids = ", ".join(f"{token} {tokenizer.convert_tokens_to_ids(token)}" for token in chatml.CHATML + chatml.THINK)
    print(f"tokenizer: {len(tokenizer):,} tokens; {ids}; {'begins with' if adds_bos else 'no'} BOS")
    print(result, flush=True)
    return tokenizer, encoder


def inputs_digest(args, tokenizer_folder, ngrams):
    """Return one SHA-256 over what every source's result depends on: code, settings, versions, tokenizer, n-grams.

    The code is sft/data without FILES_WITHOUT_EFFECT, sft/hf_folder.py, and this file without its settings: an edited
    setting counts only by its value. ngrams: Path of the evaluation's n-grams, or None.
    """
    package = Path(__file__).parent / "sft"
    code = ["hf_folder.py"]
    for path in (*package.glob("data/*.py"), *package.glob("data/*.jinja")):
        if path.name not in FILES_WITHOUT_EFFECT:
            code.append(f"data/{path.name}")
    parts = [
        Path(__file__).read_text(encoding="utf-8").partition("\n# ====")[2],
        system.folder_digest(package, *code),
        {name: value for name, value in args.items() if name not in SETTINGS_WITHOUT_EFFECT},
        VERSIONS,
        system.folder_digest(tokenizer_folder, "*"),
        ngrams and system.sha256(ngrams),
    ]
    return digest_of(parts)


def digest_of(value):
    """Return the SHA-256 of a JSON value, 64 hex digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def prepare(args, mixture, folder, staging):
    """Write everything into `staging`/data, source by source; return the report. folder: where relative paths start.

    A source that an earlier run finished there from the same inputs (`staging`/progress) is kept. The inputs of a
    source are its own and those of the sources before it, whose conversations it must not repeat.
    Raises: SystemExit with the source that is wrong, OSError if the disk is full.
    """
    data, ngrams = staging / "data", staging / "progress" / "evaluation.npz"
    for part in (data / "tokenizer", data / "train", data / "validation", staging / "progress"):
        part.mkdir(parents=True, exist_ok=True)
    tokenizer, encoder = build_encoder(args, data / "tokenizer")
    locations = [sources.find_source(source, folder) for source in mixture]
    overlap = decontamination.find_overlap(args["DECONTAMINATE_AGAINST"], args["TASKS_INCLUDE_PATH"], ngrams)
    inputs = inputs_digest(args, data / "tokenizer", ngrams if overlap else None)
    processes = args["WORKERS"] or len(os.sched_getaffinity(0))
    seen, lines = writer.SeenKeys([source.name for source in mixture]), []
    for index, (source, (open_rows, fingerprint)) in enumerate(zip(mixture, locations, strict=True)):
        inputs = digest_of([inputs, dataclasses.asdict(source), fingerprint])
        paths = writer.source_files(staging, index)
        line = writer.finished_line(paths, inputs)
        if line:
            print(f"{source.name}: finished by an earlier run")
            seen.load(paths["keys"])
        else:
            paths["done"].unlink(missing_ok=True)
            try:
                work = workers.Work(source, open_rows(), encoder, overlap, args)
                line = prepare_source(work, index, paths, seen, processes)
            except BaseException:
                for path in paths.values():  # a full disk stays usable
                    path.unlink(missing_ok=True)
                raise
            line |= {"source": dataclasses.asdict(source), "revision": fingerprint["revision"]}
            writer.mark_done(paths, inputs, line)
        lines.append(line)
    report = build_report(args, lines, tokenizer, overlap, data)
    write_folder(staging, report)
    return report


def build_report(args, lines, tokenizer, overlap, data):
    """Return the report (dict). lines: of the sources; data: the folder that holds the extended tokenizer."""
    digest = {}
    for split in ("train", "validation"):
        digest[split] = writer.digest_of_digests(line["digest"][split] for line in lines)
    counts = [name for name, value in lines[0].items() if isinstance(value, int)]
    base_tokenizer = Tokenizer.from_file(str(Path(args["BASE_MODEL"]) / "tokenizer.json"))
    return {
        "settings": args,
        "versions": {"python": platform.python_version()} | VERSIONS,
        "tokenizer_sha256": hf_folder.tokenizer_digests(data / "tokenizer"),
        "base_model": args["BASE_MODEL"],
        "base_vocab_size": base_tokenizer.get_vocab_size(),
        "vocab_size": len(tokenizer),
        "max_seq_len": args["MAX_SEQ_LEN"],
        "limit": args["LIMIT"],
        "digest": digest,
        "sources": lines,
        "totals": {name: sum(line[name] for line in lines) for name in counts},
        "plain_text": {name: sum(line[name] for line in lines if is_plain_text(line)) for name in counts},
        "evaluation": overlap.counts if overlap else [],
    }


def is_plain_text(line):
    """Return whether a source's line of the report is of documents of plain text, not of conversations."""
    return line["source"]["schema"] == "text"


def write_folder(staging, report):
    """Make `staging`/data a whole folder: the metadata of `datasets`, rejected.jsonl, the report."""
    data = staging / "data"
    files = [writer.source_files(staging, index) for index in range(len(report["sources"]))]
    current = {path for paths in files for path in paths.values()}
    for path in {*data.glob("*/data-*.arrow"), *staging.glob("progress/[0-9]*")} - current:
        path.unlink()  # of an earlier mixture with more sources
    for split, digest in report["digest"].items():
        schema = pa.ipc.open_stream(files[0][split]).schema
        writer.write_dataset_metadata(data / split, len(files), schema, digest)
    splits = {"splits": list(report["digest"])}
    (data / "dataset_dict.json").write_text(json.dumps(splits) + "\n", encoding="utf-8")
    with (data / "rejected.jsonl").open("wb") as rejected:
        for paths in files:
            with paths["rejected"].open("rb") as part:
                shutil.copyfileobj(part, rejected)
    (data / "report.md").write_text(data_report.markdown(report), encoding="utf-8")
    data_report.draw(report, data / "report.png")
    loaded = datasets.load_from_disk(str(data))
    assert len(loaded["train"]) == report["totals"]["sequences"]
    system.write_whole(data / "report.json", json.dumps(report, indent=1) + "\n")


# ==== Main ====


def validate_settings(args):
    """Raise SystemExit with a sentence for a value that no run can have. args: dict of all settings."""
    settings.check_bounds(args, CHOICES, AT_LEAST)
    try:
        sources.check_patterns(args["IDENTITY_PATTERNS"], "IDENTITY_PATTERNS")
    except ValueError as error:
        raise SystemExit(f"{error}. Correct it.") from None


def main(args):
    """Prepare the mixture as the settings `args` (dict) say, or show what was prepared."""
    validate_settings(args)
    if args["SHOW"]:
        data_report.show(args["DATA_DIR"], args["SHOW"])
        return
    started = time.perf_counter()
    mixture, folder = sources.read_mixture(args["MIXTURE"])
    data_dir = system.refuse_unless_empty(args["DATA_DIR"], "--data-dir")
    if "::" in str(data_dir):  # to `datasets`, a chain of addresses
        raise SystemExit(f'{data_dir}: `datasets` cannot read a folder with "::" in its path. Name another --data-dir.')
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads would not survive the fork; see workers.serve
    unfinished = system.unfinished(data_dir)
    later = f"Finished sources, if any, stay in {unfinished}; the same command continues after them."
    try:
        staging, handle = system.claim(data_dir, "--data-dir")
        with handle:
            try:
                report = prepare(args, mixture, folder, staging)
                if data_dir.exists():
                    data_dir.rmdir()
                (staging / "data").rename(data_dir)
                system.remove_claimed(staging)
            finally:
                if not any((staging / "progress").glob("*.json")):  # nothing is finished: nothing to keep
                    system.remove_claimed(staging)
    except ChildProcessError:
        raise SystemExit(f"A worker was killed, most likely out of memory. Lower WORKERS. {later}") from None
    except OSError as error:
        remedy = "Free disk space." if error.errno in hub.DISK_FULL else "Check the folder and your rights to it."
        raise SystemExit(f"{data_dir} cannot be written ({error}). {remedy} {later}") from None
    except KeyboardInterrupt:
        raise SystemExit(f"Stopped. {later}") from None
    seconds = time.perf_counter() - started
    print(f"\n{data_report.markdown(report)}")
    print(f"digest: train {report['digest']['train'][:16]}, validation {report['digest']['validation'][:16]}")
    print(f"written: {data_dir} in {seconds:.0f} s; every rejected row in {data_dir}/rejected.jsonl")


if __name__ == "__main__":
    main(settings.from_flags(globals()))
