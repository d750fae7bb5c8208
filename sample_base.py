"""Optional, before step 1: sample plain text from the base model itself, to train on a little of it against forgetting.

Reads   models/base (weights and tokenizer).
Writes  data/replay.jsonl: a line per document, {"document": number, "text": ..., "tokens": ..., "ended": ...}.

    python sample_base.py                                          5,000 documents
    python sample_base.py --documents 100 --output data/try.jsonl  a look at them
    the same command after a kill                                  samples only what is missing

For owners without the data their base was pretrained on. prepare_data.py reads the file as a source with the schema
`text`. Every document is drawn at temperature 1 from the base's own distribution, begins after the token that begins
documents in pretraining, and has random numbers of its own: a run that was killed ends with the bytes of one that was
not, on the same machine with the same settings.
"""

import json
import os
from pathlib import Path

import numpy as np
import torch
import transformers
from tqdm import tqdm
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from sft import hf_folder, settings, system
from sft.generation import records
from sft.text import printable

# ---- Files ----
BASE_MODEL = "models/base"  # Hugging Face folder to sample from
OUTPUT = "data/replay.jsonl"  # file to write; must be missing
# ---- Documents ----
DOCUMENTS = 5_000  # at 1,024 tokens each they are 5.1M tokens, 1.4% of the recipe's 365.6M
MAX_TOKENS = 1024  # tokens of a document; a longer one is cut. At most the base's context
START_TOKEN = ""  # what documents begin after; "" = the BOS if the base's tokenizer adds one, else its EOS
SEED = 42  # of all documents
# ---- Speed ----
BATCH_SIZE = 64  # documents at a time; fewer need less memory
DEVICE = "auto"  # "auto" (the first GPU if there is one) | "cuda" | "cpu"
DTYPE = "auto"  # of the weights: "auto" (as they are stored) | "bfloat16" | "float32"

# ==== Constants ====

CHOICES = {"DEVICE": ("auto", "cuda", "cpu"), "DTYPE": ("auto", "bfloat16", "float32")}
AT_LEAST = {"DOCUMENTS": 1, "MAX_TOKENS": 1, "SEED": 0, "BATCH_SIZE": 1}
WITH_EFFECT = ("MAX_TOKENS", "START_TOKEN", "SEED", "DTYPE")  # settings that a run that continues must not change


# ==== The base ====


class Base:
    """The model in BASE_MODEL on its device, its tokenizer, and the ids that begin and end a document."""

    def __init__(self, args):
        """Raises: SystemExit if the model or its tokenizer can't be loaded, or a setting does not fit them."""
        device, folder = system.choose_device(args["DEVICE"], "--device cpu"), args["BASE_MODEL"]
        remedy = "Name the base's folder with --base-model."
        self.context = getattr(hf_folder.load_config(folder, remedy), "max_position_embeddings", args["MAX_TOKENS"])
        if args["MAX_TOKENS"] > self.context:
            raise SystemExit(f"MAX_TOKENS is {args['MAX_TOKENS']}; the base's context is {self.context}. Lower it.")
        self.tokenizer = hf_folder.load_tokenizer(folder)
        self.start, self.stops = document_bounds(self.tokenizer, folder, args["START_TOKEN"])
        dtype = args["DTYPE"] if args["DTYPE"] == "auto" else getattr(torch, args["DTYPE"])
        try:
            self.model = hf_folder.load_model(folder, remedy, dtype).to(device)
        except RuntimeError as error:  # too little memory
            raise SystemExit(f"The model can't be put on {device} ({error}). Try --device cpu.") from None
        special = [token_id for token_id, token in self.tokenizer.get_added_tokens_decoder().items() if token.special]
        self.model.generation_config = GenerationConfig(  # instead of the folder's own, which may narrow the choice
            do_sample=False,  # Noise does the drawing
            max_new_tokens=args["MAX_TOKENS"],
            eos_token_id=self.stops,
            pad_token_id=self.stops[0],
            suppress_tokens=[token_id for token_id in special if token_id not in self.stops] or None,
        )

    @torch.no_grad()
    def sample(self, numbers, seed):
        """Return the documents `numbers` (list of int) as dicts of "document", "text", "tokens" and "ended"."""
        first = torch.full((len(numbers), 1), self.start, device=self.model.device)
        noise = LogitsProcessorList([Noise(seed, numbers)])
        output = self.model.generate(first, attention_mask=torch.ones_like(first), logits_processor=noise)
        documents = []
        for number, ids in zip(numbers, output[:, 1:].tolist(), strict=True):
            end = next((index for index, token_id in enumerate(ids) if token_id in self.stops), None)
            text = self.tokenizer.decode(ids[:end], skip_special_tokens=True)
            if end is None:
                text = text.rstrip("\ufffd")  # a character that the cut went through
            tokens = len(ids[:end])
            documents.append({"document": number, "text": text, "tokens": tokens, "ended": end is not None})
        return documents


class Noise(LogitsProcessor):
    """Adds Gumbel noise to the logits: the largest sum is a draw from their softmax (Gumbel-max; Maddison et al. 2014).

    Each document has a generator of its own, so its draws don't depend on the others.
    """

    def __init__(self, seed, numbers):
        self.generators = [np.random.default_rng([seed, number]) for number in numbers]

    def __call__(self, input_ids, scores):
        """Return float32 [documents, vocabulary]. scores: the logits, of that shape and dtype."""
        # In float64: one in 8 million float32 draws is 0, and would choose its token whatever the logits are.
        draws = np.stack([generator.standard_exponential(scores.shape[1]) for generator in self.generators])
        return scores - torch.from_numpy(np.log(draws)).to(scores)


def document_bounds(tokenizer, folder, start_token):
    """Return (id of the token that documents begin after, ids that end one). start_token: the setting.

    Raises: SystemExit if the tokenizer in `folder` has no such token.
    """
    names = hf_folder.token_names(system.read_json(Path(folder) / "tokenizer_config.json"), folder)
    bos = tokenizer.token_to_id(names["bos"] or "")
    if not start_token:
        adds_bos = bos is not None and tokenizer.encode("a").ids[:1] == [bos]
        start_token = names["bos"] if adds_bos else names["eos"]
    start = tokenizer.token_to_id(start_token or "")
    if start is None:
        raise SystemExit(
            f"{folder}: its tokenizer has no token {start_token!r} to begin a document with. Name the one that was "
            "between documents in pretraining with --start-token."
        )
    end = tokenizer.token_to_id(names["eos"] or "")
    return start, list(dict.fromkeys(token_id for token_id in (end, start) if token_id is not None))


# ==== Documents on the disk ====


def check_same_run(staging, args):
    """Raise SystemExit if the documents in `staging` come from another base or other settings; else note these."""
    now = {name: args[name] for name in WITH_EFFECT}
    now |= system.weight_digests(args["BASE_MODEL"])
    now["tokenizer.json"] = system.sha256(Path(args["BASE_MODEL"]) / "tokenizer.json")
    path = staging / "run.json"
    if not path.exists():
        system.write_whole(path, json.dumps(now, indent=1) + "\n")
    elif changed := system.differences(system.read_json(path), now):
        raise SystemExit(
            f"{staging} holds documents of another run ({'; '.join(changed)}). Go back to that, or remove the folder."
        )


def sample_missing(base, path, args):
    """Append to `path` the documents that it lacks, a batch at a time; return all, {number: document}."""
    documents = {line["document"]: line for line in records.parse_lines(path)}
    with (
        path.open("ab") as file,
        tqdm(total=args["DOCUMENTS"], unit="document", dynamic_ncols=True) as bar,
    ):
        for begin in range(0, args["DOCUMENTS"], args["BATCH_SIZE"]):
            # A batch is sampled whole even if a kill left a part of it: its size may change the rounding.
            numbers = list(range(begin, min(begin + args["BATCH_SIZE"], args["DOCUMENTS"])))
            if not all(number in documents for number in numbers):
                for document in base.sample(numbers, args["SEED"]):
                    if document["document"] not in documents:
                        documents[document["document"]] = document
                        file.write(json.dumps(document).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
            bar.update(len(numbers))
    return documents


def publish(documents, staging, args):
    """Write the documents in their order as the file OUTPUT, which appears whole; return how many tokens they have."""
    chosen = [documents[number] for number in range(args["DOCUMENTS"])]
    whole = staging / "whole.jsonl"
    system.write_whole(whole, "".join(json.dumps(document) + "\n" for document in chosen))
    whole.replace(args["OUTPUT"])
    system.remove_claimed(staging)
    return sum(document["tokens"] for document in chosen)


# ==== Main ====


def main(args):
    """Sample the documents that the settings `args` (dict) ask for."""
    settings.check_bounds(args, CHOICES, AT_LEAST)
    transformers.utils.logging.disable_progress_bar()
    output = args["OUTPUT"]
    if os.path.lexists(output):
        raise SystemExit(f"{output} is already there. Move it away, or name another --output.")
    try:
        staging, handle = system.claim(output, "--output")
        with handle:
            try:
                base = Base(args)
                check_same_run(staging, args)
                documents = sample_missing(base, staging / "documents.jsonl", args)
                tokens = publish(documents, staging, args)
            finally:
                if not (staging / "documents.jsonl").exists():  # nothing is sampled: nothing to keep
                    system.remove_claimed(staging)
    except torch.OutOfMemoryError:
        raise SystemExit("The GPU's memory is full. Lower BATCH_SIZE; the same command continues.") from None
    except OSError as error:
        raise SystemExit(
            f"{output} cannot be written ({error}). Free disk space, or check the folder and your rights to it; the "
            "same command continues."
        ) from None
    except KeyboardInterrupt:
        raise SystemExit("Stopped. The same command continues after the last whole batch.") from None
    print(f"{output}: {args['DOCUMENTS']:,} documents, {tokens:,} tokens")
    for number in range(min(3, args["DOCUMENTS"])):
        print(f"\n---- document {number} ----\n{printable(documents[number]['text'][:300])}")


if __name__ == "__main__":
    main(settings.from_flags(globals()))
