"""validation.py: loss and bits per byte by source, and answers, against transformers' own loss and generation.

bash tests/run.sh tests/test_validation.py
"""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from helpers import (
    CONVERSATIONS,
    tiny_config,
    write_base,
    write_conversations,
    write_data,
    write_model,
    write_tokenizer,
)

import sft_v1
from sft.training import dataloader, memory_plan, validation
from sft.training import model as sft_model


@pytest.mark.parametrize("communicate", ["per_step", "per_micro_batch"])
def test_answers_are_those_of_transformers_generate(tmp_path, alone, communicate):
    base = write_base(tmp_path / "base", tiny_config())
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 515, n).tolist() for n in (5, 9, 3)]
    reference = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    expected = []
    for prompt in prompts:
        ids = reference.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=0)
        expected.append(ids[0, len(prompt) :].tolist())
    stop = expected[0][3]  # the first prompt's answer ends here
    expected = [ids[: ids.index(stop) + 1] if stop in ids else ids for ids in expected]
    model = sft_model.load_model(base)
    sft_v1.shard(model, alone, torch.float32, communicate)
    assert validation.answer(model, prompts, stop, 12, "cpu") == expected
    assert model.training


def test_the_loss_per_source_is_that_of_its_sequences(tmp_path, alone):
    base = write_base(tmp_path / "base", tiny_config())
    data = dataloader.load_data(str(write_data(tmp_path / "data")))["validation"]
    model = sft_model.load_model(base)
    sft_v1.shard(model, alone, torch.float32, "per_step")
    loader = dataloader.PackedLoader(data, memory_plan.shapes(tiny_config()), 256, torch.device("cpu"))
    sources = ["odd" if i % 2 else "even" for i in range(len(data))]
    metrics = validation.validation_loss(model, loader, sources, 3)
    rows, sums = loader.rows(list(range(len(data)))), {"odd": [], "even": []}
    for i, row in rows.items():
        loss = model(dataloader.concatenate([row])).item()
        sums[sources[i]].append((loss, int(row[1][1:].sum())))
    for name, parts in sums.items():
        loss, tokens = map(sum, zip(*parts, strict=True))
        assert metrics[f"validation_loss/{name}"] == pytest.approx(loss / tokens, rel=1e-5)
    loss, tokens = map(sum, zip(*sums["odd"], *sums["even"], strict=True))
    assert metrics["validation_loss"] == pytest.approx(loss / tokens, rel=1e-5)


def test_bits_per_byte_are_the_nats_of_the_answers_over_their_bytes(tmp_path, alone):
    tokenizer = write_conversations(tmp_path / "data", write_tokenizer(tmp_path / "base"))
    write_model(tmp_path / "resized", tokenizer, seed=0)
    data = dataloader.load_data(str(tmp_path / "data"))["validation"]
    model = sft_model.load_model(tmp_path / "resized")
    config = model.causal_lm.config
    sft_v1.shard(model, alone, torch.float32, "per_step")
    loader = dataloader.PackedLoader(data, memory_plan.shapes(config), 512, torch.device("cpu"))
    said = []
    args = {"SEQUENCES_PER_STEP": 3, "PROMPTS": (), "DATA_DIR": str(tmp_path / "data")}
    metrics = validation.Validator(model, data, loader, SimpleNamespace(say=said.append), args).validate(7)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "resized", dtype=torch.float32)
    bits, text_bytes = {"a": 0.0, "b": 0.0}, {"a": 0, "b": 0}
    for row, (source, turns) in zip(data, CONVERSATIONS, strict=True):
        ids, mask = torch.tensor(row["input_ids"]), torch.tensor(row["assistant_masks"])
        with torch.no_grad():
            loss = reference(input_ids=ids[None], labels=ids.where(mask, -100)[None]).loss.item()
        bits[source] += loss * int(mask.sum()) / math.log(2)
        text_bytes[source] += sum(len(content.encode()) for role, content in turns if role == "assistant")
    for source in "ab":
        expected = bits[source] / text_bytes[source]
        assert metrics[f"validation_bits_per_byte/{source}"] == pytest.approx(expected, rel=1e-4)
    total = sum(bits.values()) / sum(text_bytes.values())
    assert metrics["validation_bits_per_byte"] == pytest.approx(total, rel=1e-4)
    assert said == [f"step 7: validation loss {metrics['validation_loss']:.4f}, {total:.4f} bits per byte"]
