"""Turn a SentencePiece `tokenizer.model` into the same tokenizer for the `tokenizers` library, and prove it the same.

transformers has a converter for each model family it knows; they rename the first three pieces or leave out the
normaliser, which a model of one's own does not survive. Used by import_base.py.
"""

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # kinds of pieces in the file
UNIGRAM, BPE = 1, 2  # kinds of models
SPACE = "▁"
PROBES = (
    "a  b\tc",
    "def f(x):\n    return x  # 1234567.89\n\n\n",
    "naïve 😀👍🏽 e\u0301 ﬁ ½",
    "日本語 中文, Ελληνικά",
    "WORD Word word's",
)


def merges(pieces):
    """Return the BPE merges of `pieces`, {piece: id} in the order of their scores, as pairs in the order of use."""
    found = []
    for place, piece in enumerate(pieces):
        halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        pairs = [pair for pair in halves if pair[0] in pieces and pair[1] in pieces]
        found += [(place, pair) for pair in sorted(pairs, key=lambda pair: (pieces[pair[0]], pieces[pair[1]]))]
    return [pair for _, pair in found]


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
            f"{path} is no SentencePiece model ({error}). Name tokenizer.model or tokenizer.json."
        ) from None
    kind, byte_fallback = proto.trainer_spec.model_type, proto.trainer_spec.byte_fallback
    unknown = original.id_to_piece(original.unk_id())
    if kind == UNIGRAM:
        table = [(piece.piece, piece.score) for piece in proto.pieces]
        model = models.Unigram(table, unk_id=original.unk_id(), byte_fallback=byte_fallback)
    elif kind == BPE:
        vocabulary = {piece.piece: place for place, piece in enumerate(proto.pieces)}
        normal = sorted((-piece.score, place) for place, piece in enumerate(proto.pieces) if piece.type == NORMAL)
        pairs = merges({proto.pieces[place].piece: place for _, place in normal})
        model = models.BPE(vocabulary, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=byte_fallback)
    else:
        raise SystemExit(f"{path} is a SentencePiece model of words or characters; only BPE and unigram are read.")
    tokenizer = Tokenizer(model)
    for piece in proto.pieces:
        if piece.type == CONTROL or piece.piece == unknown:
            tokenizer.add_special_tokens([AddedToken(piece.piece, normalized=False, special=True)])
        elif piece.type == USER_DEFINED and " " not in piece.piece:  # those never match: a space is "▁" by then
            tokenizer.add_tokens([AddedToken(piece.piece, normalized=False, special=False)])

    rules, prefix = proto.normalizer_spec, proto.normalizer_spec.add_dummy_prefix
    steps = [normalizers.Precompiled(rules.precompiled_charsmap)] if rules.precompiled_charsmap else []
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if steps:
        tokenizer.normalizer = normalizers.Sequence(steps)
    # Words apart are encoded faster; pieces that go on after a space, such as indentation, forbid it.
    split = not any(SPACE in piece.piece[1:] for piece in proto.pieces if piece.type == NORMAL)
    scheme = "first" if prefix else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme=scheme, split=split)
    parts = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if prefix else parts)

    ids = {"bos_token": original.bos_id(), "eos_token": original.eos_id(), "unk_token": original.unk_id()}
    names = {name: original.id_to_piece(place) if place >= 0 else None for name, place in ids.items()}
    if add_bos:
        if names["bos_token"] is None:
            raise SystemExit(f"{path} has no BOS, but ADD_BOS asks for one. Use --no-add-bos.")
        special = [(names["bos_token"], original.bos_id())]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{names['bos_token']} $A", special_tokens=special
        )
    for probe in (text, *PROBES):
        ours, theirs = tokenizer.encode(probe, add_special_tokens=False).ids, original.encode(probe)
        if ours != theirs:
            raise SystemExit(
                f"{path}: converted, it encodes {probe[:40]!r} as {ours[:12]}, by SentencePiece it is {theirs[:12]}. "
                "Convert it yourself and name the tokenizer.json."
            )
    return tokenizer, names
