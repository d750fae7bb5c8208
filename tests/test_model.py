"""model.py: gradients against the padded reference, the chunked loss, compilation, and what cannot be trained.

bash tests/run.sh tests/test_model.py
"""

import importlib.util
import math
import sysconfig

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from common import genesis_lengths
from helpers import sequences, tiny_config, write_base

import sft_v1
from sft.training import dataloader, memory_plan, validation
from sft.training import model as sft_model


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(sft_model, "LOSS_CHUNK_TOKENS", 16)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("model") / "base", tiny_config())


def loaded(base, checkpointing, compile_blocks=False, device_type="cpu"):
    model = sft_model.load_model(base)
    sft_model.prepare_blocks(model, checkpointing, compile_blocks, device_type)
    return model


def sequence(length):
    """Return (ids, mask) of a sequence of `length` tokens, all of them trained."""
    return np.arange(length), np.ones(length, bool)


def packed_gradients(base, rows, groups):
    """Return (loss, gradients by name) of `rows` in `groups` accumulated micro-batches through SFTModel."""
    model = loaded(base, True)
    total = 0.0
    for group in np.array_split(np.arange(len(rows)), groups):
        loss = model(dataloader.concatenate([rows[i] for i in group]))
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


def compiled_graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_compiled_blocks_compute_the_same_and_nothing_is_compiled_after_the_rehearsal(base, alone):
    rows = list(zip(*sequences(12, 515), strict=True))
    plain, compiled = loaded(base, False), loaded(base, False, compile_blocks=True, device_type="cuda")
    torch._dynamo.utils.counters.clear()
    graphs = []
    for part in (rows[:4], rows[4:6], rows[6:]):  # other numbers of tokens and documents
        losses = []
        for model in (plain, compiled):
            model.zero_grad()
            losses.append(model(dataloader.concatenate(part)))
            losses[-1].backward()
        assert math.isclose(*(loss.item() for loss in losses), rel_tol=1e-5)
        for (name, p), q in zip(plain.named_parameters(), compiled.parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad, rtol=2e-5, atol=2e-5 * p.grad.abs().max().item(), msg=name)
        graphs.append(compiled_graphs())
    assert graphs[0] == graphs[-1] > 0  # those of the first block serve all blocks and sizes

    compiled.zero_grad()
    sft_v1.shard(compiled, alone, torch.bfloat16, "per_step")
    optimizer = sft_v1.make_optimizer(compiled, (0.9, 0.95), 0.01)
    lengths = genesis_lengths(200 * 4, cut=64)
    batches = [dataloader.concatenate([sequence(n) for n in lengths[i : i + 4]]) for i in range(0, len(lengths), 4)]
    largest = max(batches, key=lambda batch: batch.tokens)
    sft_v1.rehearse(compiled, optimizer, largest, "per_step")
    rehearsed, empty = compiled_graphs(), dataloader.concatenate([])
    with torch.compiler.set_stance("fail_on_recompile"):
        for step, batch in enumerate(batches):
            micro_batches = [batch, empty] if step % 10 == 0 else [batch]
            loss, _, updated, _ = sft_v1.train_step(compiled, optimizer, micro_batches, 100, "per_step", 1.0)
            assert updated and loss > 0
        compiled.eval()
        with torch.no_grad():
            for batch in (*batches[:20], empty):
                compiled(batch)
        validation.answer(compiled, [[1, 2, 3], [4]], 2, 4, torch.device("cpu"))
    assert compiled_graphs() == rehearsed


def test_compile_auto_is_on_for_a_gpu_with_a_compiler_and_off_on_a_cpu(monkeypatch, tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    monkeypatch.setenv("PATH", str(tools))
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "triton")
    lacking = "off: no C compiler (gcc or clang). Install it for a faster run"
    assert sft_model.choose_compile("auto", "cuda") == (False, lacking)
    with pytest.raises(SystemExit, match=r"COMPILE is on, but this machine has no C\+\+ compiler \(g\+\+\)\. Install"):
        sft_model.choose_compile("on", "cpu")
    for name in ("gcc", "g++"):
        (tools / name).write_text("")
        (tools / name).chmod(0o755)
    for setting, device, expected in (
        ("auto", "cuda", True), ("on", "cuda", True), ("off", "cuda", False),
        ("auto", "cpu", False), ("on", "cpu", True), ("off", "cpu", False),
    ):  # fmt: skip
        assert sft_model.choose_compile(setting, device)[0] == expected, (setting, device)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert "Python.h in " in sft_model.choose_compile("auto", "cuda")[1]


def test_perturbing_one_sequence_leaves_the_others_loss_unchanged_bit_for_bit(base):
    model = loaded(base, False)
    (first, _), (second, mask) = zip(*sequences(2, 515), strict=True)
    nothing = np.zeros(len(first), bool)
    alone = model(dataloader.concatenate([(second, mask)]))
    losses = [
        model(dataloader.concatenate([(ids.astype(np.uint16), nothing), (second, mask)]))
        for ids in (first, (first + 100) % 515)
    ]
    assert losses[0].item() == losses[1].item()
    assert math.isclose(losses[0].item(), alone.item(), rel_tol=1e-6)


def test_a_micro_batch_without_targets_gives_a_differentiable_zero(base):
    model = loaded(base, True)
    for rows in ([], [(np.arange(9), np.zeros(9, bool))]):
        loss = model(dataloader.concatenate(rows))
        loss.backward()
        assert loss.item() == 0 and all(not p.grad.any() for p in model.parameters())


def test_the_chunked_loss_equals_cross_entropy_and_never_holds_all_logits():
    torch.manual_seed(0)
    hidden, weight = torch.randn(50, 16, requires_grad=True), torch.randn(5000, 16, requires_grad=True)
    targets = torch.randint(0, 5000, (50,))
    F.cross_entropy(hidden @ weight.T, targets, reduction="sum").mul(0.5).backward()
    expected, hidden.grad, weight.grad = (hidden.grad, weight.grad), None, None
    largest = []

    class RecordLogits(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.shape[-1:] == (5000,) and len(result) != 16:  # the weight
                largest.append(result.numel())
            return result

    with RecordLogits():
        loss = sft_model.ChunkedCrossEntropy.apply(hidden, weight, targets, 7, True)
    loss.mul(0.5).backward()
    torch.testing.assert_close((hidden.grad, weight.grad), expected, rtol=1e-5, atol=1e-5)
    assert max(largest) == 7 * 5000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_vocabulary_that_16_bytes_do_not_divide_has_the_same_loss_from_rows_that_they_do(dtype):
    torch.manual_seed(0)
    hidden, weight = (torch.randn(rows, 16).to(dtype).requires_grad_() for rows in (50, 5003))
    targets = torch.randint(0, 5003, (50,))
    F.cross_entropy((hidden @ weight.T).float(), targets, reduction="sum").backward()
    expected, hidden.grad, weight.grad = (hidden.grad, weight.grad), None, None
    strides = []

    class RecordRows(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if "mm" in function._schema.name:
                tensors = [
                    tensor for tensor in (*args, result) if 5003 in tensor.shape and tensor.shape[0] in (7, 5003)
                ]
                logits = [tensor for tensor in tensors if 7 in tensor.shape]
                strides.extend(max(tensor.stride()) * tensor.element_size() for tensor in logits)
            return result

    with RecordRows():
        loss = sft_model.ChunkedCrossEntropy.apply(hidden, weight, targets, 7, True)
    loss.backward()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close((hidden.grad, weight.grad), expected, rtol=tolerance, atol=tolerance)
    assert len(strides) == 3 * 7 and all(stride % 16 == 0 for stride in strides)  # 7 chunks of 7 rows, three matmuls


def test_the_loss_holds_one_chunk_once_in_each_precision():
    hidden, weight = torch.randn(256, 16, dtype=torch.bfloat16), torch.randn(5000, 16, dtype=torch.bfloat16)
    targets = torch.randint(0, 5000, (256,))
    with memory_plan.LiveBytes([hidden, weight, targets]) as live:
        sft_model.ChunkedCrossEntropy.apply(hidden.requires_grad_(), weight.requires_grad_(), targets, 64, True)
    chunk, head = 64 * 5000, 5000 * 16
    assert live.peak < 1.03 * ((2 + 4) * chunk + 4 * head + 2 * hidden.numel())


def test_a_base_that_does_not_load_is_a_sentence(tmp_path):
    base = write_base(tmp_path / "base", tiny_config())
    (base / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(SystemExit, match=r"base can't be loaded as a model .* Run resize_vocab.py"):
        sft_model.load_model(base)
    tensors = {"model.norm.weight": torch.ones(64)}
    safetensors.torch.save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SystemExit, match=r"base does not load strictly: .*missing keys.* Run resize_vocab.py"):
        sft_model.load_model(base)


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
        sft_model.load_model(base)
