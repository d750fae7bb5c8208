"""sft_v1.py: its mathematics by import, its runs through torchrun with gloo processes, its refusals."""

import itertools
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
import transformers
from common import write_tokenizer

import sft_v1
from sft import settings, system
from sft.training import checkpoints, dataloader, training_log
from sft.training import model as sft_model

ROOT = Path(__file__).resolve().parent.parent
FEATURES = datasets.Features(
    {
        "input_ids": datasets.List(datasets.Value("uint16")),
        "assistant_masks": datasets.List(datasets.Value("bool")),
        "source": datasets.Value("string"),
    }
)


def tiny_config(kind=transformers.LlamaConfig, vocab_size=515, tied=True, **more):
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "max_position_embeddings": 256}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return kind(vocab_size=vocab_size, tie_word_embeddings=tied, **(sizes | heads | more))


def write_base(folder, config):
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def sequences(number, vocab_size, seed=0):
    """Counting sequences with a stride of 7 from a random start: learnable; about two thirds is trained."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(8, 64, number)
    ids = [((np.arange(n) * 7 + rng.integers(0, 50)) % vocab_size).astype(np.uint16) for n in lengths]
    return ids, [np.arange(n) > n // 3 for n in lengths]


def write_data(folder, vocab_size=515, train=None, digest="a"):
    split = {}
    for name, (ids, masks) in {
        "train": train or sequences(200, vocab_size),
        "validation": sequences(20, 515, seed=1),
    }.items():
        columns = {"input_ids": ids, "assistant_masks": masks, "source": ["x"] * len(ids)}
        split[name] = datasets.Dataset.from_dict(columns, features=FEATURES)
    datasets.DatasetDict(split).save_to_disk(folder)
    write_tokenizer(folder / "tokenizer")
    report = {
        "tokenizer_sha256": system.sha256(folder / "tokenizer" / "tokenizer.json"),
        "vocab_size": vocab_size,
        "max_seq_len": 64,
    }
    (folder / "report.json").write_text(json.dumps(report | {"digest": {"train": digest, "validation": "b"}}))
    return folder


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft")
    write_base(folder / "base", tiny_config())
    write_data(folder / "data")
    return folder


def command(work, output, ranks, *flags):
    """Return the torchrun command of a small float32 run that saves at steps 10, 20 and 30."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    torchrun += ["--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    chosen = {
        "--data-dir": work / "data",
        "--base-model": work / "base",
        "--output-dir": work / output,
        "--max-steps": 30,
        "--save-every": 10,
        "--validate-every": 10,
        "--warmup-steps": 3,
        "--compute-dtype": "float32",
        "--tokens-per-micro-batch": 256,
        "--activation-checkpointing": "on",
        "--prompts": "",
        "--learning-rate": 1e-3,
        "--device": "cpu",
    }
    return [
        str(part) for part in (*torchrun, ROOT / "sft_v1.py", *(p for pair in chosen.items() for p in pair), *flags)
    ]


def torchrun(work, output, ranks, *flags, limit=None):
    """Run to the end; `limit` is the largest file that may be written, in KiB. Returns the CompletedProcess."""
    line = command(work, output, ranks, *flags)
    if limit:
        line = ["bash", "-c", f'ulimit -f {limit}; exec "$@"', "bash", *line]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    result = subprocess.run(line, capture_output=True, text=True, env=env, timeout=300)
    if re.search(r"DistNetworkError|DistStoreError|Rendezvous\w*Error|[Gg]loo connect", result.stderr):
        # The processes did not find each other on a loaded machine; the script itself had not begun.
        result = subprocess.run(line, capture_output=True, text=True, env=env, timeout=300)
    return result


def trained(work, output, ranks, *flags):
    result = torchrun(work, output, ranks, *flags)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def metrics(work, output):
    """Return metrics.jsonl without what a clock or the layout decides."""
    timing = ("step_seconds", "tokens_per_second", "trainable_tokens_per_second", "micro_batches", "idle_share")
    timing += ("data_seconds", "mfu", "peak_gib")
    lines = [json.loads(line) for line in (work / output / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in timing} for line in lines]


def stored(checkpoint):
    """Return every tensor of a checkpoint as a dict."""
    kept = dcp.FileSystemReader(str(checkpoint)).read_metadata().state_dict_metadata
    state = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in kept.items()}
    dcp.load(state, checkpoint_id=str(checkpoint))
    return state


@pytest.fixture(scope="module")
def two_ranks(work):
    """The uninterrupted run on two ranks that others are compared with."""
    return trained(work, "two", 2)


# ---- Mathematics ----


def loaded(base, checkpointing, compile_blocks=False):
    model = sft_model.load_model(base, 16)
    sft_model.prepare_blocks(model, checkpointing, compile_blocks)
    return model


def packed_gradients(base, rows, groups):
    """Return (loss, gradients by name) of `rows` in `groups` accumulated micro-batches through SFTModel."""
    model = loaded(base, True)
    total = 0.0
    for group in np.array_split(np.arange(len(rows)), groups):
        loss = model(**dataloader.micro_batch([rows[i] for i in group]))
        loss.backward()
        total += loss.item()
    return total, {name.removeprefix("causal_lm."): p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    "config",
    [
        tiny_config(),
        tiny_config(tied=False, num_key_value_heads=4),
        tiny_config(transformers.Qwen2Config),
        tiny_config(transformers.Qwen3Config, tied=False, head_dim=32),
        tiny_config(transformers.MistralConfig, tied=False, sliding_window=None),
    ],
    ids=["llama-gqa-tied", "llama-mha-untied", "qwen2", "qwen3", "mistral"],
)
def test_gradients_equal_the_padded_reference(tmp_path, config):
    base = write_base(tmp_path / "base", config)
    rows = list(zip(*sequences(8, 515), strict=True))
    rows[3] = (rows[3][0], np.zeros(len(rows[3][0]), bool))  # one sequence has nothing to train
    reference = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="sdpa")
    width = max(len(ids) for ids, _ in rows)
    padded = torch.zeros(len(rows), width, dtype=torch.long)
    labels, seen = torch.full_like(padded, -100), torch.zeros_like(padded)
    for row, (ids, mask) in enumerate(rows):
        padded[row, : len(ids)], seen[row, : len(ids)] = torch.from_numpy(ids.astype(np.int64)), 1
        labels[row, : len(ids)] = torch.from_numpy(np.where(mask, ids.astype(np.int64), -100))
    logits = reference(input_ids=padded, attention_mask=seen).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    expected.backward()
    for groups in (1, 4):
        loss, gradients = packed_gradients(base, rows, groups)
        assert math.isclose(loss, expected.item(), rel_tol=1e-6)
        for name, p in reference.named_parameters():
            torch.testing.assert_close(gradients[name], p.grad, rtol=2e-5, atol=2e-5 * p.grad.abs().max().item())


@pytest.mark.parametrize("kv_heads, head_dim", [(4, 16), (2, 16), (1, 80)])
def test_attention_on_a_cpu_equals_torchs_kernel_in_each_document_and_holds_no_square(kv_heads, head_dim):
    torch.manual_seed(0)
    lengths = [1, 63, 200, 64, 65, 7]  # around the 64 queries of a block
    made = [torch.randn(1, sum(lengths), heads, head_dim) for heads in (4, kv_heads, kv_heads)]
    slope = torch.randn(1, sum(lengths), 4, head_dim)
    scores = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if function is torch.ops.aten._softmax.default:
                scores.append(tuple(result.shape))
            return result

    def of_torch(query, key, value):
        parts = zip(*(part.split(lengths, dim=2) for part in (query, key, value)), strict=True)
        outputs = [F.scaled_dot_product_attention(*part, is_causal=True, enable_gqa=True) for part in parts]
        return torch.cat(outputs, dim=2).transpose(1, 2)

    def of_ours(*parts):
        with Watch():
            documents = dataloader.Documents(lengths, None)
            return sft_model.packed_attention(None, *parts, None, scaling=head_dim**-0.5, documents=documents)[0]

    def run(attention, dtype):
        inputs = [part.to(dtype).transpose(1, 2).requires_grad_() for part in made]
        output = attention(*inputs)
        output.backward(slope.to(dtype))
        return [output.float(), *(part.grad.float() for part in inputs)]

    exact = run(of_torch, torch.float32)
    torch.testing.assert_close(run(of_ours, torch.float32), exact, rtol=2e-5, atol=2e-5)
    ours, torchs = (
        [((part - true).norm() / true.norm()).item() for part, true in zip(run(f, torch.bfloat16), exact, strict=True)]
        for f in (of_ours, of_torch)
    )
    assert all(mine < 1.5 * theirs for mine, theirs in zip(ours, torchs, strict=True)), (ours, torchs)
    assert max(scores, key=math.prod) == (kv_heads, 4 // kv_heads * 64, 192)


def test_compiled_blocks_compute_the_same_and_are_compiled_once(work):
    rows = list(zip(*sequences(12, 515), strict=True))
    plain, compiled = loaded(work / "base", False), loaded(work / "base", False, compile_blocks=True)
    pieces = []
    torch._dynamo.utils.counters.clear()
    for part in (rows[:4], rows[4:6], rows[6:]):  # other numbers of tokens and documents
        losses = []
        for model in (plain, compiled):
            model.zero_grad()
            losses.append(model(**dataloader.micro_batch(part)))
            losses[-1].backward()
        assert math.isclose(*(loss.item() for loss in losses), rel_tol=1e-5)
        for (name, p), q in zip(plain.named_parameters(), compiled.parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad, rtol=2e-5, atol=2e-5 * p.grad.abs().max().item(), msg=name)
        pieces.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert pieces[0] == pieces[-1] > 0  # those of the first block serve all blocks and sizes


def test_perturbing_one_sequence_leaves_the_others_loss_unchanged_bit_for_bit(work):
    model = loaded(work / "base", False)
    (first, _), (second, mask) = zip(*sequences(2, 515), strict=True)
    nothing = np.zeros(len(first), bool)
    alone = model(**dataloader.micro_batch([(second, mask)]))
    losses = [
        model(**dataloader.micro_batch([(ids.astype(np.uint16), nothing), (second, mask)]))
        for ids in (first, (first + 100) % 515)
    ]
    assert losses[0].item() == losses[1].item()
    assert math.isclose(losses[0].item(), alone.item(), rel_tol=1e-6)


def test_a_sequences_first_token_is_never_a_target():
    rows = [(np.arange(10, 15), np.ones(5, bool)), (np.arange(20, 23), np.ones(3, bool))]
    batch = dataloader.micro_batch(rows)
    assert batch["targets"].tolist() == [11, 12, 13, 14, 21, 22]
    assert batch["predictors"].tolist() == [0, 1, 2, 3, 5, 6]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2]]
    assert batch["documents"].bounds.tolist() == [0, 5, 8] and batch["documents"].lengths == [5, 3]


def test_a_micro_batch_without_targets_gives_a_differentiable_zero(work):
    model = loaded(work / "base", True)
    for rows in ([], [(np.arange(9), np.zeros(9, bool))]):
        loss = model(**dataloader.micro_batch(rows))
        loss.backward()
        assert loss.item() == 0 and all(not p.grad.any() for p in model.parameters())


def test_the_chunked_loss_equals_cross_entropy_and_never_holds_all_logits():
    torch.manual_seed(0)
    hidden, weight = torch.randn(50, 16, requires_grad=True), torch.randn(5000, 16, requires_grad=True)
    targets = torch.randint(0, 5000, (50,))
    F.cross_entropy(hidden @ weight.T, targets, reduction="sum").mul(0.5).backward()
    expected, hidden.grad, weight.grad = (hidden.grad, weight.grad), None, None
    largest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.shape[-1:] == (5000,) and len(result) != 16:  # the weight
                largest.append(result.numel())
            return result

    with Watch():
        loss = sft_model.ChunkedCrossEntropy.apply(hidden, weight, targets, 7, True)
    loss.mul(0.5).backward()
    torch.testing.assert_close((hidden.grad, weight.grad), expected, rtol=1e-5, atol=1e-5)
    assert max(largest) == 7 * 5000


def test_learning_rate_warms_up_and_ends_at_the_floor():
    rates = [sft_v1.learning_rate(step, 1000, 2e-5, 2e-6, 200) for step in range(1000)]
    assert rates[0] == pytest.approx(1e-7) and rates[199] == rates[200] == 2e-5
    assert rates[-1] == pytest.approx(2e-6) and rates[599] == pytest.approx(1.1e-5, rel=5e-3)
    assert all(a >= b for a, b in itertools.pairwise(rates[200:]))


def test_weight_decay_spares_norms_and_biases(tmp_path):
    base = write_base(tmp_path / "base", tiny_config(transformers.Qwen2Config))
    model = loaded(base, False)
    decayed, spared = sft_v1.make_optimizer(model, (0.9, 0.95), 1e-8, 0.01).param_groups
    assert decayed["weight_decay"] == 0.01 and spared["weight_decay"] == 0
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)].rsplit(".", 1)[1] for p in decayed["params"]} == {"weight"}
    assert all("norm" in names[id(p)] or names[id(p)].endswith("bias") for p in spared["params"])
    assert len(decayed["params"]) + len(spared["params"]) == len(names)


# ---- Runs ----


def test_the_loss_falls_and_the_start_up_lines_say_what_will_happen(work, two_ranks):
    lines = metrics(work, "two")
    assert [line["step"] for line in lines] == list(range(31))
    assert lines[30]["loss"] < lines[1]["loss"] - 0.5
    assert lines[30]["validation_loss"] < lines[0]["validation_loss"] - 0.5
    assert "32 sequences = about 1,193 real tokens (padded to 63 each, it would be 2,016 slots" in two_ranks
    assert "30 steps" in two_ranks and "start      from the base" in two_ranks
    assert [path.name for path in checkpoints.listed(work / "two")] == [f"step_0000{n}0" for n in (3, 2, 1)]
    assert (work / "two" / "loss.png").stat().st_size > 10_000
    assert list((work / "two" / "tensorboard").iterdir())
    facts = checkpoints.verify(work / "two" / "step_000030")
    assert facts["updates"] == 30 and facts["settings"]["LEARNING_RATE"] == 1e-3


def test_master_weights_and_moments_are_float32_and_a_tied_weight_is_stored_once(work, two_ranks):
    state = stored(work / "two" / "step_000030")
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    names = {name.removeprefix("model.") for name in state if name.startswith("model.")}
    reference = transformers.AutoModelForCausalLM.from_pretrained(work / "base")
    assert names == {name for name, _ in reference.named_parameters()}
    assert set(state) == {f"model.{n}" for n in names} | {
        f"optimizer.{key}.{n}" for key in ("step", "exp_avg", "exp_avg_sq") for n in names
    }


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        (
            1,
            [
                "--memory-policy",
                "per_micro_batch",
                "--activation-checkpointing",
                "off",
                "--tokens-per-micro-batch",
                "80",
            ],
        ),
        (2, ["--memory-policy", "per_micro_batch", "--tokens-per-micro-batch", "70", "--loss-chunk-tokens", "9"]),
        (3, ["--tokens-per-micro-batch", "4096"]),
    ],
)
def test_another_layout_computes_the_same_steps(work, two_ranks, ranks, flags):
    output = f"layout_{ranks}"
    trained(work, output, ranks, "--max-steps", "30", *flags)
    for ours, theirs in zip(metrics(work, output), metrics(work, "two"), strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert math.isclose(value, theirs[name], rel_tol=2e-5), (ours, theirs)


COUNT = """
import collections, json, sys
import numpy as np, torch, torch.distributed as dist
import sft_v1
from sft.training import dataloader, distributed, model as sft_model

class Count(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        if "c10d" in name:
            kind = [k for k in ("all_gather", "allgather", "reduce_scatter", "allreduce") if k in name]
            seen[kind[0].replace("_", "") if kind else name] += 1
        return function(*args, **(kwargs or {}))

device, mesh = distributed.join("cpu")
rng = np.random.default_rng(dist.get_rank())
batches = [dataloader.micro_batch([(rng.integers(0, 515, 30), np.ones(30, bool))]) for _ in range(8)]
gradients, counts = {}, {}
for policy in ("per_step", "per_micro_batch"):
    model = sft_model.load_model(sys.argv[1], 16)
    sft_v1.shard(model, mesh, torch.float32, policy)
    seen = collections.Counter()
    with Count():
        for number, batch in enumerate(batches, start=1):
            sft_v1.forward_backward(model, batch, 1.0, number == 8 or policy == "per_micro_batch")
    gradients[policy] = [p.grad.full_tensor() for p in model.parameters()]
    counts[policy] = seen
same = all(torch.allclose(a, b, rtol=2e-5, atol=2e-5 * float(a.abs().max())) for a, b in zip(*gradients.values()))
if dist.get_rank() == 0:
    print("COUNTS", json.dumps(counts | {"same": same}))
"""


def test_each_unit_is_gathered_once_and_reduced_once_in_a_step_of_eight_micro_batches(work, tmp_path):
    (tmp_path / "count.py").write_text(COUNT)
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    line += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", tmp_path / "count.py", work / "base"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(list(map(str, line)), capture_output=True, text=True, env=env, timeout=300)
    counts = json.loads(result.stdout.partition("COUNTS ")[2])
    assert counts.pop("same")
    units = 3  # two blocks and the root
    assert counts["per_step"] == {"allgather": units, "reducescatter": units}
    # In each micro-batch the blocks are gathered for the forward and again for the backward.
    assert counts["per_micro_batch"] == {"allgather": 8 * (2 * units - 1), "reducescatter": 8 * units}


def test_two_machines_compute_the_same_steps_and_continue_on_one(work, two_ranks):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    nodes = []
    for node in (0, 1):
        line = command(work, "machines", 2)
        place = line.index("localhost:0")
        line[place] = f"localhost:{port}"
        line[3:3] = ["--nnodes", "2", "--node-rank", str(node), "--rdzv-id", "1"]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        nodes.append(subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env))
    told = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], told
    assert any("4 on cpu, sharded over 2, on 2 machines" in text for text in told)
    for again in (False, True):
        for ours, theirs in zip(metrics(work, "machines"), metrics(work, "two"), strict=True):
            assert all(math.isclose(ours[name], theirs[name], rel_tol=2e-5) for name in theirs), (ours, theirs)
        if not again:
            shutil.rmtree(work / "machines" / "step_000030")
            trained(work, "machines", 1)


def go_back(work, output, step):
    """Copy the run on two ranks as it was after `step`."""
    shutil.copytree(work / "two", work / output)
    for path in checkpoints.listed(work / output):
        if path.name != f"step_{step:06d}":
            shutil.rmtree(path)


def equals_the_uninterrupted(work, output):
    assert metrics(work, output) == metrics(work, "two")
    ours, theirs = (stored(work / name / "step_000030") for name in (output, "two"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture
def log(tmp_path):
    """A log of a run with one rank."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield lambda step: training_log.Log(tmp_path, step, 100)
    torch.distributed.destroy_process_group()


def test_a_loss_far_above_the_last_ones_is_put_down_with_its_sequences_also_after_a_restart(log, tmp_path):
    def steps(record, first, last):
        for step in range(first, last):
            line = {"step": step, "loss": 9.0 if step == 50 else 2.0 + step % 3 / 100, "grad_norm": 1.0}
            record.judge(line, np.array([step, step + 1]), True, 6.0)
            record.write(line)

    steps(log(0), 1, 60)
    spikes = tmp_path / "spikes.jsonl"
    (whole,) = [json.loads(line) for line in spikes.read_text().splitlines()]
    assert whole["step"] == 50 and whole["sequences"] == [50, 51] and whole["mean"] == pytest.approx(2.01, abs=0.001)
    before = (tmp_path / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(before + "\0\0\n" + '{"step": 60')  # as a power cut leaves it
    again = log(40)
    assert spikes.read_text() == ""
    steps(again, 41, 60)
    assert [json.loads(line) for line in spikes.read_text().splitlines()] == [whole]
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_a_run_killed_before_its_first_checkpoint_leaves_no_line_behind(log, tmp_path):
    log(0).write({"step": 0, "validation_loss": 3.0})
    log(0).write({"step": 0, "validation_loss": 3.0})
    assert (tmp_path / "metrics.jsonl").read_text().count("validation_loss") == 1


@pytest.mark.parametrize("tied", [True, False])
def test_every_new_row_that_occurs_moves_when_ranks_do_not_divide_the_vocabulary(tmp_path, tied):
    ids, masks = sequences(32, 40)
    new = np.arange(49_152, 49_156, dtype=np.uint16)
    rows = [np.concatenate([row[:6], new]) for row in ids], [np.concatenate([mask[:6], [True] * 4]) for mask in masks]
    config = tiny_config(vocab_size=49_156, tied=tied, hidden_size=16, intermediate_size=32)
    write_base(tmp_path / "base", config)
    write_data(tmp_path / "data", 49_156, rows)
    trained(tmp_path, "run", 3, "--max-steps", "1", "--warmup-steps", "0")
    before = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").state_dict()
    after = stored(tmp_path / "run" / "step_000001")
    for name in ("model.embed_tokens.weight",) if tied else ("model.embed_tokens.weight", "lm_head.weight"):
        moved = (after[f"model.{name}"] != before[name]).any(dim=1)
        assert moved[[5, 49_152, 49_153, 49_154]].all(), name
    assert ("model.lm_head.weight" in after) is not tied


def test_a_non_finite_step_updates_nothing_and_is_told(tmp_path):
    base = write_base(tmp_path / "base", tiny_config(tied=False))
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    model.model.embed_tokens.weight.data[514] = math.inf
    model.save_pretrained(base)
    ids, masks = sequences(64, 300)
    ids[0][0] = 514  # in one sequence of one of the two steps
    write_data(tmp_path / "data", train=(ids, masks))
    stdout = trained(tmp_path, "run", 2, "--max-steps", "2", "--save-every", "1", "--warmup-steps", "0")
    assert stdout.count("was skipped") == 1
    (named,) = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert 0 in named["sequences"] and len(named["sequences"]) == 32 and named["loss"] is None
    losses = [line["loss"] for line in metrics(tmp_path, "run")[1:]]
    skipped = [loss is None for loss in losses]
    assert sorted(skipped) == [False, True]
    step = skipped.index(True) + 1
    state = stored(tmp_path / "run" / f"step_00000{step}")
    updates = step - 1
    assert all(tensor == updates for name, tensor in state.items() if name.startswith("optimizer.step"))
    assert all(t.isfinite().all() for name, t in state.items() if "embed_tokens" not in name)
    assert not updates or torch.equal(
        state["model.lm_head.weight"], stored(tmp_path / "run" / "step_000001")["model.lm_head.weight"]
    )


# ---- Refusals ----


def test_a_checkpoint_without_optimizer_state_is_refused(work, two_ranks):
    shutil.copytree(work / "two", work / "bare")
    shutil.rmtree(work / "bare" / "step_000030")
    state = {name: t for name, t in stored(work / "two" / "step_000020").items() if name.startswith("model.")}
    facts = checkpoints.verify(work / "two" / "step_000020")
    checkpoints.save(work / "bare", 20, state, facts, 3)
    result = torchrun(work, "bare", 1)
    assert result.returncode == 1
    assert "step_000020 lacks optimizer state: " in result.stderr


def test_moments_of_other_updates_are_refused(work, two_ranks):
    shutil.copytree(work / "two", work / "shifted")
    shutil.rmtree(work / "shifted" / "step_000030")
    facts = checkpoints.verify(work / "two" / "step_000020")
    checkpoints.save(work / "shifted", 20, stored(work / "two" / "step_000020"), facts | {"updates": 19}, 3)
    result = torchrun(work, "shifted", 1)
    assert result.returncode == 1 and "moments of [20.0] updates beside weights of 19" in result.stderr


def test_moments_that_are_all_zero_are_refused(work, two_ranks):
    go_back(work, "zeroed", 20)
    facts, state = checkpoints.verify(work / "two" / "step_000020"), stored(work / "two" / "step_000020")
    state = {name: t * 0 if ".exp_avg_sq." in name else t for name, t in state.items()}
    checkpoints.save(work / "zeroed", 20, state, facts, 3)
    result = torchrun(work, "zeroed", 2)
    assert result.returncode == 1
    assert "all of optimizer.exp_avg_sq.* is zero after 20 updates; choose another." in result.stderr


def test_a_damaged_checkpoint_is_passed_over_aloud_and_refused_by_name(work, two_ranks):
    shutil.copytree(work / "two", work / "damaged")
    first, second = sorted((work / "damaged" / "step_000030").glob("*.distcp"))
    first.rename(first.with_name("x"))
    second.rename(first)
    first.with_name("x").rename(second)
    result = torchrun(work, "damaged", 2, "--resume", "step_000030")
    assert result.returncode == 1 and "step_000030 is not a whole checkpoint: its file __0_0.distcp" in result.stderr
    stdout = trained(work, "damaged", 2)
    assert "step_000030 is passed over: its file __0_0.distcp" in stdout and "step_000020, 20 steps done" in stdout
    assert "OUTPUT_DIR was" in stdout and "PROMPTS was" not in stdout  # a tuple comes back as a list
    equals_the_uninterrupted(work, "damaged")


def test_a_full_disk_leaves_the_older_checkpoint_and_ends_with_a_sentence(work):
    trained(work, "full", 1, "--max-steps", "10")
    result = torchrun(work, "full", 1, "--max-steps", "12", "--save-every", "1", limit=600)
    assert result.returncode == 1, result.stdout
    assert "WARNING: no checkpoint at step 11, next try in 1 steps" in result.stdout
    assert metrics(work, "full")[-1]["warning"] == "no checkpoint since step 10"
    assert "The last checkpoint could not be written. Make room" in result.stderr
    assert checkpoints.newest_whole(work / "full").name == "step_000010"
    assert not list((work / "full").glob("staging_*"))
    assert "continue" in trained(work, "full", 1, "--max-steps", "12")


def test_going_back_beside_newer_checkpoints_is_refused_and_a_changed_setting_is_told(work, two_ranks):
    shutil.copytree(work / "two", work / "back")
    result = torchrun(work, "back", 1, "--resume", "step_000020")
    assert result.returncode == 1 and "holds checkpoints newer than step_000020. Move them away" in result.stderr
    shutil.rmtree(work / "back" / "step_000030")
    stdout = trained(work, "back", 1, "--resume", "step_000020", "--learning-rate", "2e-3", "--max-steps", "21")
    assert "WARNING: settings changed after step 20: " in stdout and "LEARNING_RATE was 0.001, is 0.002" in stdout
    history = checkpoints.verify(work / "back" / "step_000021")["history"]
    assert history[0]["after_step"] == 20
    assert {"MAX_STEPS was 30, is 21", "ranks was 2, is 1"} <= set(history[0]["changed"])


def test_a_run_that_learns_nothing_stops(tmp_path):
    base = write_base(tmp_path / "base", tiny_config(tied=False))
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    model.model.embed_tokens.weight.data[24:] = math.inf
    model.save_pretrained(base)
    write_data(tmp_path / "data")
    result = torchrun(tmp_path, "run", 1, "--max-skipped-in-a-row", "3")
    assert result.returncode == 1
    assert "3 steps in a row had no finite loss and gradient, up to step 3." in result.stderr


def test_sequences_beyond_the_models_context_are_refused():
    for config in (tiny_config(), tiny_config(transformers.MistralConfig, sliding_window=100)):
        with pytest.raises(SystemExit, match=r"300 tokens, the model's context or window is \d+. Run prepare_data.py"):
            sft_v1.check_lengths(np.array([300]), "training", 1, config, 4096)


def test_a_base_that_does_not_load_is_a_sentence(tmp_path):
    base = write_base(tmp_path / "base", tiny_config())
    (base / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(SystemExit, match=r"base does not load .* Run resize_vocab.py"):
        sft_model.load_model(base, 16)
    tensors = {"model.norm.weight": torch.ones(64)}
    safetensors.torch.save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SystemExit, match=r"lacks \d+ tensors, first"):
        sft_model.load_model(base, 16)


def test_without_torchrun_it_says_how_to_start(work):
    result = subprocess.run([sys.executable, ROOT / "sft_v1.py"], capture_output=True, text=True, cwd=work)
    assert result.returncode == 1 and "Start this script with torchrun" in result.stderr
    assert "Traceback" not in result.stderr


def default_settings():
    return {name: getattr(sft_v1, name) for _, name, _ in settings.constants(ROOT / "sft_v1.py")}


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("SEQUENCES_PER_STEP", 0, "at least 1"),
        ("LEARNING_RATE", 0.0, "above 0"),
        ("LEARNING_RATE", math.nan, "above 0"),
        ("WARMUP_STEPS", -1, "at least 0"),
        ("ADAM_BETA2", 1.0, "below 1"),
        ("MIN_LEARNING_RATE", 1.0, "is above LEARNING_RATE"),
        ("MEMORY_POLICY", "often", "one of auto, per_step, per_micro_batch"),
        ("COMPUTE_DTYPE", "int8", "one of bfloat16, float32"),
    ],
)
def test_impossible_settings_are_refused(name, value, sentence):
    sft_v1.validate_settings(default_settings())
    with pytest.raises(SystemExit, match=f"{name}.*{sentence}"):
        sft_v1.validate_settings(default_settings() | {name: value})


def test_what_does_not_belong_together_is_refused(work, tmp_path):
    data, base = write_data(tmp_path / "data"), shutil.copytree(work / "base", tmp_path / "base")
    assert sft_v1.agree(data, base).keys() == {"data", "tokenizer", "base"}
    with pytest.raises(SystemExit, match=r"none/report.json is missing. Run prepare_data.py"):
        sft_v1.agree(tmp_path / "none", base)
    with pytest.raises(SystemExit, match=r"none/config.json is missing. Run resize_vocab.py"):
        sft_v1.agree(data, tmp_path / "none")
    (base / "model.safetensors").rename(tmp_path / "kept")
    with pytest.raises(SystemExit, match=r"base has no safetensors. Run resize_vocab.py"):
        sft_v1.agree(data, base)
    (tmp_path / "kept").rename(base / "model.safetensors")
    shutil.rmtree(data / "train")
    with pytest.raises(SystemExit, match=r"holds no finished data .* Run prepare_data.py"):
        dataloader.load_data(str(data))
    (base / "tokenizer.json").write_bytes(b"another")
    with pytest.raises(SystemExit, match=r"tokenizers of .* differ. Run resize_vocab.py"):
        sft_v1.agree(data, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"vocab_size": "515"}))
    with pytest.raises(SystemExit, match=r"515 rows .* this base was not resized"):
        sft_v1.agree(data, base)
    write_base(base, tiny_config(vocab_size=500))
    with pytest.raises(SystemExit, match=r"500 rows .* 515 tokens: this base was not resized"):
        sft_v1.agree(data, base)
    (data / "tokenizer" / "tokenizer.json").write_bytes(b"another")
    with pytest.raises(SystemExit, match=r"not the one its report names. Run prepare_data.py"):
        sft_v1.agree(data, base)
    (data / "report.json").write_text("{")
    with pytest.raises(SystemExit, match="not readable JSON"):
        sft_v1.agree(data, base)


def test_a_folder_of_another_run_is_refused_and_left_alone(tmp_path):
    facts = {"fingerprints": {"data": "a", "tokenizer": "b", "base": "c"}, "settings": {"SEED": 1}}
    facts["settings"]["SEQUENCES_PER_STEP"] = 32
    sft_v1.check_output(tmp_path, facts)
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(SystemExit, match="not empty and holds no run"):
        sft_v1.check_output(tmp_path, facts)
    (tmp_path / "run.json").write_text(json.dumps(facts))
    sft_v1.check_output(tmp_path, facts)
    with pytest.raises(SystemExit, match=r"differs in data \(then a, now z\)"):
        sft_v1.check_output(tmp_path, facts | {"fingerprints": facts["fingerprints"] | {"data": "z"}})
    with pytest.raises(SystemExit, match=r"differs in SEED \(then 1, now 2\)"):
        sft_v1.check_output(tmp_path, facts | {"settings": facts["settings"] | {"SEED": 2}})
    (tmp_path / "run.json").write_text(json.dumps(facts | {"settings": [1]}))
    with pytest.raises(SystemExit, match=r"differs in SEED \(then None, now 1\)"):
        sft_v1.check_output(tmp_path, facts)
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_a_sequence_beyond_the_token_budget_is_refused_at_start(work):
    result = torchrun(work, "small", 1, "--tokens-per-micro-batch", "50")
    assert result.returncode == 1
    assert "more than TOKENS_PER_MICRO_BATCH = 50. Raise it to at least 63." in result.stderr


@pytest.mark.parametrize(
    "config",
    [
        tiny_config(transformers.GraniteConfig, logits_scaling=8.0),
        tiny_config(transformers.Gemma2Config, head_dim=16),
        tiny_config(transformers.MistralConfig, sliding_window=8),
    ],
    ids=["scaled-logits", "soft-caps", "sliding-window"],
)
def test_a_model_that_does_more_than_llama_is_refused(tmp_path, config):
    base = write_base(tmp_path / "base", config)
    with pytest.raises(SystemExit, match=r"cannot train this architecture|does more to its logits"):
        sft_model.load_model(base, 16)
