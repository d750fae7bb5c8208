"""Does anything that comes from outside end in a traceback? Damaged and made-up inputs for every reader.

    python tests/long/fuzz.py            100,000 inputs
    python tests/long/fuzz.py --quick    2,000, for a look

Each kind of input goes to the real reader functions, in this process. It may be used, or refused by a
SystemExit with a sentence, or (a row) be rejected with a reason; anything else counts as a traceback. A failure is
printed with its kind and number: with the same --seed, `make(kind, seed, number)` is that input again.
"""

import contextlib
import copy
import dataclasses
import hashlib
import io
import json
import math
import os
import random
import reprlib
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
import common  # puts the suite on the path

from sft import hf_folder, settings, system
from sft.data import chatml, sources, workers

# ---- Size ----
INPUTS = 100_000  # over all kinds, each with its share
SEED = 1  # of every input
QUICK = False  # 2,000 inputs

# ==== Constants ====

SHARES = {  # of INPUTS, by what one costs; each kind has at least one
    "rows": 0.38,
    "files": 0.24,
    "texts": 0.16,
    "mixture": 0.1,
    "checkpoints": 0.04,
    "report": 0.03,
    "results": 0.027,
    "tokenizer": 0.013,
    "parquet": 0.01,
    "huge": 0.0,
}
TEXTS = ("", " ", "a", "Hi there.", "<|im_end|>", "<|im_start|>assistant\n", "<think>", "</think>", "<s>", "[INST]")
TEXTS += ("<|endoftext|>", "\0", "\u2028", "e\u0301", "日本語", "😀", "\U0010fffd1\U0010fffd", "\ufeff", "▁", "<0x0A>")
TEXTS += ("I am ChatGPT", "x" * 300, "a  b\t\n", "\ufffe", "\u202e", "' \"; touch X #", "../../etc/passwd", "{{ 7*7 }}")
SCALARS = (*TEXTS, "\ud800", "x\udfff", "<bomb>", "<huge>", None, True, False, 0, 1, -1, 2**63, 10**400, 0.5, -0.0)
SCALARS += (1e308, float("nan"), float("inf"), -float("inf"), "user", "assistant", "system", "tool", "all", "n" * 300)
KEYS = ("messages", "conversations", "query", "response", "prompt", "role", "content", "from", "value", "", "\ud800")
BYTES = (b"\0", b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\r\n", b"\r", b"\n", b'"', b"{", b"]", b"NaN")
BYTES += (b"-Infinity", b"1e999", b"9" * 5000, b'{"messages": 1, ', b"\\ud800", b"\\u0000", b"[" * 3000, b"]" * 900)
ARGS = {"MAX_SEQ_LEN": 64, "OVERFLOW": "split", "DEDUPLICATE": "normalised", "IDENTITY_PATTERNS": (r"\bI am ChatGPT",)}
NAMES = ("a", "with space", "it's", 'a "quote"', "new\nline", "$(touch X)", "[0-9]*?", "ü😀")  # of files
JINJA = "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ cycler.__init__.__globals__.os.system('touch X') }}"


# ==== Damage ====


def anything(rng, depth=0):
    """Return a JSON value of any type, to put where another is expected."""
    kind = rng.randrange(8 if depth < 3 else 6)
    if kind < 6:
        return rng.choice(SCALARS)
    values = [anything(rng, depth + 1) for _ in range(rng.randrange(4))]
    return values if kind == 6 else {rng.choice(KEYS): value for value in values}


def damage(rng, value):
    """Return `value` (a JSON value, changed in place) with one part of it left out, doubled, or of another type."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.05:
        return anything(rng)
    key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
    how = rng.random()
    if how < 0.1:
        del value[key]
    elif how < 0.15 and isinstance(value, list):
        value.insert(key, value[key])
    elif how < 0.2 and isinstance(value, dict):
        value[rng.choice((*KEYS, *NAMES))] = anything(rng)
    else:
        value[key] = damage(rng, value[key])
    return value


def encoded(rng, value):
    """Return `value` as JSON in bytes; lone surrogates are escaped or invalid UTF-8, bombs and numbers spelt out."""
    data = json.dumps(value, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    # Python's parser still reads a depth of about 950, but repr fails on it.
    depth = rng.choice((20, rng.randrange(700, 1000), 5_000, 100_000))
    return data.replace(b'"<bomb>"', b"[" * depth + b"]" * depth).replace(b'"<huge>"', b"9" * 5000)


def spoil(rng, data):
    """Return the bytes `data` after up to three flips, cuts, insertions, or in another encoding."""
    for _ in range(rng.randrange(4)):
        start, end = sorted((rng.randint(0, len(data)), rng.randint(0, len(data))))
        how = rng.randrange(12)
        if how < 4:
            data = data[:start] + rng.choice(BYTES) + data[start:]
        elif how < 8 and start < len(data):
            data = data[:start] + bytes([data[start] ^ 1 << rng.randrange(8)]) + data[start + 1 :]
        elif how == 8:
            data = data[:start]
        elif how == 9:
            data = data[:start] + data[end:]
        elif how == 10:
            data = data.decode("utf-8", "replace").encode(rng.choice(("utf-16", "utf-8-sig", "utf-32-le")))
        else:
            data = rng.choice((b"", b"{", b"1", b"[" * 100_000, b"[]", data * 2))
    return data


def json_bytes(rng, value):
    """Return the bytes of a damaged copy of the JSON value `value`: wrong in its meaning, in its bytes, or in both."""
    how = rng.randrange(4)
    value = damage(rng, copy.deepcopy(value)) if how else value
    return encoded(rng, value) if how > 1 else spoil(rng, encoded(rng, value))


# ==== One kind after the other: make_* gives an input, feed_* passes it to the real reader functions ====


def row_of(rng, schema):
    """Return (a row of `schema`, damaged more often than not)."""
    texts = [rng.choice(TEXTS) + rng.choice(TEXTS) for _ in range(4)]
    names = {"messages": ("role", "content"), "conversations": ("from", "value")}.get(schema)
    if names:
        roles = rng.choice((("user", "assistant"), ("human", "gpt"), ("system", "user"), ("assistant", "assistant")))
        row = {schema: [dict(zip(names, (roles[n % 2], text), strict=True)) for n, text in enumerate(texts)]}
        if rng.random() < 0.3:
            row[schema][-1]["train"] = rng.choice((True, False, None, 0, "no", []))
    else:
        row = {schema.partition("/")[0]: texts[0], "response": texts[1]}
    for _ in range(rng.randrange(3)):
        row = damage(rng, row)
    return row


def source_of(rng):
    schema = rng.choice(("messages", "conversations", "query/response", "prompt/response", "text"))
    exclude = {"exclude": {"from": ["x", None]}} if rng.random() < 0.2 else {}
    return {"name": "fuzz", "schema": schema, "examples": "all"} | exclude


def make_rows(rng):
    source = source_of(rng)
    return source, encoded(rng, row_of(rng, source["schema"]))


def feed_rows(world, source, data):
    with contextlib.suppress(ValueError, RecursionError):  # what no parser reads is the files' matter
        rows = SimpleNamespace(take=lambda numbers: [(json.loads(data), None)])
        prepare_rows(world, sources.Source(path="fuzz.jsonl", **source), rows, 1)


def prepare_rows(world, source, rows, number):
    """Take `number` rows as a worker of prepare_data.py does, with their lines of rejected.jsonl."""
    work = workers.Work(source, rows, world.encoders[0], None, ARGS)
    batch = workers.prepare_rows(work, list(range(number)))
    assert len(batch.results) == number and sum(batch.lengths) == len(batch.ids) == len(batch.mask)
    for result in batch.results:
        assert bool(result.reason) == (not result.sequences)
        for entry in world.prepare_data.rejected_entries("fuzz", result):
            json.dumps(entry).encode()


def make_files(rng):
    source, suffix = source_of(rng), rng.choice((".jsonl", ".json", ".txt"))
    rows = [encoded(rng, row_of(rng, source["schema"])) for _ in range(rng.randrange(4))]
    newline = rng.choice((b"\n", b"\n", b"\r\n", b"\n\n"))
    data = newline.join(rows) + newline if suffix != ".json" else b"[" + b", ".join(rows) + b"]"
    return source | {"path": rng.choice(NAMES) + suffix}, spoil(rng, data)


def feed_files(world, source, data):
    source = sources.Source(**source)
    path = world.folder / source.path
    path.write_bytes(data)
    try:
        rows = sources.find_source(source, world.folder)[0]()
        prepare_rows(world, source, rows, len(rows))
    finally:
        path.unlink()


def make_parquet(rng):
    import pyarrow as pa
    import pyarrow.parquet as pq

    source, plain = source_of(rng), {"compression": "none", "use_dictionary": False}  # flips reach the text
    rows = [row_of(rng, source["schema"]) for _ in range(3)]
    try:
        pq.write_table(pa.Table.from_pylist(rows), file := io.BytesIO(), **plain)
    except (pa.ArrowException, ValueError, TypeError, AttributeError, OverflowError):  # no column holds such values
        text = json.dumps({"messages": TEXTS})
        table = pa.table({"query": [text], "prompt": [text], "response": [text], "messages": [[1]], "from": ["x"]})
        pq.write_table(table, file := io.BytesIO(), **plain)
    return source | {"path": rng.choice(NAMES) + ".parquet"}, spoil(rng, file.getvalue())


def make_huge(_):
    return (100,)


def feed_huge(world, megabytes):
    """Read a row of that size from a JSONL file, and from a JSON array whose other row is good."""
    row = b'{"query": "a", "response": "' + b"x" * megabytes * 10**6 + b'"}'
    for name, data in (("huge.jsonl", row), ("huge.json", b'[{"query": "a", "response": "b"}, %b]' % row)):
        feed_files(world, {"name": "huge", "path": name, "schema": "query/response", "examples": "all"}, data)


def make_texts(rng):
    turns = []
    for role in ["system", "user", "assistant", "user", "assistant"][rng.randrange(2) :]:
        text = ""
        for _ in range(rng.randrange(10)):
            letters = rng.choice("".join(TEXTS)), chr(rng.randrange(0xD800)), chr(rng.randrange(0xE000, 0x110000))
            text += rng.choice((rng.choice(TEXTS), *letters))
        turns.append((role, text.strip()))
    return rng.randrange(2), turns


def feed_texts(world, which, turns):
    encoder, chatml = world.encoders[which], world.chatml
    conversation = encoder.encode([turns])[0]
    assert conversation is not None, "text became a control token"
    expected = 2 * len(turns) + sum(2 for role, text in turns if role == "assistant" and chatml.has_think_block(text))
    assert sum(encoder.is_control[ids].sum() for turn in conversation for ids, _ in turn) == expected


def make_mixture(rng):
    mixture = [
        {"name": "a", "path": rng.choice(NAMES) + ".jsonl", "schema": "messages", "examples": "all", "seed": 1},
        {"name": "b", "path": "b.json", "schema": "query/response", "examples": 10, "repeat": 2, "exclude": {"x": [1]}},
        {"name": "c", "hub": "o/n", "config": "d", "revision": "main", "split": "train", "schema": "messages"},
        {"name": "d", "hub": "o/n", "file": "e.json", "schema": "conversations", "examples": 5},
    ]
    return rng.choice(NAMES) + ".json", json_bytes(rng, mixture[: rng.randrange(5)])


def feed_mixture(world, name, data):
    path = world.folder / name
    path.write_bytes(data)
    mixture, folder = sources.read_mixture(str(path))
    for source in mixture:
        print(source.name)
        json.dumps(dataclasses.asdict(source))
        if source.path is not None:
            sources.find_source(source, folder)


def make_checkpoints(rng):
    files = {".metadata": b"not opened", "__0_0.distcp": b"weights"}
    state = json.dumps({"step": 2, "updates": 2, "settings": {}, "fingerprints": {"base": "x"}}).encode()
    files["state.json"] = rng.choice((state, json_bytes(rng, json.loads(state))))
    manifest = {name: [len(data), hashlib.sha256(data).hexdigest()] for name, data in files.items()}
    if rng.random() < 0.8:
        return files | {"manifest.json": json_bytes(rng, manifest)}
    return files | {"manifest.json": json.dumps(manifest).encode()}


def feed_checkpoints(world, files):
    checkpoints, step = world.checkpoints, world.folder / "run" / "step_000002"
    step.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (step / name).write_bytes(data)
    problem = checkpoints.defect(step)
    assert problem is None or (isinstance(problem, str) and problem)
    assert (checkpoints.latest_whole(step.parent) is None) == bool(problem)
    assert isinstance(checkpoints.verify(step), dict)


def make_report(rng):
    tokenizer = dict.fromkeys(hf_folder.TOKENIZER_FILES) | {"tokenizer.json": hashlib.sha256(b"{}").hexdigest()}
    state = {"fingerprints": {"data": "x", "base": "y"}, "settings": {"SEED": 1, "SEQUENCES_PER_STEP": 32}}
    files = {
        "data/report.json": {"tokenizer_sha256": tokenizer, "vocab_size": 10, "digest": {"train": "x"}},
        "base/config.json": {"vocab_size": 10, "hidden_size": 8},
        "base/generation_config.json": {"eos_token_id": [1]},
        "out/run.json": state,
    }
    files = {name: json.dumps(value).encode() for name, value in files.items()}
    name = rng.choice(list(files))
    return state, files | {name: json_bytes(rng, json.loads(files[name]))}


def feed_report(world, state, files):
    for name, data in {**files, "data/tokenizer/tokenizer.json": b"{}", "base/tokenizer.json": b"{}"}.items():
        (world.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (world.folder / name).write_bytes(data)
    (world.folder / "base/x.safetensors").touch()
    report = system.read_json(world.folder / "data" / "report.json", "prepare_data.py")
    world.sft_v1.check_inputs(str(world.folder / "data"), report, str(world.folder / "base"))
    state = world.sft_v1.State(**state, versions={}, world_size=1)
    world.sft_v1.check_folder(world.folder / "out", state)


def results_of():
    """Return a run's files: lm_eval's results and logged questions, and run.json; the scores are made up."""
    scores = {"arc_easy": {"acc": [1.0, 0.0, 1.0]}, "own": {"acc": [0.0, 1.0, 1.0], "score": [0.5, 0.25, 0.75]}}
    scores["lambada_openai"] = {"acc": [1.0, 1.0, 0.0], "perplexity": [-1.0, -2.0, -3.0]}
    results, files = {}, {}
    for task, metrics in scores.items():
        results[task] = {"alias": task}
        for metric, values in metrics.items():
            mean = sum(values) / 3
            results[task] |= {f"{metric},none": math.exp(-mean) if metric == "perplexity" else mean}
            results[task][f"{metric}_stderr,none"] = 0.1
        sample = {"doc": {"q": 1}, "filter": "none", "filtered_resps": [["-1.0"]], "arguments": {"a": {}, "b": {}}}
        own = [{metric: values[n] for metric, values in metrics.items()} for n in range(3)]
        files[f"m/samples_{task}_1.jsonl"] = [sample | {"doc_id": n} | own[n] for n in range(3)]
    results["group"] = {"alias": "group", "acc,none": 2 / 3, "acc_stderr,none": 0.2}
    files["m/results_1.json"] = {
        "results": results,
        "group_subtasks": {"group": ["own", "arc_easy"]},
        "configs": {t: {"output_type": "multiple_choice", "metric_list": [{"metric": "acc"}]} for t in scores},
        "versions": dict.fromkeys(results, 1.0),
        "n-shot": dict.fromkeys(results, 0),
        "higher_is_better": {task: dict.fromkeys(metrics, True) for task, metrics in scores.items()},
        "config": {"model_args": {"pretrained": "x"}, "batch_size": 1, "limit": None},
        "lm_eval_version": "0.4.13",
        "model_name": "x",
        "task_hashes": dict.fromkeys(scores, "same"),
    }
    return files | {"run.json": {"adds_bos": False, "files_sha256": {"a.safetensors": "x"}, "versions": {"torch": "2"}}}


def make_results(rng):
    sides = []
    name = rng.choice((*results_of(), *["m/results_1.json"] * 4))
    seed = rng.random()
    for side in range(2):  # usually both alike: compare_evals exits before it compares runs that differ
        own = random.Random(seed if rng.random() < 0.8 else side)
        files = results_of()
        for part, value in files.items():
            if not part.endswith("l"):
                files[part] = json_bytes(own, value) if part == name else json.dumps(value).encode()
            elif part == name:
                lines = [encoded(own, damage(own, sample) if own.random() < 0.5 else sample) for sample in value]
                files[part] = spoil(own, b"\n".join(lines))
            else:
                files[part] = b"\n".join(json.dumps(v).encode() for v in value)
        sides.append(files)
    return sides


def feed_results(world, *sides):
    folders = [world.folder / "before", world.folder / "after"]
    for folder, files in zip(folders, sides, strict=True):
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "m").mkdir(parents=True)
        for name, data in files.items():
            (folder / name).write_bytes(data)
    with contextlib.suppress(OverflowError):  # integers such as 10**400, which lm_eval cannot write
        parts, flips = world.compare_evals.compare_folders(*folders)
        json.dumps([parts, flips])
        world.compare_evals.markdown(parts, ["after"], []).encode()


def make_tokenizer(rng):
    config = {"tokenizer_class": "X", "model_max_length": 2048, "bos_token": "<s>", "eos_token": {"content": "</s>"}}
    config |= {"unk_token": "<unk>", "pad_token": None, "chat_template": JINJA, "added_tokens_decoder": {}}
    config["auto_map"] = {"AutoTokenizer": ["evil.X", None]}
    return json_bytes(rng, config)


def feed_tokenizer(world, data):
    base = world.folder / "base_with_code"
    if not base.exists():
        shutil.copytree(world.folder / "spm", base)
        (base / "chat_template.jinja").write_text(JINJA)
        (base / "evil.py").write_text("open('X', 'w')")
    (base / "tokenizer_config.json").write_bytes(data)
    rules = {"TRAIN_ON_SPECIAL_TOKENS": True, "KEEP_PAST_THINKING": True}
    try:
        world.prepare_data.build_encoder(rules | {"BASE_MODEL": str(base)}, world.folder / "saved")
    finally:
        assert not Path("X").exists(), "the base's template or code was run"


# ==== All of it ====


def make(kind, seed, number):
    """Return the input `number` of a kind, a tuple: what its feed_* takes."""
    parts = globals()[f"make_{kind}"](random.Random(f"{kind} {seed} {number}"))
    return tuple(parts) if isinstance(parts, tuple | list) else (parts,)


def write_base(folder, byte_level):
    """Write a tokenizer of a few hundred tokens, byte-level or as converted from SentencePiece, as a base folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

    names = ["<unk>", "<s>", "</s>", "[INST]"]
    if byte_level:
        tokenizer, alphabet = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel.alphabet()
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=names, initial_alphabet=alphabet)
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        tokens = names + [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=tokens)
    tokenizer.train_from_iterator([__doc__, *TEXTS], trainer)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in names]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    if not byte_level:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def build_world(folder):
    """Return what every feed_* needs: the suite's modules, two encoders, and a folder to work in, the current one."""
    import datasets

    import prepare_data
    import sft_v1
    from sft.data import conversations
    from sft.evaluation import compare_evals
    from sft.training import checkpoints

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it reports every Parquet file, past redirect_stderr
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    bases = [write_base(folder / "byte_level", True), write_base(folder / "spm", False)]
    encoders = [chatml.Encoder(*chatml.extend_tokenizer(base, True, True), True, True) for base in bases]
    names = {
        m.__name__.rpartition(".")[2]: m
        for m in (chatml, checkpoints, compare_evals, conversations, prepare_data, sft_v1)
    }
    return SimpleNamespace(folder=folder, encoders=encoders, **names)


def feed(world, kind, parts):
    """Give one input to its readers; return None, or what was neither an answer nor a refusal in a sentence."""
    reader = "files" if kind == "parquet" else kind
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")  # as strict as a terminal
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        try:
            globals()[f"feed_{reader}"](world, *parts)
        except SystemExit as error:
            sentence = error.code if isinstance(error.code, str) else ""
            return None if sentence.strip() and "Traceback" not in sentence else f"SystemExit says only {error.code!r}"
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # pyo3's panics are no Exception
            frames = [frame for frame in traceback.extract_tb(error.__traceback__) if of_the_suite(frame.filename)]
            line = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "here"
            return f"{type(error).__name__}: {error} ({line})"[:300]


def of_the_suite(path):
    """Return whether the file `path` is a script at the root or under sft/."""
    return Path(path).parent == common.ROOT or common.ROOT / "sft" in Path(path).parents


def fuzz(inputs, seed, folder):
    """Feed `inputs` inputs to all readers; print each kind's figures; return (number of inputs, of failures)."""
    fed = failed = 0
    world, before = build_world(folder), os.getcwd()
    os.chdir(folder)
    try:
        for kind, share in SHARES.items():
            started, failures = time.perf_counter(), []
            count = max(1, round(inputs * share))
            for number in range(count):
                parts = make(kind, seed, number)
                problem = feed(world, kind, parts)
                if problem:
                    failures.append(f"  {kind} {number}: {problem}\n    {reprlib.repr(parts)}")
            fed, failed = fed + count, failed + len(failures)
            seconds = time.perf_counter() - started
            print(f"{kind:12} {count:7,} inputs {seconds:7.1f} s {len(failures):5} failures", flush=True)
            print("\n".join(failures[:20]), end="\n" if failures else "")
    finally:
        os.chdir(before)
    return fed, failed


def main():
    common.machine()
    with tempfile.TemporaryDirectory() as folder:
        inputs, tracebacks = fuzz(2_000 if QUICK else INPUTS, SEED, Path(folder))
    common.result(inputs=inputs, tracebacks=tracebacks)
    sys.exit(bool(tracebacks))


if __name__ == "__main__":
    settings.from_flags(globals())
    main()
