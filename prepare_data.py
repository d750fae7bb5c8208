"""Step 1: turn conversations from several sources into token ids with assistant masks, and extend the tokenizer.

Reads   the base model's tokenizer and the sources of the mixture (the hub, or local JSONL, JSON and Parquet files).
Writes  data/sft_v1/: a `datasets` folder (train, validation), tokenizer/, report.json, report.md, rejected.jsonl.

    python prepare_data.py                                   the Genesis mixture
    python prepare_data.py --mixture demo/mixture.json       another one
    python prepare_data.py --show 2                          look at two finished sequences per source

A conversation is ChatML: `<|im_start|>role\\ncontent<|im_end|>\\n` per turn. Trained are the assistant's content and
the `<|im_end|>` that closes it, nothing else. Text is data: whatever it spells, it never becomes a control token.
"""

import hashlib
import itertools
import json
import platform
import re
import shutil
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import tokenizers
import transformers
from tokenizers import AddedToken, Tokenizer
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

import checkpoints
import conversations
import settings

# ---- Files ----
BASE_TOKENIZER = "models/base"  # folder with the base's tokenizer.json and tokenizer_config.json
OUTPUT_DIR = "data/sft_v1"  # folder to write; it must not hold anything yet
# ---- Mixture ----
# A source has a name, where it is ("hub" with "config", "revision", "split", or "path" of a local file, relative to the
# mixture file), its schema (SCHEMAS in conversations.py), "examples" (conversations kept for training, or "all"), and
# optionally "seed" (of the draw) and "repeat" (times each conversation is trained).
# fmt: off
MIXTURE = [  # the sources; as a flag, the path of a JSON file with such a list
    {"name": "constitutional", "path": "data/constitutional.jsonl",
     "schema": "messages", "examples": 10_000, "seed": 42},
    {"name": "smoltalk", "hub": "HuggingFaceTB/smoltalk", "config": "smol-magpie-ultra", "revision": "main",
     "split": "train", "schema": "messages", "examples": 100_000, "seed": 42},
    {"name": "openhermes", "hub": "teknium/OpenHermes-2.5", "revision": "main",
     "split": "train", "schema": "conversations", "examples": 200_000, "seed": 42},
    {"name": "tulu", "hub": "allenai/tulu-3-sft-mixture", "revision": "main",
     "split": "train", "schema": "messages", "examples": 100_000, "seed": 42},
    {"name": "metamath", "hub": "meta-math/MetaMathQA", "revision": "main",
     "split": "train", "schema": "query/response", "examples": 50_000, "seed": 42},
]
# fmt: on
VALIDATION_CONVERSATIONS = 100  # per source, beside its examples; at most a tenth of a source that gives "all"
# ---- Sequences ----
MAX_SEQ_LEN = 2048  # tokens; the base's context
OVERFLOW = "split"  # longer conversations: "split" at turn boundaries | "truncate" at the end | "drop"
TRAIN_ON_SPECIAL_TOKENS = True  # train the closing <|im_end|> and the think markers; without it no model learns to stop
KEEP_PAST_THINKING = True  # keep <think> blocks of earlier assistant turns, in training and in the template alike
# ---- A look at the result ----
SHOW = 0  # print this many finished sequences per source from OUTPUT_DIR and stop; 0 = prepare

# ==== Facts ====

CHATML = ("<|im_start|>", "<|im_end|>")
THINK = ("<think>", "</think>")
BATCH = 2000  # rows encoded at once; bounds memory, and gives every core enough to do


# ==== Tokenizer and template ====


def chat_template(adds_bos, train_on_special_tokens, keep_past_thinking):
    """Return the ChatML template (Jinja), with the generation marks that give `assistant_masks`."""
    end = "<|im_end|>{% endgeneration %}" if train_on_special_tokens else "{% endgeneration %}<|im_end|>"
    forget = (
        "{%- if not keep and loop.index0 < last.user and text.startswith('<think>') and text.count('<think>') == 1 "
        "and text.count('</think>') == 1 %}{% set text = text.split('</think>')[1] | trim %}{% endif -%}"
    )
    return (
        ("{{- bos_token -}}" if adds_bos else "")
        + "{%- set last = namespace(user=-1) -%}{%- for message in messages -%}"
        + "{%- if message.role == 'user' %}{% set last.user = loop.index0 %}{% endif -%}{%- endfor -%}"
        + "{%- set keep = "
        + ("true" if keep_past_thinking else "false")
        + " -%}"
        + "{%- for message in messages -%}{%- set text = message.content | trim -%}"
        + "{%- if message.role == 'assistant' -%}"
        + forget
        + "{{- '<|im_start|>assistant\\n' -}}{% generation %}{{- text -}}"
        + end
        + "{%- else -%}{{- '<|im_start|>' + message.role + '\\n' + text + '<|im_end|>' -}}{%- endif -%}"
        + "{{- '\\n' -}}{%- endfor -%}"
        + "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
    )


def extend_tokenizer(folder, train_on_special_tokens, keep_past_thinking):
    """Return the base tokenizer in `folder` with the missing control tokens appended and the chat template set.

    The tokenizer.json is taken as it is: loading it as its `tokenizer_class` may replace its pre-tokenizer.
    Raises: SystemExit if there is no readable tokenizer.json.
    """
    try:
        backend = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
        config = json.loads((Path(folder) / "tokenizer_config.json").read_text(encoding="utf-8"))
    except Exception as error:  # the tokenizers library raises plain Exception
        raise SystemExit(
            f"{folder}: no readable tokenizer.json and tokenizer_config.json ({error}). Name the base's folder with "
            "--base-tokenizer."
        ) from None
    named = {name: config.get(f"{name}_token") for name in ("bos", "eos", "unk", "pad")}
    named = {name: token["content"] if isinstance(token, dict) else token for name, token in named.items()}
    bos_id = backend.token_to_id(named["bos"]) if named["bos"] else None
    adds_bos = bos_id is not None and backend.encode("a").ids[:1] == [bos_id]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in CHATML])
    backend.add_tokens([AddedToken(token, normalized=False, special=False) for token in THINK])
    backend.no_truncation()
    backend.no_padding()
    # Padding must differ from <|im_end|>: collators mask the padding token, and the model would never learn to stop.
    candidates = [named["pad"], named["unk"], named["eos"], CHATML[0]]
    pad = next(token for token in candidates if token and token != CHATML[1] and backend.token_to_id(token) is not None)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=named["bos"],
        eos_token=CHATML[1],
        unk_token=named["unk"],
        pad_token=pad,
        chat_template=chat_template(adds_bos, train_on_special_tokens, keep_past_thinking),
        clean_up_tokenization_spaces=False,
    ), adds_bos


def clone(backend, prefix):
    """Return a copy of the `Tokenizer` that knows no control token in text.

    prefix: True for text that follows a control token, False for text that goes on after other text: there, nothing
    may be put in front of it (Metaspace's "▁", a Prepend normalizer, ByteLevel's space).
    """
    state = json.loads(backend.to_str())
    for token in state["added_tokens"]:
        token["special"] = True  # encode_special_tokens acts on special tokens only

    def visit(node):
        if not isinstance(node, dict):
            return node
        if node.get("type") == "Metaspace" and (not prefix or node.get("prepend_scheme") == "first"):
            node["prepend_scheme"] = "never"
        if node.get("type") == "ByteLevel" and not prefix:
            node["add_prefix_space"] = False
        for key in ("normalizers", "pretokenizers"):
            if key in node:
                node[key] = [part for part in map(visit, node[key]) if part]
        return None if node.get("type") == "Prepend" and not prefix else node

    if state["model"]["type"] == "Unigram":  # its lattice finds the pieces "<s>" and "</s>" in plain text
        control = {token["id"] for token in state["added_tokens"]}
        pieces = state["model"]["vocab"]
        state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] >= len(pieces)]
        state["model"]["vocab"] = [
            [f"\U0010fffd{place}\U0010fffd", score] if place in control else [piece, score]
            for place, (piece, score) in enumerate(pieces)
        ]
    state["normalizer"], state["pre_tokenizer"] = visit(state["normalizer"]), visit(state["pre_tokenizer"])
    copy = Tokenizer.from_str(json.dumps(state))
    copy.encode_special_tokens = True
    return copy


def thinks(content):
    """Return whether `content` begins with one well-paired <think> block; any other marker in it is text."""
    return content.startswith(THINK[0]) and all(content.count(marker) == 1 for marker in THINK)


class Encoder:
    """Encodes conversations by segments: control ids are placed here, all else is text."""

    def __init__(self, tokenizer, adds_bos, train_on_special_tokens, keep_past_thinking):
        backend = tokenizer.backend_tokenizer
        self.after_control, self.after_text = clone(backend, True), clone(backend, False)
        self.start, self.end, self.think, self.unthink = (backend.token_to_id(token) for token in CHATML + THINK)
        self.bos = [tokenizer.bos_token_id] if adds_bos else []
        self.train_special, self.keep_past_thinking = train_on_special_tokens, keep_past_thinking
        self.control = np.array(sorted(backend.get_added_tokens_decoder()))
        texts = [f"{role}\n" for role in ("system", "user", "assistant")] + ["\n"]
        *headers, self.newline = (self.after_control.encode(t, add_special_tokens=False).ids for t in texts)
        self.headers = dict(zip(("system", "user", "assistant"), headers, strict=True))
        names = sorted(backend.get_added_tokens_decoder().values(), key=lambda token: -len(token.content))
        self.control_text = re.compile("|".join(re.escape(token.content) for token in names))

    def encode(self, batch):
        """Encode a batch of conversations. batch: list of lists of (role, content), trimmed.

        Returns: for each conversation a list of turns (ids: list of int, mask: list of bool).
        """
        texts, plans = ([], []), []  # texts that follow a control token, texts that follow text
        for turns in batch:
            last_user = max((i for i, (role, _) in enumerate(turns) if role == "user"), default=-1)
            plans.append([self.plan(role, text, texts, i < last_user) for i, (role, text) in enumerate(turns)])
        encoded = [
            [encoding.ids for encoding in copy.encode_batch_fast(part, add_special_tokens=False)]
            for copy, part in zip((self.after_control, self.after_text), texts, strict=True)
        ]
        return [[self.assemble(role, parts, encoded) for role, parts in plan] for plan in plans]

    def plan(self, role, content, texts, earlier):
        """Queue the texts of a turn in `texts`; return (role, parts): control ids and places in `texts`."""
        if role == "assistant" and thinks(content):
            reasoning, answer = content[len(THINK[0]) :].split(THINK[1])
            if self.keep_past_thinking or not earlier:
                texts[0].extend((reasoning, answer))
                return role, (self.think, (0, len(texts[0]) - 2), self.unthink, (0, len(texts[0]) - 1))
            content = answer.strip()
        texts[1].append(content)
        return role, ((1, len(texts[1]) - 1),)

    def assemble(self, role, parts, encoded):
        """Return (ids, mask) of one turn from its `parts` and the `encoded` texts."""
        trained = role == "assistant"
        ids = [self.start, *self.headers[role]]
        mask = [False] * len(ids)
        for part in (*parts, self.end):
            if isinstance(part, int):
                ids.append(part)
                mask.append(trained and self.train_special)
            else:
                ids += (text := encoded[part[0]][part[1]])
                mask += [trained] * len(text)
        return ids + self.newline, mask + [False] * len(self.newline)

    def names_control(self, role, content):
        """Return whether `content` spells a control token that is not the marker of its own think block."""
        if role == "assistant" and thinks(content):
            content = content.replace(THINK[0], "").replace(THINK[1], "")
        return self.control_text.search(content) is not None

    def expected_control_ids(self, turns):
        """Return how many control ids the turns (role, content) demand: two each, two more for a think block."""
        last_user = max((i for i, (role, _) in enumerate(turns) if role == "user"), default=-1)
        kept = [
            role == "assistant" and thinks(content) and (self.keep_past_thinking or i > last_user)
            for i, (role, content) in enumerate(turns)
        ]
        return 2 * (len(turns) + sum(kept))


def self_test(tokenizer, encoder):
    """Compare the encoder with the saved tokenizer's own template on edge contents; return a line that says the result.

    Raises: SystemExit if even the generation prompt differs: the model would then be asked in other ids than it learnt.
    """
    contents = [
        "1234567.89",
        "naïve 😀👍🏽 e\u0301",
        "def f(x):\n    return x\n\n\n# end",
        "日本語 中文",
        "a  b\tc",
        "<b>",
    ]
    header = [encoder.start, *encoder.headers["assistant"]]
    equal = masks = 0
    for text in contents:
        turns = [("system", "Be brief."), ("user", text), ("assistant", f"<think>\n{text}\n</think>\n\n{text}")]
        turns += [("user", f"{text} again"), ("assistant", text)]
        messages = [{"role": role, "content": content} for role, content in turns]
        encoded = encoder.encode([turns])[0]
        ids = np.array(encoder.bos + [i for part, _ in encoded for i in part])
        mask = [False] * len(encoder.bos) + [trained for _, part in encoded for trained in part]
        made = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        if np.array_equal(ids, made["input_ids"]):
            trainable = encoder.train_special | ~np.isin(ids, encoder.control)
            equal, masks = equal + 1, masks + np.array_equal(mask, np.array(made["assistant_masks"], bool) & trainable)
        prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
        if prompt[-len(header) :] != header:
            raise SystemExit(f"self-test: the generation prompt ends in {prompt[-len(header) :]}, trained is {header}.")
    line = f"self-test: of {len(contents)} conversations, {equal} have the saved template's ids, {masks} its masks too"
    if equal < len(contents):
        line += (
            "; this tokenizer's pieces cross newlines, and the generation prompt's ids, which inference sees, go before"
        )
    elif masks < equal:
        line += "; its masks follow character offsets, which byte fallback blurs, ours are placed turn by turn"
    return line


# ==== Sequences ====


def cut(bos, turns, encoded, max_seq_len, overflow):
    """Return (the sequences (ids, mask) of one conversation, list of what was lost of it).

    Each sequence is at most `max_seq_len` long and has trained tokens; the list is empty if the conversation fits.

    turns: (role, content); encoded: (ids, mask) of each turn. Splitting keeps exchanges (a user turn and its answer)
    whole and repeats the system turn; an exchange longer than the window is cut at its end and gets no invented end.
    """
    has_system = turns[0][0] == "system"
    head = (bos + encoded[0][0], [False] * len(bos) + encoded[0][1]) if has_system else (bos, [False] * len(bos))
    rest = encoded[has_system:]
    exchanges = [tuple(a + b for a, b in zip(*rest[i : i + 2], strict=True)) for i in range(0, len(rest), 2)]
    pieces = [head]
    for ids, mask in exchanges:
        ids_so_far, mask_so_far = pieces[-1]
        full = len(ids_so_far) + len(ids) > max_seq_len
        if full and overflow == "split" and len(ids_so_far) > len(head[0]):
            pieces.append((head[0] + ids, head[1] + mask))
        else:
            pieces[-1] = (ids_so_far + ids, mask_so_far + mask)
    if overflow == "drop" and len(pieces[0][0]) > max_seq_len:
        return [], []
    long = any(len(ids) > max_seq_len for ids, _ in pieces)
    pieces = [(ids[:max_seq_len], mask[:max_seq_len]) for ids, mask in pieces]
    kept = [(ids, mask) for ids, mask in pieces if any(mask[1:])]
    lost = ["end cut off at the window"] if long else []
    return kept, lost + (["exchange without a trained token in the window left out"] if len(kept) < len(pieces) else [])


# ==== Writing ====


class Split:
    """One split on its way to disk: an Arrow stream, and the digest of ids, masks and sources in order."""

    def __init__(self, path, id_type):
        self.id_type = id_type
        fields = {"input_ids": pa.list_(id_type), "assistant_masks": pa.list_(pa.bool_()), "source": pa.string()}
        self.schema = pa.schema(fields)
        self.stream = pa.ipc.new_stream(str(path), self.schema)
        self.hashes = [hashlib.sha256() for _ in range(3)]

    def write(self, sequences, source):
        """Append a list of (ids, mask) of one source."""
        if not sequences:
            return
        lengths = np.array([len(ids) for ids, _ in sequences], np.int32)
        ids = np.concatenate([np.array(ids, np.uint32) for ids, _ in sequences])
        mask = np.concatenate([np.array(mask, bool) for _, mask in sequences])
        offsets = pa.array(np.cumsum([0, *lengths], dtype=np.int32))
        columns = [
            pa.ListArray.from_arrays(offsets, pa.array(ids.astype(self.id_type.to_pandas_dtype()))),
            pa.ListArray.from_arrays(offsets, pa.array(mask)),
            pa.array([source] * len(sequences)),
        ]
        self.stream.write_table(pa.table(columns, schema=self.schema))
        for part, data in zip(self.hashes, (ids, mask, lengths), strict=True):
            part.update(data.tobytes())
        self.hashes[2].update(source.encode())

    def close(self):
        """Finish the stream; return the digest, 64 hex digits."""
        self.stream.close()
        return hashlib.sha256("".join(part.hexdigest() for part in self.hashes).encode()).hexdigest()


def prepare_source(source, rows, encoder, splits, ledger, run):
    """Read rows in a drawn order until the source has given its number; write sequences and ledger.

    Returns: the source's line of the report. Raises: SystemExit if the source has too few usable rows.
    """
    wanted, name = source["examples"], source["name"]
    held_out = run["VALIDATION_CONVERSATIONS"]
    if wanted == "all":
        held_out = min(held_out, len(rows) // 10)
    order = np.random.default_rng(source.get("seed", 42)).permutation(len(rows))
    goal = len(rows) if wanted == "all" else wanted + held_out
    line = Counter(read=0, kept=0, rejected=0, conversations=0, validation_conversations=0, sequences=0, tokens=0)
    line.update(trainable_tokens=0, control_text=0)
    reasons, changes = Counter(), Counter()
    bar = tqdm(total=goal, desc=name, unit="row", dynamic_ncols=True)
    start = 0
    while start < len(order) and line["kept"] < goal:
        batch = []
        for number in order[start : start + min(BATCH, goal - line["kept"])].tolist():
            turns, reason = conversations.read_turns(rows, number, source["schema"])
            reason = reason or next((text for text, holds in conversations.REJECTIONS if holds(turns)), None)
            repaired, changed = conversations.repair(turns) if reason is None else (turns, [])
            if reason is None and not repaired:
                reason = "no assistant turn after a user turn"
            batch.append([number, repaired, reason, changed])
        start += len(batch)
        good = [entry for entry in batch if entry[2] is None]
        sequences = []
        for entry, encoded in zip(good, encoder.encode([entry[1] for entry in good]), strict=True):
            found = np.isin(np.concatenate([ids for ids, _ in encoded]), encoder.control).sum()
            pieces, lost = cut(encoder.bos, entry[1], encoded, run["MAX_SEQ_LEN"], run["OVERFLOW"])
            if found != encoder.expected_control_ids(entry[1]):
                entry[2] = "text became a control token"
            elif not pieces:
                entry[2] = "longer than the window" if run["OVERFLOW"] == "drop" else "nothing trainable in the window"
            else:
                sequences.append(pieces)
                changes.update(entry[3] + lost)
                line["control_text"] += any(encoder.names_control(role, text) for role, text in entry[1])
        for number, turns, reason, _ in batch:
            if reason:
                reasons[reason] += 1
                words = next((str(text) for _, text in turns), "")[:80].encode("utf-8", "replace").decode()
                ledger.write(json.dumps({"source": name, "row": number, "reason": reason, "start": words}) + "\n")
        for_validation = max(0, held_out - line["kept"])
        splits["validation"].write([s for pieces in sequences[:for_validation] for s in pieces], name)
        trained = [s for pieces in sequences[for_validation:] for s in pieces] * source.get("repeat", 1)
        splits["train"].write(trained, name)
        line.update(read=len(batch), kept=len(sequences), rejected=len(batch) - len(sequences))
        line.update(validation_conversations=len(sequences[:for_validation]))
        line.update(conversations=len(sequences[for_validation:]), sequences=len(trained))
        line.update(tokens=sum(len(ids) for ids, _ in trained))
        line.update(trainable_tokens=sum(sum(mask) for _, mask in trained))
        bar.update(len(sequences))
    bar.close()
    told = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common()) or "none rejected"
    if wanted != "all" and line["kept"] < goal:
        raise SystemExit(
            f"{name}: {wanted:,} conversations and {held_out:,} for validation were asked, {line['kept']:,} of "
            f'{line["read"]:,} rows can be used ({told}). Lower "examples" or say "all".'
        )
    if not line["sequences"]:
        raise SystemExit(f"{name}: none of {line['read']:,} rows can be trained on ({told}). Is its schema right?")
    return {"name": name, **line, "reasons": dict(reasons), "changes": dict(changes)}


def report_markdown(report):
    """Return report.md: the table of the sources, their rejections and changes."""
    columns = ("read", "rejected", "conversations", "sequences", "tokens", "trainable_tokens")
    total = report["totals"]["trainable_tokens"]
    lines = [
        "| source | read | rejected | conversations | sequences | tokens | trainable tokens | trainable | share |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for line in [*report["sources"], {"name": "all", **report["totals"]}]:
        numbers = " | ".join(f"{line[column]:,}" for column in columns)
        percent = line["trainable_tokens"] / line["tokens"]
        lines.append(f"| {line['name']} | {numbers} | {percent:.1%} | {line['trainable_tokens'] / total:.1%} |")
    lines += ["", "trainable: share of the source's tokens; share: of all trainable tokens.", ""]
    for line in report["sources"]:
        for kind, what in (("reasons", "rejected"), ("changes", "kept, changed")):
            lines += [f"- {line['name']}: {count:,} {what}: {text}" for text, count in line[kind].items()]
        if line["control_text"]:
            lines.append(f"- {line['name']}: {line['control_text']:,} kept, with the name of a control token as text")
    return "\n".join(lines) + "\n"


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
    known = {"name", "path", "hub", "config", "revision", "split", "schema", "examples", "seed", "repeat"}
    for place, source in enumerate(mixture, start=1):
        name = f"source {place} ({source.get('name')})"
        if unknown := sorted(set(source) - known):
            raise SystemExit(f"{name} has the unknown key {unknown[0]!r}; known are {', '.join(sorted(known))}.")
        if not isinstance(source.get("name"), str) or not source["name"]:
            raise SystemExit(f'{name} needs a "name".')
        if ("path" in source) == ("hub" in source):
            raise SystemExit(f'{name} needs either "path" or "hub".')
        texts = [key for key in ("path", "hub", "config", "revision", "split") if key in source]
        if wrong := [key for key in texts if not isinstance(source[key], str)]:
            raise SystemExit(f"{name}: {wrong[0]} is {source[wrong[0]]!r}; it must be text.")
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
    if run["OVERFLOW"] not in ("split", "truncate", "drop"):
        raise SystemExit(f"OVERFLOW is {run['OVERFLOW']!r}; it must be split, truncate or drop.")
    for name, least in (("MAX_SEQ_LEN", 16), ("VALIDATION_CONVERSATIONS", 1), ("SHOW", 0)):
        if run[name] < least:
            raise SystemExit(f"{name} is {run[name]}; it must be at least {least}.")


# ==== A look at the result ====


def show(folder, number):
    """Print `number` sequences per source from the finished `folder`, trained text in green."""
    try:
        data = datasets.load_from_disk(str(folder))["train"]
        tokenizer = PreTrainedTokenizerFast.from_pretrained(Path(folder) / "tokenizer")
    except (OSError, ValueError) as error:
        raise SystemExit(f"{folder} holds no finished data ({error}). Run prepare_data.py first.") from None
    sources = np.array(data["source"])
    for source in dict.fromkeys(sources.tolist()):
        for place in np.flatnonzero(sources == source)[:number].tolist():
            row = data[place]
            ids, mask = row["input_ids"], np.array(row["assistant_masks"])
            print(f"\n---- {source}, sequence {place}: {len(ids)} tokens, {mask.sum()} trained ----")
            edges = [0, *(np.flatnonzero(mask[1:] != mask[:-1]) + 1).tolist(), len(ids)]
            for begin, end in itertools.pairwise(edges):
                text = tokenizer.decode(ids[begin:end])
                print(f"\033[32m{text}\033[0m" if mask[begin] else text, end="")
    print()


# ==== Main ====


def build_encoder(run, folder):
    """Extend the base's tokenizer, save it in `folder`, test it. Returns: (saved and reloaded tokenizer, Encoder)."""
    rules = run["TRAIN_ON_SPECIAL_TOKENS"], run["KEEP_PAST_THINKING"]
    tokenizer, adds_bos = extend_tokenizer(run["BASE_TOKENIZER"], *rules)
    tokenizer.save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)  # what others will load
    encoder = Encoder(tokenizer, adds_bos, *rules)
    placed = ", ".join(f"{token} {tokenizer.convert_tokens_to_ids(token)}" for token in CHATML + THINK)
    print(f"tokenizer: {len(tokenizer):,} tokens; {placed}; {'begins with' if adds_bos else 'no'} BOS")
    print(self_test(tokenizer, encoder))
    return tokenizer, encoder


def prepare(run, sources, folder, staging):
    """Write everything into the empty folder `staging`; return the report. folder: what the sources' paths start from.

    Raises: SystemExit with the source that is wrong, OSError if the disk is full.
    """
    (staging / "spool").mkdir()
    tokenizer, encoder = build_encoder(run, staging / "tokenizer")
    opened = [
        conversations.open_source(s, folder, staging / "spool" / f"{place}.jsonl") for place, s in enumerate(sources)
    ]
    id_type = pa.uint16() if len(tokenizer) <= 2**16 else pa.uint32()
    splits = {name: Split(staging / "spool" / f"{name}.arrow", id_type) for name in ("train", "validation")}
    with (staging / "rejected.jsonl").open("w", encoding="utf-8") as ledger:
        lines = [
            prepare_source(source, rows, encoder, splits, ledger, run)
            for source, rows in zip(sources, opened, strict=True)
        ]
    digest = {name: split.close() for name, split in splits.items()}
    finished = {name: datasets.Dataset.from_file(str(staging / "spool" / f"{name}.arrow")) for name in splits}
    datasets.DatasetDict(finished).save_to_disk(staging)
    shutil.rmtree(staging / "spool")
    report = {
        "settings": run,
        "versions": {"python": platform.python_version()}
        | {m.__name__: m.__version__ for m in (tokenizers, transformers, datasets)},
        "tokenizer_sha256": checkpoints.sha256(staging / "tokenizer" / "tokenizer.json"),
        "base_tokenizer": run["BASE_TOKENIZER"],
        "base_vocab_size": Tokenizer.from_file(str(Path(run["BASE_TOKENIZER"]) / "tokenizer.json")).get_vocab_size(),
        "vocab_size": len(tokenizer),
        "max_seq_len": run["MAX_SEQ_LEN"],
        "digest": digest,
        "sources": lines,
        "totals": {key: sum(line[key] for line in lines) for key, value in lines[0].items() if isinstance(value, int)},
    }
    (staging / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (staging / "report.md").write_text(report_markdown(report), encoding="utf-8")
    return report


def main(run):
    """Prepare the mixture as the settings `run` (dict) say, or show what was prepared."""
    validate_settings(run)
    if SHOW:
        show(OUTPUT_DIR, SHOW)
        return
    sources, folder = read_mixture(MIXTURE)
    output = Path(OUTPUT_DIR)
    with checkpoints.staged(output) as staging:
        report = prepare(run, sources, folder, staging)
    digest = report["digest"]
    print(f"\n{report_markdown(report)}\ndigest: train {digest['train'][:16]}, validation {digest['validation'][:16]}")
    print(f"written: {output}; rejected rows one by one in {output}/rejected.jsonl")


if __name__ == "__main__":
    main(settings.from_flags(globals()))
