"""validation.py: the loss per source, and answers, against transformers' own generation."""

import json

import numpy as np
import pytest
import torch
import transformers
from test_memory_plan import alone as alone  # a fixture
from test_sft_v1 import metrics, sequences, tiny_config, trained, write_base, write_data

import sft_v1
from sft.data import chatml
from sft.training import dataloader, memory_plan, validation
from sft.training import model as sft_model


@pytest.mark.parametrize("policy", ["per_step", "per_micro_batch"])
def test_answers_are_those_of_transformers_generate(tmp_path, alone, policy):
    base = write_base(tmp_path / "base", tiny_config())
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 515, n).tolist() for n in (5, 9, 3)]
    reference = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    expected = []
    for prompt in prompts:
        made = reference.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=0)
        expected.append(made[0, len(prompt) :].tolist())
    stop = expected[0][3]  # the first prompt's answer ends here
    expected = [ids[: ids.index(stop) + 1] if stop in ids else ids for ids in expected]
    model = sft_model.load_model(base, 16)
    sft_v1.shard(model, alone, torch.float32, policy)
    assert validation.answer(model, prompts, stop, 12, "cpu") == expected
    assert model.training


def test_the_loss_per_source_is_that_of_its_sequences(tmp_path, alone):
    base = write_base(tmp_path / "base", tiny_config())
    data = dataloader.load_data(str(write_data(tmp_path / "data")))["validation"]
    model = sft_model.load_model(base, 16)
    sft_v1.shard(model, alone, torch.float32, "per_step")
    batches = dataloader.Batches(data, memory_plan.shapes(tiny_config()), 256, torch.device("cpu"))
    sources = ["odd" if i % 2 else "even" for i in range(len(data))]
    found = validation.validate(model, batches, sources, 3)
    rows, sums = batches.rows(list(range(len(data)))), {"odd": [], "even": []}
    for i, row in rows.items():
        loss = model(**dataloader.micro_batch([row])).item()
        sums[sources[i]].append((loss, int(row[1][1:].sum())))
    for name, parts in sums.items():
        loss, tokens = map(sum, zip(*parts, strict=True))
        assert found[f"validation_loss/{name}"] == pytest.approx(loss / tokens, rel=1e-5)
    loss, tokens = map(sum, zip(*sums["odd"], *sums["even"], strict=True))
    assert found["validation_loss"] == pytest.approx(loss / tokens, rel=1e-5)


def test_a_run_answers_its_prompts_at_each_validation(tmp_path, bpe_tokenizer_dir):
    tokenizer, _ = chatml.extend_tokenizer(str(bpe_tokenizer_dir), True, True)
    config = tiny_config(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32)
    base = write_base(tmp_path / "base", config)
    data = write_data(tmp_path / "data", len(tokenizer), sequences(64, 515))
    for folder in (base, data / "tokenizer"):
        tokenizer.save_pretrained(folder)
    stop = transformers.GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    stop.save_pretrained(base)
    report = json.loads((data / "report.json").read_text())
    report["tokenizer_sha256"] = sft_v1.files.sha256(base / "tokenizer.json")
    (data / "report.json").write_text(json.dumps(report))
    flags = ("--max-steps", "2", "--validate-every", "1", "--prompts", "Who are you?,Why?", "--answer-tokens", "5")
    stdout = trained(tmp_path, "run", 2, *flags)
    lines = [json.loads(line) for line in (tmp_path / "run" / "answers.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert all(line["answers"].keys() == {"Who are you?", "Why?"} for line in lines)
    assert "Who are you? -> " in stdout
    assert all(0 <= line["answers_stopped"] <= 1 and "validation_loss/x" in line for line in metrics(tmp_path, "run"))
