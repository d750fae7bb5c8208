"""validation.py: the loss per source, and answers, against transformers' own generation.

bash tests/run.sh tests/test_validation.py
"""

import numpy as np
import pytest
import torch
import transformers
from helpers import tiny_config, write_base, write_data

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
