"""ChatML: the template, the extended tokenizer, and the encoder that places every control token itself.

A conversation is `<|im_start|>role\\ncontent<|im_end|>\\n` per turn; a document of plain text has no markers. Text is
data: whatever it spells, it never becomes a control token. Used by prepare_data.py; resize_vocab.py and export_hf.py
read the special tokens through it.
"""

import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, models
from transformers import PreTrainedTokenizerFast

from sft import hf_folder, system
from sft.data.conversations import ASSISTANT, MASKED

# ==== Constants ====

CHATML = ("<|im_start|>", "<|im_end|>")
THINK = ("<think>", "</think>")
STOP = CHATML[1]  # what ends a turn, and so generation
TEMPLATE = Path(__file__).with_name("chat_template.jinja")
WORD_CACHE = 200_000  # words that a BPE tokenizer remembers; its default of 10,000 is too few for real text


# ==== Tokenizer and template ====


def chat_template(adds_bos, train_on_special_tokens, keep_past_thinking):
    """Return the ChatML template (Jinja): the file, with the three settings filled in on its first line."""
    _, body = TEMPLATE.read_text(encoding="utf-8").split("\n", 1)
    values = ["true" if value else "false" for value in (adds_bos, train_on_special_tokens, keep_past_thinking)]
    return f"{{%- set bos, train_im_end, keep_past_thinking = {', '.join(values)} -%}}\n{body}"


def extend_tokenizer(folder, train_on_special_tokens, keep_past_thinking):
    """Return (the base tokenizer in `folder` with the missing control tokens and the chat template, adds_bos).

    adds_bos: whether the base's tokenizer puts a BOS in front of a text. The tokenizer.json is taken as it is: loading
    it as its `tokenizer_class` may replace its pre-tokenizer.
    Raises: SystemExit if there is no readable tokenizer.json and tokenizer_config.json, or an id would mean two tokens.
    """
    try:
        backend = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
        config = json.loads((Path(folder) / "tokenizer_config.json").read_text(encoding="utf-8"))
        names = hf_folder.token_names(config, folder)
    except Exception as error:  # the tokenizers library raises plain Exception
        raise SystemExit(
            f"{folder}: no readable tokenizer.json and tokenizer_config.json ({error}). Name the base's folder with "
            "--base-model."
        ) from None
    bos_id = backend.token_to_id(names["bos"]) if names["bos"] else None
    adds_bos = bos_id is not None and backend.encode("a").ids[:1] == [bos_id]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in CHATML])
    backend.add_tokens([AddedToken(token, normalized=False, special=False) for token in THINK])
    check_ids(backend, folder)
    backend.no_truncation()
    backend.no_padding()
    # Padding must differ from <|im_end|>: collators mask the padding token, and the model would never learn to stop.
    candidates = [names["pad"], names["unk"], names["eos"], CHATML[0]]
    pad = next(token for token in candidates if token and token != STOP and backend.token_to_id(token) is not None)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=names["bos"] or None,  # with "", transformers would ask for its id without end
        eos_token=STOP,
        unk_token=names["unk"] or None,
        pad_token=pad,
        chat_template=chat_template(adds_bos, train_on_special_tokens, keep_past_thinking),
        clean_up_tokenization_spaces=False,
    )
    return tokenizer, adds_bos


def check_ids(backend, folder):
    """Raise SystemExit if a control token of the extended `backend`, of the base in `folder`, has another token's id.

    The tokenizers library counts tokens to find the next id; a vocabulary with holes has that id already.
    """
    names = {}
    for name, token_id in backend.get_vocab(with_added_tokens=True).items():
        if names.setdefault(token_id, name) != name and {name, names[token_id]} & {*CHATML, *THINK}:
            raise SystemExit(
                f"{folder}: {names[token_id]!r} and {name!r} would both have the id {token_id}, because the ids of its "
                "tokenizer have holes. Fill them with unused tokens."
            )


def special_ids(folder, tokenizer):
    """Return {"bos" | "eos" | "pad": id or None} of the prepared tokenizer. Raises: SystemExit if it cannot stop."""
    config = system.read_json(Path(folder) / "tokenizer_config.json", "prepare_data.py")
    names = hf_folder.token_names(config, folder)
    ids = {kind: names[kind] and tokenizer.token_to_id(names[kind]) for kind in ("bos", "eos", "pad")}
    if names["eos"] != STOP or ids["eos"] is None:
        raise SystemExit(f"{folder} ends turns with {names['eos']!r}, not {STOP}. Name prepare_data.py's tokenizer.")
    if ids["pad"] in (None, ids["eos"]):
        raise SystemExit(
            f"{folder} pads with {names['pad']!r}; it must be a token other than {STOP}, which collators would mask. "
            "Run prepare_data.py again."
        )
    return ids


# ==== A tokenizer for text only ====


def text_state(backend, after):
    """Return the tokenizer.json (dict) of a copy of the `Tokenizer` that finds no control token in text.

    after: what the text follows: None for a document, which the base's tokenizer sees as it is; "control" for a control
    token; "text" for other text, where nothing may be put in front of it (Metaspace's "▁", a Prepend normalizer,
    ByteLevel's space).
    """
    state = json.loads(backend.to_str())
    for token in state["added_tokens"]:
        token["special"] |= bool(token["content"].strip())  # encode_special_tokens acts on special tokens only
    if state["model"]["type"] == "Unigram":  # its lattice finds the pieces "<s>" and "</s>" in plain text
        control_ids = {token["id"] for token in state["added_tokens"]}
        pieces = state["model"]["vocab"]
        state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] >= len(pieces)]
        for index in control_ids.intersection(range(len(pieces))):
            pieces[index][0] = f"\U0010fffd{index}\U0010fffd"
    if after:
        for part in ("normalizer", "pre_tokenizer"):
            state[part] = without_prefix(state[part], after)
    return state


def without_prefix(part, after):
    """Return a normalizer or pre-tokenizer (JSON: dict or None) without what it puts in front of a text.

    After a control token only Metaspace's scheme "first" is taken away: to the tokenizer, no text there is the first.
    after: as in `text_state`.
    """
    if part is None:
        return None
    if part["type"] == "Prepend" and after == "text":
        return None
    if part["type"] == "Metaspace" and (after == "text" or part.get("prepend_scheme") == "first"):
        part["prepend_scheme"] = "never"
    if part["type"] == "ByteLevel" and after == "text":
        part["add_prefix_space"] = False
    for key in ("normalizers", "pretokenizers"):
        if key in part:
            children = [without_prefix(child, after) for child in part[key]]
            part[key] = [child for child in children if child]
    return part


def text_tokenizer(state):
    """Return the `Tokenizer` of a text_state()."""
    tokenizer = Tokenizer.from_str(json.dumps(state))
    if state["model"]["type"] == "BPE":
        options = {name: value for name, value in state["model"].items() if name != "type" and value is not None}
        options["merges"] = [tuple(pair) for pair in options["merges"]]
        tokenizer.model = models.BPE(**options, cache_capacity=WORD_CACHE)
    tokenizer.encode_special_tokens = True
    return tokenizer


# ==== Encoder ====


def is_control(token):
    """Return whether an added token has a meaning; runs of spaces, which some tokenizers add, are text."""
    return token.special or bool(token.content.strip())


def has_think_block(content):
    """Return whether `content` begins with one well-paired <think> block; any other marker in it is text."""
    return content.startswith(THINK[0]) and all(content.count(marker) == 1 for marker in THINK)


class Encoder:
    """Encodes conversations and documents by segments: control ids are placed here, all else is text.

    A segment is (ids: array of `id_type`, whether it is trained); a turn is a list of segments.
    """

    def __init__(self, tokenizer, adds_bos, train_on_special_tokens, keep_past_thinking):
        backend = tokenizer.backend_tokenizer
        ids = max(backend.get_vocab(with_added_tokens=True).values()) + 1  # more than tokens, if there are holes
        self.id_type = np.uint16 if ids <= 2**16 else np.uint32
        self.train_special, self.keep_past_thinking = train_on_special_tokens, keep_past_thinking
        # Copies for text that follows a control token, for text that follows text, and for documents (often the same).
        states = [text_state(backend, after) for after in ("control", "text", None)]
        self.after_control = text_tokenizer(states[0])
        self.after_text = self.after_control if states[0] == states[1] else text_tokenizer(states[1])
        self.document = self.after_control if states[0] == states[2] else text_tokenizer(states[2])
        # The control ids. The unknown token isn't one: text may become it, where the model lacks a character.
        added = backend.get_added_tokens_decoder()
        unknown = tokenizer.unk_token_id
        control_ids = [token_id for token_id, token in added.items() if is_control(token) and token_id != unknown]
        self.is_control = np.zeros(ids, bool)
        self.is_control[control_ids] = True
        self.names = [added[token_id].content for token_id in control_ids]
        self.start, self.end, self.think, self.unthink = map(backend.token_to_id, CHATML + THINK)
        self.bos = [tokenizer.bos_token_id] if adds_bos else []
        # The fixed segments of a turn.
        self.headers = {role: self.header_ids(f"{role}\n") for role in ("system", "user", "assistant")}
        self.headers[MASKED] = self.headers["assistant"]
        newline = self.header_ids("\n")
        self.heads = {role: (self.array([self.start, *ids]), False) for role, ids in self.headers.items()}
        self.markers = [(self.array([token_id]), self.train_special) for token_id in (self.think, self.unthink)]
        self.ends = {
            True: [(self.array([self.end]), self.train_special), (self.array(newline), False)],
            False: [(self.array([self.end, *newline]), False)],
        }

    def header_ids(self, text):
        """Return the ids (list) of a piece of the template."""
        return self.after_control.encode(text, add_special_tokens=False).ids

    def array(self, ids):
        """Return `ids` as an array of the smallest unsigned type that holds the vocabulary."""
        return np.array(ids, self.id_type)

    def encode(self, batch):
        """Encode a batch of conversations. batch: list of lists of (role, content), trimmed.

        Returns: for each conversation the list of its turns, or None where text became a control token, which no
        tokenizer known does.
        """
        texts = {True: [], False: []}  # follows a control token?: the texts
        plans = [self.plan(turns, texts) for turns in batch]
        encoded, control_texts = {}, {}
        encoded[True], control_texts[True] = self.encode_texts(self.after_control, texts[True])
        encoded[False], control_texts[False] = self.encode_texts(self.after_text, texts[False])
        conversations = []
        for plan in plans:
            if self.holds_control_id(plan, control_texts):
                conversations.append(None)
            else:
                conversations.append([self.assemble(*turn, encoded) for turn in plan])
        return conversations

    def encode_documents(self, texts):
        """Return for each document (str) its ids, an array, as the base's tokenizer gives them; None as in `encode`."""
        documents, control_texts = self.encode_texts(self.document, texts)
        return [None if index in control_texts else ids for index, ids in enumerate(documents)]

    def plan(self, turns, texts):
        """Append the texts of a conversation to `texts`; return for each turn (role, think_block, indices).

        think_block: whether the turn is two texts, reasoning and answer; indices: where they are in texts[think_block].
        """
        last_user = max((i for i, (role, _) in enumerate(turns) if role == "user"), default=-1)
        plan = []
        for i, (role, content) in enumerate(turns):
            parts, think_block = [content], False
            if role in ASSISTANT and has_think_block(content):
                reasoning, answer = content[len(THINK[0]) :].split(THINK[1])
                think_block = self.keep_past_thinking or i > last_user
                parts = [reasoning, answer] if think_block else [answer.strip()]
            first = len(texts[think_block])
            texts[think_block].extend(parts)
            plan.append((role, think_block, range(first, first + len(parts))))
        return plan

    def encode_texts(self, tokenizer, texts):
        """Return (list of the ids of each text, set of the indices of texts with a control id)."""
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        lengths = [len(encoding) for encoding in encodings]
        flat = itertools.chain.from_iterable(encoding.ids for encoding in encodings)
        flat = np.fromiter(flat, self.id_type, sum(lengths))
        ends = list(itertools.accumulate(lengths, initial=0))
        control_texts = np.searchsorted(ends, np.flatnonzero(self.is_control[flat]), side="right") - 1
        return [flat[begin:end] for begin, end in itertools.pairwise(ends)], set(control_texts.tolist())

    def holds_control_id(self, plan, control_texts):
        """Return whether any text of the planned turns holds a control id."""
        return any(index in control_texts[think_block] for _, think_block, indices in plan for index in indices)

    def assemble(self, role, think_block, indices, encoded):
        """Return the segments of one turn."""
        trained = role == "assistant"
        segments = [(encoded[think_block][index], trained) for index in indices]
        if think_block:
            markers = [(ids, special and trained) for ids, special in self.markers]
            segments = [markers[0], segments[0], markers[1], segments[1]]
        return [self.heads[role], *segments, *self.ends[trained]]

    def visible_text(self, role, content):
        """Return `content` without the markers of its own think block: where a control token's name would be text."""
        if role in ASSISTANT and has_think_block(content):
            return content.replace(THINK[0], "").replace(THINK[1], "")
        return content


# ==== Segments: joining and cutting ====


def concatenate(bos, turns):
    """Return one conversation as (ids, mask: bool), arrays [tokens], from its BOS (list of ids) and its turns."""
    segments = [(np.array(bos, turns[0][0][0].dtype), False), *itertools.chain.from_iterable(turns)]
    lengths = [len(ids) for ids, _ in segments]
    return np.concatenate([ids for ids, _ in segments]), np.repeat([trained for _, trained in segments], lengths)


def length(segments):
    """Return the number of tokens in a list of segments."""
    return sum(len(ids) for ids, _ in segments)


def clip(segments, size):
    """Return the first `size` tokens of a list of segments."""
    kept = []
    for ids, trained in segments:
        kept.append((ids[:size], trained))
        size = max(0, size - len(ids))
    return kept


def cut(head, turns, max_seq_len, overflow):
    """Cut one conversation into sequences of at most `max_seq_len` tokens.

    head: the segments before the first turn (a BOS, or none); turns: list of segments each; overflow: "split",
    "truncate" or "drop". Splitting keeps exchanges (a user turn and its answer) whole and repeats the system turn; an
    exchange longer than the window is cut at its end and gets no invented end.

    Returns: (sequences, each a list of segments of which some are trained, list of what was lost). There may be no
    sequence; "drop" gives None in their place to a conversation that does not fit.
    """
    if len(turns) % 2:  # questions and answers come in pairs, so the odd one is the system turn
        head, turns = head + turns[0], turns[1:]
    head_size = length(head)
    pieces, sizes = [head], [head_size]
    for question, answer in zip(turns[::2], turns[1::2], strict=True):
        size = length(question) + length(answer)
        if overflow == "split" and sizes[-1] + size > max_seq_len and len(pieces[-1]) > len(head):
            pieces.append(head)
            sizes.append(head_size)
        pieces[-1] = pieces[-1] + question + answer
        sizes[-1] += size
    lost = []
    if max(sizes) > max_seq_len:
        if overflow == "drop":
            return None, []
        pieces = [clip(piece, max_seq_len) for piece in pieces]
        lost.append("end cut off at the window")
    kept = [piece for piece in pieces if any(trained and len(ids) for ids, trained in piece)]
    if len(kept) < len(pieces):
        lost.append("exchange without a trained token in the window left out")
    return kept, lost


def cut_document(head, ids, max_seq_len, overflow):
    """Cut a document of plain text into sequences of at most `max_seq_len` tokens; each begins with `head`.

    head: list of segments (a BOS, or an empty one); ids: array, the document's; overflow: as in `cut`. All of the text
    is trained but the first token of a sequence without a BOS, which nothing predicts.
    Returns: as `cut` does.
    """
    head_size = length(head)
    room, first = max_seq_len - head_size, 0 if head_size else 1
    windows = [ids[begin : begin + room] for begin in range(0, len(ids), room)]
    lost = []
    if len(windows) > 1 and overflow == "drop":
        return None, []
    if len(windows) > 1 and overflow == "truncate":
        windows, lost = windows[:1], ["end cut off at the window"]
    sequences = [[*head, (window[:first], False), (window[first:], True)] for window in windows if len(window) > first]
    return sequences, lost


# ==== Self-test ====

PROBES = ("1234567.89", "naïve 😀👍🏽 e\u0301", "def f(x):\n    return x\n\n\n# end", "日本語 中文", "a  b\tc", "<b>")


def self_test(tokenizer, encoder):
    """Compare the encoder with the saved tokenizer's own template on edge cases; return a line with the result.

    Where ids differ, the line shows why: a piece of the template that crosses a newline, or else the first token that
    differs.
    Raises: SystemExit if plain text holds a special token, or if even the generation prompt differs: inference would
    then send other ids than the model was trained on.
    """
    same_ids = same_masks = 0
    crossing, unexplained = [], []  # where ids differ: pieces with a newline and more; (template's ids, ours)
    for text in PROBES:
        turns = [("system", "Be brief."), ("user", text), ("assistant", f"<think>\n{text}\n</think>\n\n{text}")]
        turns += [("user", f"{text} again"), ("assistant", text)]
        encoded = encoder.encode([turns])[0]
        if encoded is None:
            raise SystemExit(
                f"self-test: a special token of the base is plain text: {text!r} holds it. Choose another token in the "
                "base's tokenizer_config.json."
            )
        ids, mask = concatenate(encoder.bos, encoded)
        messages = [{"role": role, "content": content} for role, content in turns]
        check_generation_prompt(tokenizer, encoder, messages[:-1])
        expected = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        if np.array_equal(ids, expected["input_ids"]):
            same_ids += 1
            trainable = encoder.train_special | ~encoder.is_control[ids]
            same_masks += np.array_equal(mask, np.array(expected["assistant_masks"], bool) & trainable)
            continue
        only_theirs = [tokenizer.decode([i]) for i in Counter(expected["input_ids"]) - Counter(ids.tolist())]
        over_newline = [piece for piece in only_theirs if "\n" in piece and piece != "\n"]
        crossing += over_newline
        if not over_newline:
            unexplained.append((expected["input_ids"], ids.tolist()))
    line = f"self-test: of {len(PROBES)} conversations, {same_ids} have the saved template's ids, {same_masks} its "
    line += "masks too"
    if crossing:
        line += f"; pieces of this tokenizer cross newlines ({crossing[0]!r}), and training uses the generation "
        line += "prompt's ids, which inference sees"
    if unexplained:
        line += f"; WARNING: {len(unexplained)} differ although no piece crosses a newline: "
        line += first_difference(tokenizer, *unexplained[0])
    if same_masks < same_ids:
        line += "; the template's masks are off where byte fallback is used; ours are exact"
    return line


def check_generation_prompt(tokenizer, encoder, messages):
    """Raise SystemExit unless the template's generation prompt ends in the ids that training has there."""
    trained = [encoder.start, *encoder.headers["assistant"]]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    ending = prompt[-len(trained) :]
    if ending != trained:
        raise SystemExit(
            f"self-test: the generation prompt ends in {ending}, but training uses {trained}. Choose a base with "
            "another tokenizer."
        )


def first_difference(tokenizer, theirs, ours):
    """Return a phrase that shows where two lists of ids part."""
    index = next(i for i, pair in enumerate(itertools.zip_longest(theirs, ours)) if pair[0] != pair[1])
    their_text, our_text = (tokenizer.decode(ids[index : index + 3]) for ids in (theirs, ours))
    return (
        f"from token {index} on, the template has {their_text!r}, but training uses {our_text!r}; inference gives "
        "earlier turns the template's ids"
    )
