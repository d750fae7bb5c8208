"""memory_plan.py: what it counts against the bytes that a real step holds, what it chooses, and --plan-only.

bash tests/run.sh tests/test_memory_plan.py
"""

import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
import torch
import transformers
from common import GENESIS, genesis_lengths
from helpers import ROOT, default_settings, tiny_config, write_base

import sft_v1
from sft.data import writer
from sft.training import dataloader, distributed, hardware, memory_plan
from sft.training import model as sft_model

AUTO = {"COMMUNICATE": "auto", "ACTIVATION_CHECKPOINTING": "auto", "TOKENS_PER_MICRO_BATCH": 0}


def test_the_shapes_of_genesis():
    sizes = memory_plan.shapes(transformers.LlamaConfig(**GENESIS))
    assert sizes.all == 1_000_447_488 and sizes.head == 49_156 * 1536 and sizes.attention == 32 * 1536


@pytest.mark.parametrize("kind", [transformers.LlamaConfig, transformers.Qwen3Config])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_depths_give_the_bytes_of_any_depth(kind, checkpointing, monkeypatch):
    monkeypatch.setattr(sft_model, "LOSS_CHUNK_TOKENS", 16)
    config = tiny_config(kind, num_hidden_layers=9)
    expected = memory_plan.activation_bytes(config, torch.bfloat16, [50, 100], checkpointing, "cuda")
    model = sft_model.SFTModel(memory_plan.on_meta(config, torch.bfloat16)).train()
    sft_model.prepare_blocks(model, checkpointing, False, "cuda")
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    batch = dataloader.concatenate([(np.zeros(n, np.int64), np.ones(n, bool)) for n in (50, 100)])
    with memory_plan.LiveBytes([*model.parameters(), *model.buffers()]) as live:
        model(batch.to("meta")).backward()
    assert expected == pytest.approx(live.peak, rel=0.01)


@pytest.mark.parametrize("communicate", ["per_step", "per_micro_batch"])
@pytest.mark.parametrize("checkpointing", ["off", "on"])
def test_the_plan_is_within_10_percent_of_the_tensor_bytes_of_a_real_step(
    tmp_path, alone, monkeypatch, communicate, checkpointing
):
    monkeypatch.setattr(sft_model, "LOSS_CHUNK_TOKENS", 64)
    # As many key heads as heads: with torch 2.11 the plan counts them repeated, as on a GPU; a CPU does without that.
    config = tiny_config(num_hidden_layers=6, hidden_size=128, intermediate_size=384, num_key_value_heads=4)
    base = write_base(tmp_path / "base", config)
    args = {"COMMUNICATE": communicate, "ACTIVATION_CHECKPOINTING": checkpointing, "TOKENS_PER_MICRO_BATCH": 512}
    plan = memory_plan.choose(config, memory_plan.shapes(config), 1, torch.bfloat16, args, 128, 2**40, "cpu")
    rng = np.random.default_rng(0)
    batches = [
        dataloader.concatenate([(rng.integers(0, 515, 128), np.ones(128, bool)) for _ in range(4)]) for _ in range(2)
    ]
    with memory_plan.LiveBytes([]) as live:
        model = sft_model.load_model(base)
        sft_model.prepare_blocks(model, plan.checkpointing, False, "cpu")
        sft_v1.shard(model, alone, torch.bfloat16, communicate)
        optimizer = sft_v1.make_optimizer(model, (0.9, 0.95), 0.01)
        sft_v1.train_step(model, optimizer, batches, 500, communicate, 1.0)  # the first step sets FSDP up
        live.peak = 0
        sft_v1.train_step(model, optimizer, batches, 500, communicate, 1.0)
    assert plan.total == pytest.approx(live.peak, rel=0.1), plan


def test_less_memory_gives_up_recomputation_first_and_then_communicates_more_often():
    config = transformers.LlamaConfig(**GENESIS)
    sizes = memory_plan.shapes(config)

    def choose(gib, args=AUTO):
        return memory_plan.choose(config, sizes, 2, torch.bfloat16, args, 2048, gib * memory_plan.GIB, "cuda")

    chosen = [choose(gib) for gib in (80, 22, 14, 11, 4)]
    assert [(p.communicate, p.checkpointing, p.tokens) for p in chosen] == [
        ("per_step", False, 8192),
        ("per_step", False, 6144),
        ("per_step", True, 8192),
        ("per_micro_batch", True, 8192),
        ("per_micro_batch", True, 2048),  # the smallest one, which does not fit
    ]
    assert [p.total <= gib * memory_plan.GIB for p, gib in zip(chosen, (80, 22, 14, 11, 4), strict=True)] == [
        *[True] * 4,
        False,
    ]
    forced = AUTO | {
        "COMMUNICATE": "per_micro_batch",
        "ACTIVATION_CHECKPOINTING": "on",
        "TOKENS_PER_MICRO_BATCH": 2048,
    }
    only = choose(80, forced)
    assert (only.communicate, only.checkpointing, only.tokens) == ("per_micro_batch", True, 2048)


def test_bytes_sent():
    sizes = memory_plan.shapes(transformers.LlamaConfig(**GENESIS))
    one_machine, two = memory_plan.Topology(2, 1, "cuda"), memory_plan.Topology(4, 2, "cuda")
    once = memory_plan.sent_per_step(sizes, one_machine, torch.bfloat16, "per_step", 8)
    assert once == 1_000_447_488 * (2 + 4) / 2  # half of the parameters to the other rank, half of the gradients
    often = memory_plan.sent_per_step(sizes, one_machine, torch.bfloat16, "per_micro_batch", 8)
    gathered = 2 * sizes.blocks + sizes.root  # the root stays gathered between forward and backward
    assert often == 8 * (gathered * 2 + 1_000_447_488 * 4) / 2
    across = memory_plan.sent_per_step(sizes, two, torch.bfloat16, "per_step", 8)
    assert across == once + 1_000_447_488 / 2 * 4


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
    (tmp_path / "data" / "report.json").write_text('{"limit": 1000}')
    (tmp_path / "data" / "dataset_dict.json").write_text('{"splits": ["train", "validation"]}')
    line = [sys.executable, ROOT / "sft_v1.py", "--plan-only", "--resized-model", tmp_path / "base"]
    result = subprocess.run([*line, "--data-dir", tmp_path / "data"], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    lines = {text[:10].strip(): text[11:] for text in result.stdout.splitlines()}
    assert lines["run"].startswith("15,955 steps, about 37")
    assert lines["run"].endswith("; 17 of 510,577 sequences are left over at the end of each epoch")
    assert lines["schedule"] == "learning rate up to 2e-05 in 200 steps of warm-up, down to 2e-06 at the last step"
    total, limit = lines["memory"].split(" GiB per rank")[0].split(" of ")
    assert float(total) <= float(limit) == 20.3
    assert "1,000,447,488 parameters" in lines["model"] and "510,577 sequences" in lines["data"]
    assert lines["traffic"].startswith("per_step: 3.0 GB sent per rank and step") and "WARNING" not in lines
    assert "WARNING: the data was prepared with --limit 1000." in result.stdout
    assert lines["checkpoint"].startswith("11.2 GiB each, 3 kept, the best and one being written: 56 GiB")
    assert lines["checkpoint"].endswith("; written beside training from 5.6 GiB of host memory per rank")
    assert not (tmp_path / "checkpoints").exists()
    args = default_settings() | {"PLAN_ONLY": True, "RESIZED_MODEL": str(tmp_path / "base"), "DATA_DIR": "none"}
    with pytest.raises(SystemExit, match="none holds no finished data"):
        sft_v1.main(args)


def test_a_run_is_planned_for_the_card_with_the_least_memory(alone, monkeypatch):
    config = transformers.LlamaConfig(**GENESIS)
    lengths, sizes = genesis_lengths(3200), memory_plan.shapes(config)
    args = default_settings() | {"RESERVED_GIB": 2.0, "MAX_STEPS": 300}
    monkeypatch.setattr(hardware, "memory", lambda device: 80 * memory_plan.GIB)

    def planned(poorest):
        def on_every_rank(value):
            return [value, poorest * memory_plan.GIB] if isinstance(value, int) else [value]

        monkeypatch.setattr(distributed, "on_every_rank", on_every_rank)
        plan, *_, lines = sft_v1.plan_run(args, config, sizes, lengths, torch.device("cuda"), alone)
        return plan, lines

    rich, _ = planned(80)
    poor, lines = planned(22)
    assert poor.checkpointing and not rich.checkpointing
    assert poor.total <= 20 * memory_plan.GIB and " of 20.0 GiB per rank: " in lines


def test_gaps_between_tensors_are_planned_on_a_gpu_and_part_of_the_total():
    sizes = memory_plan.shapes(transformers.LlamaConfig(**GENESIS))
    on_gpu, on_cpu = (
        memory_plan.estimate(sizes, 2, torch.bfloat16, "per_step", False, 4096, 2**33, device)
        for device in ("cuda", "cpu")
    )
    assert on_cpu.gaps == 0 and on_gpu.total == on_cpu.total + on_gpu.gaps
    assert on_gpu.gaps == int(memory_plan.GAPS * on_cpu.total)


def test_only_a_run_that_saves_before_its_end_plans_memory_for_it_and_on_a_cpu_out_of_the_same():
    config, lengths = tiny_config(vocab_size=2_000_000), np.full(320, 16)
    sizes = memory_plan.shapes(config)

    def plan(device, **changes):
        args = default_settings() | {"WARMUP_STEPS": 1, "SAVE_EVERY": 9} | changes
        topology = memory_plan.Topology(2, 1, device)
        plan, *_, lines = memory_plan.plan_run(args, config, sizes, lengths, topology, 2**33)
        return plan.staging, lines

    staging, lines = plan("cpu")  # 10 steps
    assert staging == 12 * sizes.all // 2 and "of 7.3 GiB per rank" in lines
    assert "; written beside training from 0.7 GiB of host memory" in lines
    for changes in ({"SAVE_EVERY": 10}, {"ASYNC_SAVE": "off"}):
        assert plan("cpu", **changes)[0] == 0 and "; training waits for each save" in plan("cpu", **changes)[1]
    assert plan("cuda")[0] == staging and "of 8.0 GiB per rank" in plan("cuda")[1]
