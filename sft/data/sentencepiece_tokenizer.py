"""Turn a SentencePiece `tokenizer.model` into the same tokenizer for the `tokenizers` library, and back.

Both ways it checks on several texts that both give the same ids.

transformers has a converter for each model family it knows; they rename the first three pieces or leave out the
normaliser, so a model of your own would not survive. Used by import_base.py, and, back, by export_hf.py.
"""

import json
import re

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

# ==== Constants ====

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6  # kinds of pieces in the file
UNIGRAM, BPE = 1, 2  # kinds of models
SPACE = "▁"
PREFIX = {  # how transformers once wrote SentencePiece's space in front: a normaliser instead of the Metaspace rule
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": SPACE},
        {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
    ],
}
PROBES = (
    "a  b\tc",
    "def f(x):\n    return x  # 1234567.89\n\n\n",
    "naïve 😀👍🏽 e\u0301 ﬁ ½",
    "日本語 中文, Ελληνικά",
    "WORD Word word's",
)


# ==== Conversion ====


def convert(path, add_bos, text):
    """Return (`Tokenizer`, {"bos_token" | "eos_token" | "unk_token": piece or None}) of the file `path`.

    add_bos: whether the tokenizer puts the BOS in front of a text by itself; text: str that must get the same ids.
    A text that begins with a space loses it where SentencePiece puts a space in front: so does every LlamaTokenizer.
    Raises: SystemExit if the file cannot be read, is of another kind, or if the result encodes a text differently.
    """
    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
        original = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
    except Exception as error:  # protobuf and sentencepiece raise their own
        raise SystemExit(
            f"{path} is not a SentencePiece model ({error}). Name tokenizer.model or tokenizer.json."
        ) from None
    unknown = original.id_to_piece(original.unk_id())
    tokenizer = Tokenizer(convert_model(path, proto, original.unk_id(), unknown))
    for piece in proto.pieces:
        if piece.type == CONTROL or piece.piece == unknown:
            tokenizer.add_special_tokens([AddedToken(piece.piece, normalized=False, special=True)])
        elif piece.type == USER_DEFINED and " " not in piece.piece:  # those never match: a space is "▁" by then
            tokenizer.add_tokens([AddedToken(piece.piece, normalized=False, special=False)])
    set_text_rules(tokenizer, proto)
    ids = {"bos_token": original.bos_id(), "eos_token": original.eos_id(), "unk_token": original.unk_id()}
    names = {name: original.id_to_piece(token_id) if token_id >= 0 else None for name, token_id in ids.items()}
    if add_bos:
        bos = names["bos_token"]
        if bos is None:
            raise SystemExit(f"{path} has no BOS, but ADD_BOS asks for one. Use --no-add-bos.")
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, original.bos_id())]
        )
    for probe in (text, *PROBES):
        ours, theirs = tokenizer.encode(probe, add_special_tokens=False).ids, original.encode(probe)
        if ours != theirs:
            raise SystemExit(
                f"{path}: converted, it encodes {probe[:40]!r} as {ours[:12]}, by SentencePiece it is {theirs[:12]}. "
                "Convert it yourself and name the tokenizer.json."
            )
    return tokenizer, names


def convert_model(path, proto, unknown_id, unknown):
    """Return the model of `tokenizers` for a SentencePiece `proto`. unknown: the piece of the id `unknown_id`."""
    kind, byte_fallback = proto.trainer_spec.model_type, proto.trainer_spec.byte_fallback
    if kind == UNIGRAM:
        table = [(piece.piece, piece.score) for piece in proto.pieces]
        return models.Unigram(table, unk_id=unknown_id, byte_fallback=byte_fallback)
    if kind == BPE:
        vocabulary = {piece.piece: token_id for token_id, piece in enumerate(proto.pieces)}
        normal = sorted((-piece.score, i) for i, piece in enumerate(proto.pieces) if piece.type == NORMAL)
        pairs = merges({proto.pieces[token_id].piece: token_id for _, token_id in normal})
        return models.BPE(vocabulary, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=byte_fallback)
    raise SystemExit(
        f"{path} is a SentencePiece model of words or characters; only BPE and unigram are read. Convert it yourself "
        "and name the tokenizer.json."
    )


def merges(pieces):
    """Return the BPE merges of `pieces`, {piece: id} in the order of their scores, as pairs in the order of use."""
    result = []
    for piece in pieces:
        halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        pairs = [pair for pair in halves if pair[0] in pieces and pair[1] in pieces]
        result += sorted(pairs, key=lambda pair: (pieces[pair[0]], pieces[pair[1]]))
    return result


def set_text_rules(tokenizer, proto):
    """Set the normalizer, the pre-tokenizer and the decoder of `tokenizer` as the `proto` has them."""
    rules, prefix = proto.normalizer_spec, proto.normalizer_spec.add_dummy_prefix
    steps = []
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(r"\A +| +\z"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if steps:
        tokenizer.normalizer = normalizers.Sequence(steps)
    # Single words are encoded faster, but pieces that continue after a space, such as indentation, forbid it.
    split = not any(SPACE in piece.piece[1:] for piece in proto.pieces if piece.type == NORMAL)
    scheme = "first" if prefix else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme=scheme, split=split)
    parts = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        parts.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(parts)


# ==== Back ====


def space_in_front(state):
    """Return whether a tokenizer puts a space in front of a text, None if it does something else. state: its JSON."""
    normalizer, rule = state["normalizer"], state["pre_tokenizer"]
    if rule is None and normalizer == PREFIX:
        return True
    if normalizer or rule is None or rule["type"] != "Metaspace":
        return None
    return rule["prepend_scheme"] != "never"


def restore(tokenizer):
    """Return the bytes of a tokenizer.model with the ids of a `Tokenizer`, or None if there is none.

    llama.cpp and Ollama need it: only there, in the scores, do they read the order of the merges of a BPE from
    SentencePiece. They know no normaliser and, for these models, no unigram: a tokenizer that has one has no such file.
    """
    state = json.loads(tokenizer.to_str())
    model, prefix = state["model"], space_in_front(state)
    if model["type"] != "BPE" or prefix is None or not model["unk_token"]:
        return None
    proto = sentencepiece_model_pb2.ModelProto()
    proto.trainer_spec.model_type, proto.trainer_spec.byte_fallback = BPE, model["byte_fallback"]
    proto.trainer_spec.vocab_size = tokenizer.get_vocab_size()
    proto.normalizer_spec.name, proto.normalizer_spec.remove_extra_whitespaces = "identity", False
    proto.normalizer_spec.add_dummy_prefix = prefix
    ranks = {}
    for rank, pair in enumerate(model["merges"]):
        ranks.setdefault("".join(pair), rank)
    kinds = {token["content"]: CONTROL if token["special"] else USER_DEFINED for token in state["added_tokens"]}
    kinds[model["unk_token"]] = UNKNOWN
    for piece, token_id in sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1]):
        is_byte = model["byte_fallback"] and re.fullmatch("<0x[0-9A-F]{2}>", piece)
        kind = kinds.get(piece, BYTE if is_byte else NORMAL)
        score = -ranks.get(piece, len(ranks) + token_id) if kind == NORMAL else 0
        proto.pieces.add(piece=piece, score=score, type=kind)
    content = proto.SerializeToString()
    try:
        restored = sentencepiece.SentencePieceProcessor(model_proto=content)
    except RuntimeError:  # it is no SentencePiece vocabulary
        return None
    same = all(tokenizer.encode(probe, add_special_tokens=False).ids == restored.encode(probe) for probe in PROBES)
    return content if same else None
