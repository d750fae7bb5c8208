"""How fast is prepare_data.py? Against the bare tokenizer and against TRL, on real text, on the same cores, in turn.

    python benchmarks/prepare.py            three rounds over all of ShareGPT
    python benchmarks/prepare.py --quick    one round over 1,500 rows, for a look

raw    `tokenizers.encode_batch_fast` over the strings that ours encodes; only these calls count
ours   prepare_data.py as a whole process, from the file to the finished folder, less its start-up (`--help`)
TRL    SFTTrainer in .venv-benchmarks, from load_dataset to the tokenised dataset, on the conversations that ours reads

raw_ratio is raw's seconds over ours: the strings are the same, but of some of them no token comes out of ours
(duplicates, ends beyond the window). tokens_per_s and trl_ratio count the tokens that come out. Reads and writes
benchmarks/work/.
"""

import json
import os
import shutil
import sys
import time

import common

from sft import settings
from sft.data import conversations, sources

# ---- Size ----
ROUNDS = 3  # of raw, start-up and ours; the medians count
TRL_ROUNDS = 3  # of TRL, the slowest part, in the first rounds
ROWS = 0  # of the file's start; 0 = all
QUICK = False  # one round over 1,500 rows
# ---- What is prepared ----
MAX_SEQ_LEN = 2048  # tokens
BATCH_SIZES = ("2000", "8000")  # strings per call, tried for raw; the one with the better median counts

# ==== Inputs ====

FOLDER = common.WORK / "prepare"
SOURCE = {"name": "sharegpt", "schema": "conversations", "examples": "all"}
MESSAGES = FOLDER / "messages.jsonl"


def write_inputs(source, rows, array):
    """Write the conversations that can be used as MESSAGES, and the first `rows` rows as the JSON array `array`.

    source: path of ShareGPT. Returns: how many conversations were written.
    """
    sharegpt = sources.Source(**SOURCE, path=str(source))
    open_rows, _ = sources.find_source(sharegpt, common.ROOT)
    stored, kept = open_rows(), 0
    first = stored.take(range(min(rows or len(stored), len(stored))))
    if rows:
        array.write_text(json.dumps([row for row, _ in first]), encoding="utf-8")
    with MESSAGES.open("w", encoding="utf-8") as messages:
        for row, unreadable in first:
            if unreadable:
                continue
            turns, reason = conversations.read_turns(row, sharegpt)
            if reason or conversations.reason_to_reject(turns, sharegpt.schema):
                continue
            turns, _ = conversations.repair(turns)
            if turns:
                row = [{"role": role, "content": content} for role, content in turns]
                messages.write(json.dumps({"messages": row}) + "\n")
                kept += 1
    return kept


# ==== The three ====


def raw(tokenizer_file, batch_sizes):
    """Return (tokens, {batch size: seconds in encode_batch_fast}) for the strings of MESSAGES; runs in a child."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    from tokenizers import Tokenizer

    with MESSAGES.open(encoding="utf-8") as lines:
        texts = [turn["content"] for line in lines for turn in json.loads(line)["messages"]]
    seconds = {}
    for size in batch_sizes:
        tokenizer = Tokenizer.from_file(tokenizer_file)  # a new one each time: it remembers words
        tokens = seconds[size] = 0
        for start in range(0, len(texts), size):
            batch = texts[start : start + size]
            begin = time.perf_counter()
            encoded = tokenizer.encode_batch_fast(batch, add_special_tokens=False)
            seconds[size] += time.perf_counter() - begin
            tokens += sum(map(len, encoded))
    return tokens, seconds


def timed(*command, **options):
    """Run a command; return its seconds and what it printed."""
    begin = time.perf_counter()
    printed = common.run(*command, **options)
    return time.perf_counter() - begin, printed


def ours(base, mixture, output):
    """Return (seconds of the start-up, seconds of the rest, the report) of prepare_data.py."""
    command = [sys.executable, "prepare_data.py"]
    startup, _ = timed(*command, "--help")
    shutil.rmtree(output, ignore_errors=True)
    command += ["--base-model", base, "--mixture", mixture, "--data-dir", output, "--max-seq-len", MAX_SEQ_LEN]
    whole, _ = timed(*command, "--validation-conversations", 1, *common.DECONTAMINATION_OFF)
    return startup, whole - startup, json.loads((output / "report.json").read_text(encoding="utf-8"))


def trl(python, tokenizer):
    """Return (seconds, tokens, sequences) of TRL."""
    command = [python, "benchmarks/peer_trl.py", "--messages", MESSAGES, "--tokenizer", tokenizer]
    printed = common.run(*command, "--max-seq-len", MAX_SEQ_LEN)
    figures = json.loads(printed.strip().splitlines()[-1])
    return figures["seconds"], figures["tokens"], figures["sequences"]


# ==== Main ====


def one_round(base, mixture, python, with_trl):
    """Measure each once, in turn; print and return the figures and the report of ours."""
    output = FOLDER / "prepared"
    startup, our_seconds, report = ours(base, mixture, output)
    tokenizer = output / "tokenizer"
    raw_tokens, by_size = common.in_child(raw, str(tokenizer / "tokenizer.json"), tuple(map(int, BATCH_SIZES)))
    tokens = report["totals"]["tokens"]
    figures = {"startup_seconds": startup, "ours_seconds": our_seconds, "ours_tokens_per_s": tokens / our_seconds}
    for size, seconds in by_size.items():
        figures |= {f"raw_{size}_seconds": seconds, f"raw_{size}_ratio": seconds / our_seconds}
        print(f"raw: {raw_tokens:,} tokens in {seconds:.1f} s, {size} strings per call", flush=True)
    print(f"ours: {tokens:,} tokens in {our_seconds:.1f} s after {startup:.1f} s of start-up", flush=True)
    if with_trl:
        seconds, trl_tokens, sequences = trl(python, tokenizer)
        figures |= {"trl_seconds": seconds, "trl_tokens_per_s": trl_tokens / seconds}
        figures["raw_to_trl"] = raw_tokens / min(by_size.values()) / figures["trl_tokens_per_s"]
        figures["trl_ratio"] = figures["ours_tokens_per_s"] / figures["trl_tokens_per_s"]
        print(f"TRL: {trl_tokens:,} tokens in {sequences:,} sequences in {seconds:.1f} s", flush=True)
    return figures, report


def main(args):
    """Fetch the inputs, measure the rounds, print the medians and the RESULT line."""
    rows, rounds = (1500, 1) if QUICK else (ROWS, ROUNDS)
    common.machine()
    python, base, source = common.peers_python(), common.base_folder(), common.sharegpt()
    FOLDER.mkdir(parents=True, exist_ok=True)
    array, mixture = FOLDER / "rows.json", FOLDER / "mixture.json"
    usable = common.in_child(write_inputs, source, rows, array)
    path = str(array if rows else source)
    mixture.write_text(json.dumps([SOURCE | {"path": path}]))
    measured = []
    for number in range(rounds):
        print(f"round {number + 1} of {rounds}", flush=True)
        figures, report = one_round(base, mixture, python, number < TRL_ROUNDS)
        measured.append(figures)
    line = report["sources"][0]
    print(f"read {line['read']:,} = kept {line['kept']:,} + rejected {line['rejected']:,}; raw and TRL got {usable:,}")
    if line["read"] != line["kept"] + line["rejected"] or (rows and line["read"] != rows):
        raise SystemExit(f"The report does not add up: report.json says {line}.")
    middle = common.medians(measured)
    print("medians:", ", ".join(f"{key} {value:,.2f}" for key, value in middle.items()))
    best = min((middle[f"raw_{size}_seconds"], middle[f"raw_{size}_ratio"]) for size in BATCH_SIZES)
    print(
        f"TRL's seconds are {middle['trl_seconds'] / middle['ours_seconds']:.1f} times ours; the bare tokenizer makes"
    )
    print(f"{middle['raw_to_trl']:.1f} times TRL's tokens per second: no preparation that uses it can do more")
    common.result(
        tokens_per_s=round(middle["ours_tokens_per_s"]),
        raw_ratio=round(best[1], 3),
        trl_ratio=round(middle["trl_ratio"], 2),
    )


if __name__ == "__main__":
    main(settings.from_flags(globals()))
