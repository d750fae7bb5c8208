"""Can a model read? Its cross-entropy on a passage of plain prose, beside that of a model that knows nothing.

Reads   a Hugging Face model folder, and plain_text.txt beside this file. Writes nothing.

    python plain_text.py --model-dir models/base      one line; ends with 1 if the model cannot read

A wrong rotary layout, a swapped matrix or another tokenizer gives a model that loads, runs and knows nothing; its
benchmarks then sit at chance and nobody notices. import_base.py, run_eval.sh and export_hf.py ask this first.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from sft import settings, system

# ---- Files ----
MODEL_DIR = "models/base"  # Hugging Face folder
# ---- Verdict ----
WARN_ONLY = False  # say it, but end with 0: for a model that was never trained, as in a test

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

    model: a causal HF model; tokenizer: its HF tokenizer, which adds a BOS or none, as it does by itself. The passage
    is cut at the model's context length.
    """
    ids = tokenizer(PASSAGE.read_text(encoding="utf-8").strip(), return_tensors="pt").input_ids
    ids = ids[:, : getattr(model.config, "max_position_embeddings", None)]
    if tokenizer.unk_token_id is not None and (ids == tokenizer.unk_token_id).float().mean() > 0.1:
        return math.inf  # else a model that has learnt to expect the unknown token would read best of all
    logits = model(input_ids=ids.to(model.device)).logits[0, :-1].float()
    return F.cross_entropy(logits, ids[0, 1:].to(logits.device)).item()


def verdict(nats, vocabulary, expected=0.0):
    """Return (line that says the loss beside its measures, whether a model with it can read).

    nats: from `loss`; vocabulary: rows of the model's embedding; expected: the loss at the end of pretraining in nats
    per token, 0 where unknown.
    A model reads if its loss is below 0.4 ln(vocabulary). SmolLM2-135M has 0.27 on this passage, and with each of these
    faults: rotary layout 0.46, gate and up projection swapped 1.9, tokenizer permuted 1.15, norms lost 1.3 and more,
    untrained 1.01. What its frequencies alone would give is 0.64 (the tokens in random order). A loss of 0.8 would
    thus let the wrong rotary layout pass. What changes a loss little on 400 tokens is not seen: with a rope_theta five
    times too large it has 0.28.
    """
    ceiling = math.log(vocabulary)
    reads = nats < READS_BELOW * ceiling  # False for NaN
    known = f", {expected:.2f} at the end of pretraining" if expected else ""
    return (
        f"plain text: {nats:.2f} nats per token (guessing among {vocabulary:,} tokens: {ceiling:.2f}{known}); "
        f"it {'reads' if reads else f'CANNOT READ: below {READS_BELOW * ceiling:.2f} is expected'}"
    ), reads


# ==== Main ====


def main(run):
    """Measure the model of the settings `run` (dict)."""
    transformers.utils.logging.disable_progress_bar()
    system.read_json(Path(MODEL_DIR) / "config.json", "the script that makes it")
    try:
        tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
        model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype="auto").eval()
        nats = loss(model, tokenizer)
    except Exception as error:  # transformers, tokenizers and safetensors each raise their own
        raise SystemExit(f"{MODEL_DIR} is no model folder that loads ({type(error).__name__}: {error}).") from None
    line, reads = verdict(nats, model.get_input_embeddings().num_embeddings)
    print(line)
    if not reads and not WARN_ONLY:
        raise SystemExit(f"{MODEL_DIR} cannot read plain text. {CAUSES}")


if __name__ == "__main__":
    main(settings.from_flags(globals()))
