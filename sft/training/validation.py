"""The validation between the steps of a run: loss and bits per byte on held-out text, and answers to a few prompts.

Used by sft_v1.py. Every rank takes part.
"""

from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedTokenizerFast

from sft import hf_folder
from sft.bits_per_byte import bits_per_nat, trained_bytes
from sft.training import dataloader, distributed

ANSWER_TOKENS = 64  # tokens after which an answer is cut off


class Validator:
    """Validates the model and answers the prompts at a step."""

    def __init__(self, model, dataset, loader, log, args):
        """dataset: the validation split; loader: the PackedLoader of it; args: the settings."""
        self.model = model
        self.loader = loader
        self.log = log
        self.sequences_per_step = args["SEQUENCES_PER_STEP"]
        self.sources = dataset.data.column("source").to_pylist()
        tokenizer = hf_folder.load_tokenizer(Path(args["DATA_DIR"]) / "tokenizer")
        self.factors = bits_per_byte_factors(loader, self.sources, tokenizer)
        self.prompts = args["PROMPTS"]
        self.prompt_ids = []
        if self.prompts:
            self.tokenizer = PreTrainedTokenizerFast.from_pretrained(Path(args["DATA_DIR"]) / "tokenizer")
        for prompt in self.prompts:
            turn = [{"role": "user", "content": prompt}]
            ids = self.tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
            self.prompt_ids.append(ids)

    def validate(self, step):
        """Return the validation's metrics (dict) for the line of `step`; print the loss, record the answers."""
        metrics = validation_loss(self.model, self.loader, self.sources, self.sequences_per_step)
        for name, factor in self.factors.items():
            metrics[name.replace("loss", "bits_per_byte", 1)] = metrics[name] * factor
        in_bits = metrics.get("validation_bits_per_byte")
        note = "" if in_bits is None else f", {in_bits:.4f} bits per byte"
        self.log.say(f"step {step}: validation loss {metrics['validation_loss']:.4f}{note}")
        if self.prompts:
            stop = self.tokenizer.eos_token_id
            answers = answer(self.model, self.prompt_ids, stop, ANSWER_TOKENS, self.loader.device)
            stopped = sum(ids[-1] == stop for ids in answers)
            metrics["answers_stopped"] = stopped / len(answers)
            self.log.answers(step, self.prompts, self.tokenizer.batch_decode(answers))
        return metrics


def reshard(model):
    """Give the gathered parameters back; else a checkpoint would read the copies in the compute dtype."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@torch.no_grad()
def validation_loss(model, loader, sources, sequences_per_step):
    """Return the loss per trainable token of the validation split, the same on every rank: all of it, and per source.

    sources: the source of each sequence. Returns: {"validation_loss": float, "validation_loss/NAME": float, ...}.
    """
    model.eval()
    names = sorted(set(sources))
    parts = []  # (number of the source in names, indices)
    for number, name in enumerate(names):
        indices = [i for i, source in enumerate(sources) if source == name]
        for start in range(0, len(indices), sequences_per_step):
            parts.append((number, indices[start : start + sequences_per_step]))
    losses = torch.zeros(len(names), dtype=torch.float64)  # summed cross-entropy on this rank
    tokens = torch.zeros(len(names), dtype=torch.float64)  # trainable ones, this rank's share
    batches = loader.batches(indices for _, indices in parts)
    for (number, _), batch in zip(parts, batches, strict=True):
        tokens[number] += batch.stats["trainable_tokens"] / dist.get_world_size()
        for micro_batch in batch.micro_batches:
            distributed.heartbeat(part=f"validation on {names[number]}")
            losses[number] += model(micro_batch).double().cpu()
    sums = torch.stack([losses, tokens]).to(loader.device)
    dist.all_reduce(sums)
    reshard(model)
    model.train()
    result = {"validation_loss": float(sums[0].sum() / sums[1].sum())}
    for name, loss in zip(names, (sums[0] / sums[1]).tolist(), strict=True):
        result[f"validation_loss/{name}"] = loss
    return result


def bits_per_byte_factors(loader, sources, tokenizer):
    """Return {name of a loss of `validation_loss`: what it is multiplied by for bits per byte of the text}.

    loader: the PackedLoader of the validation split; sources: the source of each sequence; tokenizer:
    tokenizers.Tokenizer. Text and tokens are the same at every validation, so they are counted once. A source whose
    trainable tokens spell no text is left out.
    """
    rows = list(loader.rows(range(len(sources))).values())
    tokens, text_bytes = Counter(), Counter()
    for source, (_, mask), count in zip(sources, rows, trained_bytes(tokenizer, rows), strict=True):
        for name in ("validation_loss", f"validation_loss/{source}"):
            tokens[name] += int(mask[1:].sum())
            text_bytes[name] += count
    return {name: bits_per_nat(tokens[name], text_bytes[name]) for name in tokens if text_bytes[name]}


@torch.no_grad()
def answer(model, prompts, stop, limit, device):
    """Continue each of `prompts` (lists of token ids) greedily, up to `limit` tokens or the token `stop`.

    One forward per token over all prompts, as documents of one micro-batch; every rank takes part and gets the same.
    Returns: list of lists of token ids; one that stopped by itself ends with `stop`.
    """
    model.eval()
    answers = [[] for _ in prompts]
    while True:
        active = [n for n, ids in enumerate(answers) if len(ids) < limit and ids[-1:] != [stop]]
        if not active:
            break
        distributed.heartbeat(part=f"answering prompts, token {len(answers[active[0]]) + 1}")
        texts = [np.array(prompts[n] + answers[n]) for n in active]
        batch = dataloader.concatenate([(ids, np.zeros(len(ids), bool)) for ids in texts])
        batch.predictors = torch.tensor(np.cumsum([len(ids) for ids in texts]) - 1)  # the last token of each
        batch.targets = None
        tokens = model(batch.to(device)).argmax(dim=1)
        dist.broadcast(tokens, 0)  # ranks that disagreed would wait for each other forever
        for n, token in zip(active, tokens.tolist(), strict=True):
            answers[n].append(token)
    reshard(model)
    model.train()
    return answers
