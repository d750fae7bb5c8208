"""memory_plan.py: what it counts against the bytes that a real step holds, what it chooses, and --plan-only."""

import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
import torch
import transformers
from common import GENESIS, genesis_lengths
from test_sft_v1 import ROOT, sequences, tiny_config, write_base

import sft_v1
from sft.data import writer
from sft.training import dataloader, hardware, memory_plan
from sft.training import model as sft_model

AUTO = {"MEMORY_POLICY": "auto", "ACTIVATION_CHECKPOINTING": "auto", "TOKENS_PER_MICRO_BATCH": 0}
AUTO |= {"LOSS_CHUNK_TOKENS": 1024}


@pytest.fixture
def alone():
    """A process group of this process alone, and its mesh."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,), mesh_dim_names=("shard",))
    torch.distributed.destroy_process_group()


def test_the_shapes_of_genesis():
    sizes = memory_plan.shapes(transformers.LlamaConfig(**GENESIS))
    assert sizes.all == 1_000_447_488 and sizes.head == 49_156 * 1536 and sizes.attention == 32 * 1536


@pytest.mark.parametrize("kind", [transformers.LlamaConfig, transformers.Qwen3Config])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_depths_tell_the_bytes_of_any_depth(kind, checkpointing):
    config = tiny_config(kind, num_hidden_layers=9)
    told = memory_plan.activation_bytes(config, torch.bfloat16, [50, 100], checkpointing, 16)
    model = sft_model.SFTModel(memory_plan.on_meta(config, torch.bfloat16), 16).train()
    sft_model.prepare_blocks(model, checkpointing, False)
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    batch = dataloader.micro_batch([(np.zeros(n, np.int64), np.ones(n, bool)) for n in (50, 100)])
    with memory_plan.LiveBytes([*model.parameters(), *model.buffers()]) as live:
        model(**dataloader.each_tensor(batch, lambda t: t.to("meta"))).backward()
    assert told == pytest.approx(live.peak, rel=0.01)


@pytest.mark.parametrize("policy", ["per_step", "per_micro_batch"])
@pytest.mark.parametrize("checkpointing", ["off", "on"])
def test_the_plan_is_within_10_percent_of_the_tensor_bytes_of_a_real_step(tmp_path, alone, policy, checkpointing):
    # As many key heads as heads: the plan counts them repeated, as on a GPU, and the attention on a CPU does without.
    config = tiny_config(num_hidden_layers=6, hidden_size=128, intermediate_size=384, num_key_value_heads=4)
    base = write_base(tmp_path / "base", config)
    run = AUTO | {"MEMORY_POLICY": policy, "ACTIVATION_CHECKPOINTING": checkpointing, "LOSS_CHUNK_TOKENS": 64}
    plan = memory_plan.choose(config, 1, torch.bfloat16, run | {"TOKENS_PER_MICRO_BATCH": 512}, 128, 2**40)
    rng = np.random.default_rng(0)
    batches = [
        dataloader.micro_batch([(rng.integers(0, 515, 128), np.ones(128, bool)) for _ in range(4)]) for _ in range(3)
    ]
    with memory_plan.LiveBytes([]) as live:
        model = sft_model.load_model(base, run["LOSS_CHUNK_TOKENS"])
        sft_model.prepare_blocks(model, plan.checkpointing, False)
        sft_v1.shard(model, alone, torch.bfloat16, policy)
        optimizer = sft_v1.make_optimizer(model, (0.9, 0.95), 1e-8, 0.01)
        sft_v1.train_step(model, optimizer, batches, 500, policy, 1.0)  # the first step sets FSDP up
        live.peak = 0
        sft_v1.train_step(model, optimizer, batches, 500, policy, 1.0)
    assert plan.total == pytest.approx(live.peak, rel=0.1), plan


def test_less_memory_gives_up_recomputation_first_and_then_communicates_more_often():
    config = transformers.LlamaConfig(**GENESIS)
    chosen = [
        memory_plan.choose(config, 2, torch.bfloat16, AUTO, 2048, gib * memory_plan.GIB) for gib in (80, 22, 14, 11, 4)
    ]
    assert [(p.memory_policy, p.checkpointing, p.tokens) for p in chosen] == [
        ("per_step", False, 8192),
        ("per_step", False, 4096),
        ("per_step", True, 8192),
        ("per_micro_batch", True, 8192),
        ("per_micro_batch", True, 2048),  # the smallest one, which does not fit
    ]
    assert [p.total <= gib * memory_plan.GIB for p, gib in zip(chosen, (80, 22, 14, 11, 4), strict=True)] == [
        *[True] * 4,
        False,
    ]
    forced = AUTO | {
        "MEMORY_POLICY": "per_micro_batch",
        "ACTIVATION_CHECKPOINTING": "on",
        "TOKENS_PER_MICRO_BATCH": 2048,
    }
    only = memory_plan.choose(config, 2, torch.bfloat16, forced, 2048, 80 * memory_plan.GIB)
    assert (only.memory_policy, only.checkpointing, only.tokens) == ("per_micro_batch", True, 2048)


def test_bytes_sent():
    sizes = memory_plan.shapes(transformers.LlamaConfig(**GENESIS))
    once = memory_plan.sent_per_step(sizes, 2, 1, torch.bfloat16, "per_step", 8)
    assert once == 1_000_447_488 * (2 + 4) / 2  # half of the parameters to the other rank, half of the gradients
    often = memory_plan.sent_per_step(sizes, 2, 1, torch.bfloat16, "per_micro_batch", 8)
    assert often == 8 * 1_000_447_488 * (2 * 2 + 4) / 2
    assert memory_plan.sent_per_step(sizes, 2, 2, torch.bfloat16, "per_step", 8) == once + 1_000_447_488 / 2 * 4


def test_plan_only_needs_shapes_and_lengths_and_genesis_fits_two_cards(tmp_path):
    transformers.LlamaConfig(**GENESIS).save_pretrained(tmp_path / "base")  # no weights
    for split, number in (("train", 510_577), ("validation", 500)):
        lengths = genesis_lengths(number)
        offsets = pa.array(np.cumsum([0, *lengths], dtype=np.int32))
        zeros = np.zeros(lengths.sum(), np.uint16)
        columns = {
            "input_ids": pa.ListArray.from_arrays(offsets, pa.array(zeros)),
            "assistant_masks": pa.ListArray.from_arrays(offsets, pa.array(zeros.view(bool)[::2])),
            "source": pa.DictionaryArray.from_arrays(np.zeros(number, np.int8), ["x"]).cast(pa.string()),
        }
        (folder := tmp_path / "data" / split).mkdir(parents=True)
        table = pa.table(columns)
        with pa.ipc.new_stream(str(folder / "data-00000.arrow"), table.schema) as stream:
            stream.write_table(table)
        writer.write_dataset_metadata(folder, 1, table.schema, "x")
    (tmp_path / "data" / "dataset_dict.json").write_text('{"splits": ["train", "validation"]}')
    line = [sys.executable, ROOT / "sft_v1.py", "--plan-only", "--base-model", tmp_path / "base"]
    result = subprocess.run([*line, "--data-dir", tmp_path / "data"], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    facts = {text[:10].strip(): text[11:] for text in result.stdout.splitlines()}
    assert facts["run"].startswith("15,955 steps, about 37")
    total, limit = facts["memory"].split(" GiB per rank")[0].split(" of ")
    assert float(total) <= float(limit) == 21.5
    assert "1,000,447,488 parameters" in facts["model"] and "510,577 sequences" in facts["data"]
    assert facts["traffic"].startswith("per_step: 3.0 GB sent per rank and step") and "WARNING" not in facts
    assert facts["checkpoint"].startswith("11.2 GiB each, 3 kept and one on its way: 45 GiB")
    assert not (tmp_path / "checkpoints").exists()
    result = subprocess.run([*line, "--data-dir", tmp_path / "none"], capture_output=True, text=True)
    assert result.returncode == 1 and "holds no finished data" in result.stderr and "Traceback" not in result.stderr


def test_a_micro_batch_that_does_not_fit_names_the_settings_to_change():
    class Full(torch.nn.Module):
        def set_requires_gradient_sync(self, wanted): ...

        def set_reshard_after_backward(self, wanted): ...

        def forward(self, **batch):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    config = tiny_config()
    plan = memory_plan.choose(config, 1, torch.bfloat16, AUTO, 64, 2**40)
    batch = dataloader.micro_batch(list(zip(*sequences(4, 515), strict=True)))
    with pytest.raises(SystemExit, match=r"largest micro-batch \(\d+ tokens\) does not fit .* Raise RESERVED_GIB"):
        sft_v1.rehearse(Full(), None, batch, plan)


def test_ranks_share_the_memory_of_a_machine(monkeypatch):
    whole = hardware.memory(torch.device("cpu"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert hardware.memory(torch.device("cpu")) == whole // 2
