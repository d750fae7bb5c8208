"""Bits per byte: the loss as a code length of the text, which models with other tokenizers can be compared by.

A loss per token depends on how much text a token is. Bits per byte doesn't: it is the summed cross-entropy of the
trainable tokens in nats, / ln 2, / the UTF-8 bytes of the text that they spell (as in Gao et al. 2020, The Pile, with
the sum over trainable tokens only).

What counts. Every trainable token counts with its loss, the closing `<|im_end|>` too: an answer is its text and where
it ends. Only text counts as bytes: special tokens such as `<|im_end|>` spell none, the think markers, which are plain
tokens, spell themselves. A sequence's first token is never predicted and counts for neither. So every tokenizer has the
same text and the same ends to encode, and its tokens may be as long as they like. Cuts move the count by little: a
sequence that is cut inside a character counts the replacement character's three bytes, and where a decoder drops the
space in front of a text, as SentencePiece's does, the later windows of a document count a byte less each.
"""

import math

import numpy as np


def trained_bytes(tokenizer, rows):
    """Return the UTF-8 bytes of each sequence's trainable text, list of int.

    tokenizer: tokenizers.Tokenizer; rows: pairs of input_ids and assistant_masks [tokens]. Each run of
    trainable tokens is decoded by itself: the masked tokens between two answers are no text of theirs.
    """
    counts = []
    for ids, mask in rows:
        trained = np.asarray(mask, bool).copy()
        trained[0] = False
        edges = np.flatnonzero(np.diff(trained, prepend=False, append=False))
        spans = [np.asarray(ids)[start:end].tolist() for start, end in edges.reshape(-1, 2)]
        counts.append(sum(len(text.encode()) for text in tokenizer.decode_batch(spans)))
    return counts


def bits_per_nat(tokens, text_bytes):
    """Return what a loss in nats per token is multiplied by for bits per byte. tokens, text_bytes: numbers of both."""
    return tokens / text_bytes / math.log(2)
