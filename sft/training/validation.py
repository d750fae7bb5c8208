"""What a training run looks at between its steps: the loss on held-out conversations, and answers to a few prompts.

Used by sft_v1.py. Every rank takes part.
"""

from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedTokenizerFast

from sft.training import dataloader, distributed


def looker(model, data, held_out, log, run, device):
    """Return the function of a step that validates and answers PROMPTS, or None if VALIDATE_EVERY is 0."""
    if not held_out:
        return None
    sources, prompts = data["validation"].data.column("source").to_pylist(), []
    if run["PROMPTS"]:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(Path(run["DATA_DIR"]) / "tokenizer")
        for prompt in run["PROMPTS"]:
            turn = [{"role": "user", "content": prompt}]
            prompts.append(tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False))

    def look(step):
        found = validate(model, held_out, sources, run["SEQUENCES_PER_STEP"])
        log.say(f"step {step}: validation loss {found['validation_loss']:.4f}")
        if prompts:
            stop = tokenizer.eos_token_id
            answers = answer(model, prompts, stop, run["ANSWER_TOKENS"], device)
            found["answers_stopped"] = sum(ids[-1] == stop for ids in answers) / len(answers)
            log.answers(step, run["PROMPTS"], tokenizer.batch_decode(answers))
        return found

    return look


def reshard(model):
    """Give gathered parameters back; else a checkpoint would read the copies in the compute dtype."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@torch.no_grad()
def validate(model, held_out, sources, sequences_per_step):
    """Return the loss per trainable token of the validation split, the same on every rank: all of it, and per source.

    sources: the source of each sequence. Returns: {"validation_loss": float, "validation_loss/NAME": float, ...}.
    """
    model.eval()
    names = sorted(set(sources))
    parts = []  # (place of its source in names, indices)
    for place, name in enumerate(names):
        mine = [i for i, source in enumerate(sources) if source == name]
        parts += [(place, mine[n : n + sequences_per_step]) for n in range(0, len(mine), sequences_per_step)]
    sums = torch.zeros(2, len(names), dtype=torch.float64)  # cross-entropy on this rank, trainable tokens on all
    steps = held_out.each([indices for _, indices in parts])
    for (place, _), (_, batches, facts) in zip(parts, steps, strict=True):
        sums[1, place] += facts["trainable_tokens"] / dist.get_world_size()
        for batch in batches:
            distributed.at(part=f"validation on {names[place]}")
            sums[0, place] += model(**batch).double().cpu()
    dist.all_reduce(sums := sums.to(held_out.device))
    reshard(model)
    model.train()
    losses = (sums[0] / sums[1]).tolist()
    by_source = {f"validation_loss/{name}": loss for name, loss in zip(names, losses, strict=True)}
    return {"validation_loss": float(sums[0].sum() / sums[1].sum())} | by_source


@torch.no_grad()
def answer(model, prompts, stop, limit, device):
    """Continue each of `prompts` (lists of token ids) greedily, up to `limit` tokens or the token `stop`.

    One forward per token over all prompts, as documents of one micro-batch; every rank takes part and gets the same.
    Returns: list of lists of token ids; one that stopped by itself ends with `stop`.
    """
    model.eval()
    answers = [[] for _ in prompts]
    while going := [n for n, ids in enumerate(answers) if len(ids) < limit and ids[-1:] != [stop]]:
        distributed.at(part=f"answering prompts, token {len(answers[going[0]]) + 1}")
        rows = [np.array(prompts[n] + answers[n]) for n in going]
        batch = dataloader.micro_batch([(ids, np.zeros(len(ids), bool)) for ids in rows])
        batch |= {"predictors": torch.tensor(np.cumsum([len(ids) for ids in rows]) - 1), "targets": None}
        logits = model(**dataloader.each_tensor(batch, lambda t: t.to(device)))
        dist.broadcast(tokens := logits.argmax(dim=1), 0)  # ranks that disagreed would wait for each other forever
        for n, token in zip(going, tokens.tolist(), strict=True):
            answers[n].append(token)
    reshard(model)
    model.train()
    return answers
