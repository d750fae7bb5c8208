"""ChatML: the template, the extended tokenizer, and the encoder that places every control token itself.

A conversation is `<|im_start|>role\\ncontent<|im_end|>\\n` per turn. Text is data: whatever it spells, it never becomes
a control token. Used by prepare_data.py.
"""

import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, models
from transformers import PreTrainedTokenizerFast

from sft import hf_folder, system

# ==== Facts ====

CHATML = ("<|im_start|>", "<|im_end|>")
THINK = ("<think>", "</think>")
WORD_CACHE = 200_000  # words
TEMPLATE = Path(__file__).with_name("chat_template.jinja")


# ==== Tokenizer and template ====


def chat_template(adds_bos, train_on_special_tokens, keep_past_thinking):
    """Return the ChatML template (Jinja): the file, with the three settings filled in on its first line."""
    _, body = TEMPLATE.read_text(encoding="utf-8").split("\n", 1)
    values = ["true" if value else "false" for value in (adds_bos, train_on_special_tokens, keep_past_thinking)]
    return f"{{%- set bos, train_im_end, keep_past_thinking = {', '.join(values)} -%}}\n{body}"


def extend_tokenizer(folder, train_on_special_tokens, keep_past_thinking):
    """Return the base tokenizer in `folder` with the missing control tokens appended and the chat template set.

    The tokenizer.json is taken as it is: loading it as its `tokenizer_class` may replace its pre-tokenizer.
    Raises: SystemExit if there is no readable tokenizer.json.
    """
    try:
        backend = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
        named = hf_folder.token_names(
            json.loads((Path(folder) / "tokenizer_config.json").read_text(encoding="utf-8")), folder
        )
    except Exception as error:  # the tokenizers library raises plain Exception
        raise SystemExit(
            f"{folder}: no readable tokenizer.json and tokenizer_config.json ({error}). Name the base's folder with "
            "--base-tokenizer."
        ) from None
    bos_id = backend.token_to_id(named["bos"]) if named["bos"] else None
    adds_bos = bos_id is not None and backend.encode("a").ids[:1] == [bos_id]
    named = {name: token or None for name, token in named.items()}  # transformers asks for the id of "" without end
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


def text_state(backend, prefix):
    """Return the tokenizer.json (dict) of a copy of the `Tokenizer` that knows no control token in text.

    prefix: True for text that follows a control token, False for text that goes on after other text: there, nothing
    may be put in front of it (Metaspace's "▁", a Prepend normalizer, ByteLevel's space).
    """
    state = json.loads(backend.to_str())
    for token in state["added_tokens"]:
        token["special"] |= bool(token["content"].strip())  # encode_special_tokens acts on special tokens only

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
    return state


def clone(state):
    """Return the `Tokenizer` of a text_state()."""
    copy = Tokenizer.from_str(json.dumps(state))
    if state["model"]["type"] == "BPE":  # it remembers 10,000 words unless told; real text has more
        options = {name: value for name, value in state["model"].items() if name != "type" and value is not None}
        options["merges"] = [tuple(pair) for pair in options["merges"]]
        copy.model = models.BPE(**options, cache_capacity=WORD_CACHE)
    copy.encode_special_tokens = True
    return copy


def controls(token):
    """Return whether an added token stands for something; runs of spaces, which some tokenizers add, are text."""
    return token.special or bool(token.content.strip())


def thinks(content):
    """Return whether `content` begins with one well-paired <think> block; any other marker in it is text."""
    return content.startswith(THINK[0]) and all(content.count(marker) == 1 for marker in THINK)


class Encoder:
    """Encodes conversations by segments: control ids are placed here, all else is text.

    A segment is (ids: array of `id_type`, whether it is trained); a turn is a list of segments.
    """

    def __init__(self, tokenizer, adds_bos, train_on_special_tokens, keep_past_thinking):
        backend = tokenizer.backend_tokenizer
        self.id_type = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
        states = [text_state(backend, prefix) for prefix in (True, False)]
        self.after_control = clone(states[0])
        self.after_text = self.after_control if states[0] == states[1] else clone(states[1])
        added = backend.get_added_tokens_decoder()
        unknown = tokenizer.unk_token_id  # what text may become: a character that the model does not know
        self.control = [place for place, token in added.items() if controls(token) and place != unknown]
        self.is_control = np.zeros(max(len(tokenizer), *self.control) + 1, bool)
        self.is_control[self.control] = True
        self.names = [added[place].content for place in self.control]
        ids = {token: backend.token_to_id(token) for token in CHATML + THINK}
        self.start, self.end, self.think, self.unthink = ids.values()
        self.bos = [tokenizer.bos_token_id] if adds_bos else []
        self.train_special, self.keep_past_thinking = train_on_special_tokens, keep_past_thinking
        *headers, self.newline = (
            self.after_control.encode(text, add_special_tokens=False).ids
            for text in ("system\n", "user\n", "assistant\n", "\n")
        )
        self.headers = dict(zip(("system", "user", "assistant"), headers, strict=True))
        array = self.array
        self.heads = {role: (array([self.start, *header]), False) for role, header in self.headers.items()}
        self.marks = [(array([self.think]), self.train_special), (array([self.unthink]), self.train_special)]
        self.ends = {
            True: [(array([self.end]), self.train_special), (array(self.newline), False)],
            False: [(array([self.end, *self.newline]), False)],
        }

    def array(self, ids):
        """Return `ids` as an array of the smallest unsigned type that holds the vocabulary."""
        return np.array(ids, self.id_type)

    def encode(self, batch):
        """Encode a batch of conversations. batch: list of lists of (role, content), trimmed.

        Returns: for each conversation the list of its turns, or None where text became a control token, which no
        tokenizer known does.
        """
        texts, plans = ([], []), []  # texts that follow a control token, texts that follow text
        for turns in batch:
            last_user = max((i for i, (role, _) in enumerate(turns) if role == "user"), default=-1)
            plans.append([self.plan(role, text, texts, i < last_user) for i, (role, text) in enumerate(turns)])
        encoded = [self.ids_of(self.after_control, texts[0]), self.ids_of(self.after_text, texts[1])]
        return [
            None if self.forged(plan, encoded) else [self.assemble(*turn, encoded) for turn in plan] for plan in plans
        ]

    def plan(self, role, content, texts, earlier):
        """Queue the texts of a turn in `texts`; return (role, places in there, whether it is reasoning and answer)."""
        if role == "assistant" and thinks(content):
            reasoning, answer = content[len(THINK[0]) :].split(THINK[1])
            if self.keep_past_thinking or not earlier:
                texts[0].extend((reasoning, answer))
                return role, (len(texts[0]) - 2, len(texts[0]) - 1), True
            content = answer.strip()
        texts[1].append(content)
        return role, (len(texts[1]) - 1,), False

    def ids_of(self, copy, texts):
        """Return (list of the ids of each text, set of the places of texts with a control id), encoded by `copy`."""
        encodings = copy.encode_batch_fast(texts, add_special_tokens=False)
        lengths = [len(encoding) for encoding in encodings]
        flat = itertools.chain.from_iterable(encoding.ids for encoding in encodings)
        flat = np.fromiter(flat, self.id_type, sum(lengths))
        ends = list(itertools.accumulate(lengths, initial=0))
        forged = np.searchsorted(ends, np.flatnonzero(self.is_control[flat]), side="right") - 1
        return [flat[begin:end] for begin, end in itertools.pairwise(ends)], set(forged.tolist())

    def forged(self, plan, encoded):
        """Return whether any text of the planned turns holds a control id."""
        return any(place in encoded[not marked][1] for _, places, marked in plan for place in places)

    def assemble(self, role, places, marked, encoded):
        """Return the segments of one turn."""
        trained = role == "assistant"
        segments = [(encoded[not marked][0][place], trained) for place in places]
        if marked:
            segments = [self.marks[0], segments[0], self.marks[1], segments[1]]
        return [self.heads[role], *segments, *self.ends[trained]]

    def visible_text(self, role, content):
        """Return `content` without the markers of its own think block: where a control token's name would be text."""
        if role == "assistant" and thinks(content):
            return content.replace(THINK[0], "").replace(THINK[1], "")
        return content


def laid(bos, turns):
    """Return one conversation as (ids, mask: bool), arrays [tokens], from its BOS (list of ids) and its turns."""
    segments = [(np.array(bos, turns[0][0][0].dtype), False), *itertools.chain.from_iterable(turns)]
    lengths = [len(ids) for ids, _ in segments]
    return np.concatenate([ids for ids, _ in segments]), np.repeat([trained for _, trained in segments], lengths)


def self_test(tokenizer, encoder):
    """Compare the encoder with the saved tokenizer's own template on edge contents; return a line that says the result.

    Where ids differ it shows why: a piece of the template's that crosses a newline, else the first place that differs.
    Raises: SystemExit if plain text holds a special token, or if even the generation prompt differs: the model would
    then be asked in other ids than it learnt.
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
    crossing, unexplained = [], []  # what the template has where ids differ: pieces with a newline and more; others
    for text in contents:
        turns = [("system", "Be brief."), ("user", text), ("assistant", f"<think>\n{text}\n</think>\n\n{text}")]
        turns += [("user", f"{text} again"), ("assistant", text)]
        messages = [{"role": role, "content": content} for role, content in turns]
        encoded = encoder.encode([turns])[0]
        if encoded is None:
            raise SystemExit(f"self-test: a special token of the base is plain text: {text!r} holds it.")
        ids, mask = laid(encoder.bos, encoded)
        made = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        if np.array_equal(ids, made["input_ids"]):
            trainable = encoder.train_special | ~encoder.is_control[ids]
            equal, masks = equal + 1, masks + np.array_equal(mask, np.array(made["assistant_masks"], bool) & trainable)
        else:
            more = [tokenizer.decode([place]) for place in Counter(made["input_ids"]) - Counter(ids.tolist())]
            crossing += (found := [piece for piece in more if "\n" in piece and piece != "\n"])
            unexplained += [] if found else [(made["input_ids"], ids.tolist())]
        prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
        if prompt[-len(header) :] != header:
            raise SystemExit(f"self-test: the generation prompt ends in {prompt[-len(header) :]}, trained is {header}.")
    line = f"self-test: of {len(contents)} conversations, {equal} have the saved template's ids, {masks} its masks too"
    if crossing:
        line += f"; pieces of this tokenizer cross newlines ({crossing[0]!r}), and the generation prompt's ids, which "
        line += "inference sees, go before"
    if unexplained:
        place = next(i for i, pair in enumerate(itertools.zip_longest(*unexplained[0])) if pair[0] != pair[1])
        theirs, ours = (tokenizer.decode(ids[place : place + 3]) for ids in unexplained[0])
        line += f"; WARNING: {len(unexplained)} differ although no piece crosses a newline: from token {place} on, the "
        line += f"template has {theirs!r}, trained is {ours!r}; inference gives earlier turns the template's ids"
    if masks < equal:
        line += "; its masks follow character offsets, which byte fallback blurs, ours are placed turn by turn"
    return line


# ==== Cutting ====


def length(segments):
    """Return the number of tokens in a list of segments (ids, trained)."""
    return sum(len(ids) for ids, _ in segments)


def clip(segments, size):
    """Return the first `size` tokens of a list of segments."""
    kept = []
    for ids, trained in segments:
        kept.append((ids[:size], trained))
        size = max(0, size - len(ids))
    return kept


def cut(head, turns, max_seq_len, overflow):
    """Return (the sequences of one conversation, list of what was lost of it).

    Each sequence is a list of segments (ids, trained) with at most `max_seq_len` tokens, some of them trained; there is
    none if the conversation does not fit.

    head: the segments before the first turn (a BOS, or none); turns: list of segments each. Splitting keeps exchanges
    (a user turn and its answer) whole and repeats the system turn; an exchange longer than the window is cut at its end
    and gets no invented end.
    """
    if len(turns) % 2:  # questions and answers come in pairs, so the odd one is the system turn
        head, turns = head + turns[0], turns[1:]
    pieces, sizes = [head], [head_size := length(head)]
    for question, answer in zip(turns[::2], turns[1::2], strict=True):
        size = length(question) + length(answer)
        if overflow == "split" and sizes[-1] + size > max_seq_len and len(pieces[-1]) > len(head):
            pieces.append(head)
            sizes.append(head_size + size)
        else:
            sizes[-1] += size
        pieces[-1] = pieces[-1] + question + answer
    long = max(sizes) > max_seq_len
    if long and overflow == "drop":
        return [], []
    if long:
        pieces = [clip(piece, max_seq_len) for piece in pieces]
    kept = [piece for piece in pieces if any(trained and len(ids) for ids, trained in piece)]
    lost = ["end cut off at the window"] if long else []
    return kept, lost + (["exchange without a trained token in the window left out"] if len(kept) < len(pieces) else [])


STOP = CHATML[1]


def special_ids(folder, tokenizer):
    """Return {"bos" | "eos" | "pad": id or None} of the prepared tokenizer. Raises: SystemExit if it cannot stop."""
    tokens = hf_folder.token_names(system.read_json(Path(folder) / "tokenizer_config.json", "prepare_data.py"), folder)
    ids = {kind: tokens[kind] and tokenizer.token_to_id(tokens[kind]) for kind in ("bos", "eos", "pad")}
    if tokens["eos"] != STOP or ids["eos"] is None:
        raise SystemExit(f"{folder} ends turns with {tokens['eos']!r}, not {STOP}: name prepare_data.py's tokenizer.")
    if ids["pad"] in (None, ids["eos"]):
        raise SystemExit(
            f"{folder} pads with {tokens['pad']!r}; it must be a token other than {STOP}, which collators would mask. "
            "Run prepare_data.py again."
        )
    return ids
