"""Can a model read? Its cross-entropy on a passage of plain prose, next to that of a model that knows nothing.

Reads   a Hugging Face model folder, and plain_text.txt in this file's folder. Writes nothing.

    python -m sft.evaluation.reading_check --model-dir models/base    one line; exits with 1 if the model cannot read

A wrong rotary layout, a swapped matrix or another tokenizer gives a model that loads, runs and knows nothing; its
benchmarks then sit at chance and nobody notices. import_base.py, run_eval.sh and export_hf.py run this check.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from transformers import AutoTokenizer

from sft import hf_folder, settings, system

# ---- Files ----
MODEL_DIR = "models/base"  # Hugging Face folder of any model

# ==== Measuring ====

PASSAGE = Path(__file__).with_name("plain_text.txt")
READS_BELOW = 0.4  # of ln(vocabulary); see `verdict`
CAUSES = (
    "Likely causes: weights under wrong names or in the other rotary layout, another tokenizer than the one it was "
    "trained with, a config.json that does not describe it (heads, rope_theta, tied embeddings), or a model that was "
    f"trained little or on another language than {PASSAGE.name}'s: then replace that text."
)


@torch.no_grad()
def loss(model, tokenizer):
    """Return the mean cross-entropy of the passage's tokens in nats, float; inf if the tokenizer cannot spell them.

    model: a causal HF model; tokenizer: its HF tokenizer, which adds a BOS only if it does so by itself. The passage is
    cut at the model's context length.
    """
    ids = tokenizer(PASSAGE.read_text(encoding="utf-8").strip(), return_tensors="pt").input_ids
    ids = ids[:, : getattr(model.config, "max_position_embeddings", None)]
    if tokenizer.unk_token_id is not None and (ids == tokenizer.unk_token_id).float().mean() > 0.1:
        return math.inf  # otherwise a model that has learnt to expect the unknown token would read best of all
    logits = model(input_ids=ids.to(model.device)).logits[0, :-1].float()
    return F.cross_entropy(logits, ids[0, 1:].to(logits.device)).item()


def verdict(nats, vocabulary, expected=0.0):
    """Return (line that shows the loss next to its limits, whether a model with it can read).

    nats: from `loss`; vocabulary: rows of the model's embedding; expected: the loss at the end of pretraining in nats
    per token, 0 where unknown.
    A model reads if its loss is below 0.4 ln(vocabulary). SmolLM2-135M has 0.27 on this passage, and with each of these
    faults: rotary layout 0.46, gate and up projection swapped 1.9, tokenizer permuted 1.15, norms lost 1.3 and more,
    untrained 1.01. What its frequencies alone would give is 0.64 (the tokens in random order). A limit of 0.8 would
    thus let the wrong rotary layout pass. The check misses what changes a loss little on 400 tokens: with a rope_theta
    five times too large it is 0.28.
    """
    ceiling = math.log(vocabulary)
    limit = READS_BELOW * ceiling
    reads = nats < limit  # False for NaN
    at_the_end = f", {expected:.2f} at the end of pretraining" if expected else ""
    result = "reads" if reads else f"CANNOT READ: below {limit:.2f} is expected"
    guessing = f"guessing among {vocabulary:,} tokens: {ceiling:.2f}{at_the_end}"
    return f"plain text: {nats:.2f} nats per token ({guessing}); it {result}", reads


def check_folder(folder):
    """Return what `verdict` does for the model in `folder`. Raises: SystemExit if model or tokenizer do not load."""
    remedy = "Write it again with the script that made it."
    model = hf_folder.load_model(folder, remedy)
    try:
        nats = loss(model, AutoTokenizer.from_pretrained(folder))
    except Exception as error:  # transformers, tokenizers and torch each raise their own
        raise SystemExit(
            f"{folder}: its model cannot be run with its tokenizer ({type(error).__name__}: {error}). {remedy}"
        ) from None
    return verdict(nats, model.get_input_embeddings().num_embeddings)


# ==== Main ====


def main(args):
    """Check the model folder that the settings `args` (dict) name."""
    transformers.utils.logging.disable_progress_bar()
    folder = args["MODEL_DIR"]
    system.read_json(Path(folder) / "config.json", "the script that makes it")
    line, reads = check_folder(folder)
    print(line)
    if not reads:
        raise SystemExit(f"{folder} cannot read plain text. {CAUSES}")


if __name__ == "__main__":
    main(settings.from_flags(globals()))
