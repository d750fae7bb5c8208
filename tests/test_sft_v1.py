"""sft_v1.py: its schedule and gates by import, whole runs in this process and through torchrun with gloo processes.

bash tests/run.sh tests/test_sft_v1.py
"""

import json
import math
import os
import pickle
import re
import resource
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from helpers import (
    ROOT,
    RUN,
    TORCHRUN,
    Attack,
    assert_same_steps,
    bytes_for_a_tensor,
    default_settings,
    edit_json,
    go_back,
    metrics,
    poison,
    run_alone,
    run_settings,
    sequences,
    stored,
    tiny_config,
    train_command,
    trained,
    write_base,
    write_data,
)

import sft_v1
from sft.data import chatml
from sft.training import checkpoints, dataloader
from sft.training import model as sft_model

# ---- Optimizer ----


def test_weight_decay_spares_norms_and_biases(tmp_path):
    model = sft_model.load_model(write_base(tmp_path / "base", tiny_config(transformers.Qwen2Config)))
    decayed, spared = sft_v1.make_optimizer(model, (0.9, 0.95), 0.01).param_groups
    assert decayed["weight_decay"] == 0.01 and spared["weight_decay"] == 0
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)].rsplit(".", 1)[1] for p in decayed["params"]} == {"weight"}
    assert all("norm" in names[id(p)] or names[id(p)].endswith("bias") for p in spared["params"])
    assert len(decayed["params"]) + len(spared["params"]) == len(names)


# ---- The uninterrupted run on two ranks ----


@pytest.mark.torchrun
def test_the_loss_falls_and_the_start_up_lines_say_what_will_happen(runs, two_ranks):
    lines = metrics(two_ranks)
    assert [line["step"] for line in lines] == list(range(31))
    assert lines[30]["loss"] < lines[1]["loss"] - 0.5
    assert lines[30]["validation_loss"] < lines[0]["validation_loss"] - 0.5
    stdout = (runs / "stdout").read_text()
    assert "32 sequences = about 1,193 real tokens (padded to 63 each, it would be 2,016 slots" in stdout
    assert "30 steps" in stdout and "start      from the base" in stdout
    assert [path.name for path in checkpoints.listed(two_ranks)] == [f"step_0000{n}0" for n in (3, 2, 1)]
    best = min(lines[10::10], key=lambda line: line["validation_loss"])
    named = {"checkpoint": checkpoints.checkpoint_name(best["step"]), "validation_loss": best["validation_loss"]}
    assert json.loads((two_ranks / "run.json").read_text())["best"] == named
    assert f"best  {two_ranks}/{named['checkpoint']}: validation loss" in stdout
    assert (two_ranks / "loss.png").stat().st_size > 10_000
    assert list((two_ranks / "tensorboard").iterdir())
    state = checkpoints.verify(two_ranks / "step_000030")
    assert state["updates"] == 30 and state["settings"]["LEARNING_RATE"] == 1e-3


@pytest.mark.torchrun
def test_master_weights_and_moments_are_float32_and_a_tied_weight_is_stored_once(runs, two_ranks):
    tensors = stored(two_ranks / "step_000030")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    names = {name.removeprefix("model.") for name in tensors if name.startswith("model.")}
    reference = transformers.AutoModelForCausalLM.from_pretrained(runs / "base")
    assert names == {name for name, _ in reference.named_parameters()}
    assert set(tensors) == {f"model.{n}" for n in names} | {
        f"optimizer.{key}.{n}" for key in ("step", "exp_avg", "exp_avg_sq") for n in names
    }


# ---- Other layouts, other numbers of ranks ----


@pytest.mark.torchrun
def test_two_ranks_that_communicate_per_micro_batch_compute_the_same_steps(runs, two_ranks):
    trained(runs, "often", 2, COMMUNICATE="per_micro_batch", TOKENS_PER_MICRO_BATCH=160)
    assert_same_steps(runs / "often", two_ranks)


@pytest.mark.torchrun
def test_one_rank_computes_the_same_steps_with_other_settings_of_speed(runs, two_ranks, alone, monkeypatch):
    monkeypatch.setattr(sft_model, "LOSS_CHUNK_TOKENS", 9)
    settings = {"COMMUNICATE": "per_micro_batch", "ACTIVATION_CHECKPOINTING": "off", "TOKENS_PER_MICRO_BATCH": 80}
    run_alone(alone, runs, "single", **settings)
    assert_same_steps(runs / "single", two_ranks)


def test_a_deterministic_run_takes_only_operations_that_repeat_their_bits(runs, alone, monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    short = {"MAX_STEPS": 4, "VALIDATE_EVERY": 0}
    run_alone(alone, runs, "plain", **short)
    try:
        run_alone(alone, runs, "deterministic", DETERMINISTIC="on", **short)
        assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    assert metrics(runs / "deterministic") == metrics(runs / "plain")  # a CPU repeats its bits anyway


@pytest.mark.torchrun
def test_a_run_continues_on_another_number_of_ranks(runs, two_ranks, alone, monkeypatch):
    go_back(two_ranks, runs / "relay", 10)
    with monkeypatch.context() as patch:  # one step, from two ranks to one: a STOP that is made while it loads
        patch.setattr(sft_v1.export_hf, "dry_run", lambda folder: (runs / "relay" / "STOP").touch())
        run_alone(alone, runs, "relay")
    assert not (runs / "relay" / "STOP").exists()
    assert checkpoints.latest_whole(runs / "relay").name == "step_000011"
    trained(runs, "relay", 3, TOKENS_PER_MICRO_BATCH=4096)  # to three
    assert_same_steps(runs / "relay", two_ranks)
    assert checkpoints.verify(runs / "relay" / "step_000030")["world_size"] == 3
    moved = stored(runs / "relay" / "step_000030")["model.model.embed_tokens.weight"]
    moved = moved != stored(two_ranks / "step_000010")["model.model.embed_tokens.weight"]
    assert moved.any(dim=1).all()  # 3 does not divide the 515 rows of the tied embedding
    shutil.rmtree(runs / "relay" / "step_000030")
    run_alone(alone, runs, "relay")  # from three to one
    assert_same_steps(runs / "relay", two_ranks)
    assert checkpoints.verify(runs / "relay" / "step_000030")["world_size"] == 1


@pytest.mark.torchrun
def test_two_machines_compute_the_same_steps_and_continue_on_one(runs, two_ranks, alone):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    nodes = []
    for node in ("0", "1"):
        line = train_command(runs, "machines", 2, "--nnodes", "2", "--node-rank", node, "--rdzv-id", "1")
        line[line.index("localhost:0")] = f"localhost:{port}"
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        nodes.append(subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env))
    outputs = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert any("4 on cpu, sharded over 2, on 2 machines" in text for text in outputs)
    assert_same_steps(runs / "machines", two_ranks)
    shutil.rmtree(runs / "machines" / "step_000030")
    run_alone(alone, runs, "machines")
    assert_same_steps(runs / "machines", two_ranks)


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
batches = [dataloader.concatenate([(rng.integers(0, 515, 30), np.ones(30, bool))]) for _ in range(8)]
gradients, counts = {}, {}
for communicate in ("per_step", "per_micro_batch"):
    model = sft_model.load_model(sys.argv[1])
    sft_v1.shard(model, mesh, torch.float32, communicate)
    seen = collections.Counter()
    with Count():
        for number, batch in enumerate(batches, start=1):
            sft_v1.forward_backward(model, batch, 1.0, number == 8 or communicate == "per_micro_batch")
    gradients[communicate] = [p.grad.full_tensor() for p in model.parameters()]
    counts[communicate] = seen
same = all(torch.allclose(a, b, rtol=2e-5, atol=2e-5 * float(a.abs().max())) for a, b in zip(*gradients.values()))
if dist.get_rank() == 0:
    print("COUNTS", json.dumps(counts | {"same": same}))
"""


@pytest.mark.torchrun
def test_each_unit_is_gathered_once_and_reduced_once_in_a_step_of_eight_micro_batches(runs, tmp_path):
    (tmp_path / "count.py").write_text(COUNT)
    line = [*TORCHRUN, "2", str(tmp_path / "count.py"), str(runs / "base")]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(line, capture_output=True, text=True, env=env, timeout=300)
    counts = json.loads(result.stdout.partition("COUNTS ")[2])
    assert counts.pop("same")
    units = 3  # two blocks and the root
    assert counts["per_step"] == {"allgather": units, "reducescatter": units}
    # In each micro-batch the blocks are gathered for the forward and again for the backward.
    assert counts["per_micro_batch"] == {"allgather": 8 * (2 * units - 1), "reducescatter": 8 * units}


def test_micro_batches_of_many_lengths_do_not_make_the_memory_of_a_bfloat16_run_grow(tmp_path):
    longest, steps = 512, 40
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "max_position_embeddings": longest}
    write_base(tmp_path / "base", tiny_config(vocab_size=8192, **sizes))
    lengths = np.geomspace(20, longest, 4 * steps).astype(int)
    ids = [np.arange(length, dtype=np.uint16) for length in np.random.default_rng(0).permutation(lengths)]
    data = write_data(tmp_path / "data", 8192, train=(ids, [np.ones(len(row), bool) for row in ids]))
    edit_json(data / "report.json", max_seq_len=longest)
    training = {"MAX_STEPS": steps, "SEQUENCES_PER_STEP": 4, "TOKENS_PER_MICRO_BATCH": 4 * longest}
    rare = {"SAVE_EVERY": steps, "VALIDATE_EVERY": 0, "ACTIVATION_CHECKPOINTING": "off"}
    trained(tmp_path, "run", 1, COMPUTE_DTYPE="bfloat16", **training, **rare)
    highest = [json.loads(line)["allocated_gib"] for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert len(highest) == steps
    assert highest[-1] < 1.1 * highest[24]  # the caches are full by then; 1.03, with every kernel kept 1.19


# ---- A run of two steps in which much happens ----

NEVER = 40_000  # a token that only one sequence has: its embedding is infinite
PROMPTS = ("Who are you?", "Why?")


@pytest.fixture(scope="module")
def eventful(tmp_path_factory, bpe_tokenizer_dir):
    """Two steps on three ranks, which do not divide the untied 49,156 rows: one is skipped, one updates; with answers.

    Returns: (folder with base/, data/ and run/, what it printed).
    """
    folder = tmp_path_factory.mktemp("eventful")
    tokenizer, _ = chatml.extend_tokenizer(str(bpe_tokenizer_dir), True, True)
    base = write_base(
        folder / "base", tiny_config(vocab_size=len(tokenizer), tied=False, hidden_size=16, intermediate_size=32)
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    model.model.embed_tokens.weight.data[NEVER] = math.inf
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    stop = transformers.GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    stop.save_pretrained(base)
    new = np.arange(49_152, 49_156, dtype=np.uint16)
    ids, masks = sequences(64, 40)
    ids = [np.concatenate([row[:6], new]) for row in ids]
    masks = [np.concatenate([mask[:6], [True] * 4]) for mask in masks]
    ids[0][0] = NEVER
    write_data(folder / "data", len(tokenizer), (ids, masks), tokenizer=tokenizer)
    changes = {"MAX_STEPS": 2, "SAVE_EVERY": 1, "VALIDATE_EVERY": 1, "WARMUP_STEPS": 0, "WEIGHT_DECAY": 0.0}
    return folder, trained(folder, "run", 3, PROMPTS=PROMPTS, **changes)


@pytest.mark.torchrun
def test_a_non_finite_step_updates_nothing_and_is_reported(eventful):
    folder, stdout = eventful
    assert stdout.count("was skipped") == 1
    (line,) = [json.loads(line) for line in (folder / "run" / "skipped.jsonl").read_text().splitlines()]
    assert 0 in line["sequences"] and len(line["sequences"]) == 32 and line["loss"] is None
    skipped = [line["loss"] is None for line in metrics(folder / "run")[1:]]
    assert sorted(skipped) == [False, True]
    step = skipped.index(True) + 1
    tensors = stored(folder / "run" / f"step_00000{step}")
    updates = step - 1
    assert all(tensor == updates for name, tensor in tensors.items() if name.startswith("optimizer.step"))
    assert all(t.isfinite().all() for name, t in tensors.items() if "embed_tokens" not in name)
    assert not updates or torch.equal(
        tensors["model.lm_head.weight"], stored(folder / "run" / "step_000001")["model.lm_head.weight"]
    )


@pytest.mark.torchrun
def test_every_new_row_that_occurs_moves_when_ranks_do_not_divide_the_vocabulary(eventful):
    folder, _ = eventful
    before = transformers.AutoModelForCausalLM.from_pretrained(folder / "base").state_dict()
    after = stored(folder / "run" / "step_000002")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        moved = (after[f"model.{name}"] != before[name]).any(dim=1)
        assert moved[[5, 49_152, 49_153, 49_154]].all(), name
        assert name == "lm_head.weight" or not moved[1000:NEVER].any()  # without weight decay only the gradient moves


@pytest.mark.torchrun
def test_a_run_answers_its_prompts_at_each_validation(eventful):
    folder, stdout = eventful
    lines = [json.loads(line) for line in (folder / "run" / "answers.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert all(line["answers"].keys() == set(PROMPTS) for line in lines)
    assert "Who are you? -> " in stdout
    assert all(0 <= line["answers_stopped"] <= 1 and "validation_loss/x" in line for line in metrics(folder / "run"))


# ---- Runs that stop or continue, in this process ----


def test_a_run_that_learns_nothing_stops(tmp_path, alone, capsys):
    base = write_base(tmp_path / "base", tiny_config(tied=False))
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    model.model.embed_tokens.weight.data[24:] = math.inf
    model.save_pretrained(base)
    write_data(tmp_path / "data")
    with pytest.raises(SystemExit, match=r"10 steps in a row had no finite loss and gradient, up to step 10\."):
        run_alone(alone, tmp_path, "run", SAVE_EVERY=100)
    assert capsys.readouterr().out.count("was skipped") == 10


def test_a_full_disk_leaves_the_older_checkpoint_and_ends_with_a_sentence(runs, alone, capsys):
    run_alone(alone, runs, "full", MAX_STEPS=10)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600 * 1024, hard))  # bytes of the largest file
    try:
        with pytest.raises(SystemExit, match=r"The last checkpoint could not be written\. Make room"):
            run_alone(alone, runs, "full", MAX_STEPS=13, SAVE_EVERY=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "WARNING: no checkpoint at step 11, next try in 1 steps" in capsys.readouterr().out
    assert metrics(runs / "full")[-1]["warning"] == "no checkpoint since step 10"
    assert checkpoints.latest_whole(runs / "full").name == "step_000010"
    assert not list((runs / "full").glob("*.unfinished"))
    run_alone(alone, runs, "full", MAX_STEPS=13)
    assert "continue" in capsys.readouterr().out


@pytest.mark.torchrun
def test_a_changed_setting_is_reported_and_kept_in_the_history(runs, two_ranks, alone, capsys):
    go_back(two_ranks, runs / "back", 20)
    run_alone(alone, runs, "back", RESUME="step_000020", LEARNING_RATE=2e-3, MAX_STEPS=21)
    stdout = capsys.readouterr().out
    assert "WARNING: settings changed after step 20: " in stdout
    assert "LEARNING_RATE: 0.001 then, 0.002 now" in stdout and "CHECKPOINT_DIR: " in stdout
    assert "PROMPTS: " not in stdout  # a tuple comes back as a list
    history = checkpoints.verify(runs / "back" / "step_000021")["history"]
    assert history[0]["after_step"] == 20
    assert {"MAX_STEPS: 30 then, 21 now", "ranks: 2 then, 1 now"} <= set(history[0]["changed"])


@pytest.mark.torchrun
def test_a_finished_run_has_nothing_to_do(runs, two_ranks, alone, capsys):
    shutil.copytree(two_ranks, runs / "finished")
    run_alone(alone, runs, "finished")
    assert "Nothing to do: 30 of 30 steps are done." in capsys.readouterr().out


def test_frozen_parameters_stay_as_they_are_and_the_others_are_trained(runs, alone):
    model = sft_model.load_model(runs / "base")
    model.causal_lm.base_model.layers[0].requires_grad_(False)
    model.causal_lm.base_model.layers[1].input_layernorm.requires_grad_(False)
    sft_v1.shard(model, alone, torch.float32, "per_step")
    optimizer = sft_v1.make_optimizer(model, (0.9, 0.95), 0.01)
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 1e-3
    before = {name: p.full_tensor().clone() for name, p in model.named_parameters()}
    batch = dataloader.concatenate([(np.arange(40), np.ones(40, bool))])
    *_, updated, _ = sft_v1.train_step(model, optimizer, [batch], 39, "per_step", 1.0)
    assert updated
    for name, p in model.named_parameters():
        frozen = "layers.0." in name or "layers.1.input_layernorm" in name
        assert torch.equal(p.full_tensor(), before[name]) is frozen, name
    assert not [name for name in sft_v1.checkpoint_tensors(model, optimizer) if "exp_avg.model.layers.0." in name]


def test_a_stop_of_a_finished_run_does_not_end_the_next_which_says_how_the_rate_goes_on(runs, alone, capsys):
    changes = {"VALIDATE_EVERY": 0, "MIN_LEARNING_RATE": 1e-4}
    run_alone(alone, runs, "longer", MAX_STEPS=5, **changes)
    (runs / "longer" / "STOP").touch()
    run_alone(alone, runs, "longer", MAX_STEPS=8, **changes)
    stdout = capsys.readouterr().out
    assert "MAX_STEPS: 5 then, 8 now" in stdout and "learning rate: 0.0001 at step 5, 0.00055 at the next" in stdout
    (runs / "longer" / "STOP").mkdir()
    run_alone(alone, runs, "longer", MAX_STEPS=9, **changes)
    assert checkpoints.latest_whole(runs / "longer").name == "step_000009"
    assert [path.name for path in (runs / "longer").glob("STOP")] == ["STOP"]


def test_a_warm_up_that_outlasts_the_run_is_refused(runs, alone, capsys):
    with pytest.raises(SystemExit):
        run_alone(alone, runs, "warm", WARMUP_STEPS=30)
    assert "WARMUP_STEPS is 30, but the run has only 30 steps" in capsys.readouterr().err


# ---- Checkpoints that must not be continued ----


@pytest.fixture
def tampered(runs, two_ranks, alone, tmp_path):
    """A function that continues from step 20 of the run on two ranks with another state.json or other tensors."""

    whole = two_ranks / "step_000020"
    state, tensors = checkpoints.verify(whole), stored(whole)

    def load(new_tensors=tensors, new_metadata=None, **changes):
        checkpoint = checkpoints.save(tmp_path, 20, new_tensors, state | changes)
        if new_metadata:
            poison(checkpoint, new_metadata)
        model = sft_model.load_model(runs / "base")
        sft_v1.shard(model, alone, torch.float32, "per_step")
        ours = sft_v1.checkpoint_tensors(model, sft_v1.make_optimizer(model, (0.9, 0.95), 0.01))
        return checkpoints.load(checkpoint, ours, state["fingerprints"])

    load.tensors = tensors
    return load


@pytest.mark.torchrun
def test_a_checkpoint_that_was_not_tampered_with_is_loaded(tampered):
    assert tampered()["step"] == 20


@pytest.mark.torchrun
def test_a_checkpoint_runs_no_code_when_it_is_continued(tampered, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"names posix\.system, which no DCP metadata needs"):
        tampered(new_metadata=lambda content: content[:-1] + pickle.dumps(Attack())[2:])
    name = "model.model.norm.weight"
    with pytest.raises(SystemExit, match=rf"step_000020 lacks tensors: 1 of .*, first {re.escape(name)}"):
        tampered(new_metadata=bytes_for_a_tensor(name))
    assert not (tmp_path / "broken-into").exists()


@pytest.mark.torchrun
def test_a_checkpoint_without_optimizer_state_is_refused(tampered):
    weights = {name: tensor for name, tensor in tampered.tensors.items() if name.startswith("model.")}
    with pytest.raises(SystemExit, match="step_000020 lacks optimizer state: "):
        tampered(weights)


@pytest.mark.torchrun
def test_moments_of_other_updates_are_refused(tampered):
    with pytest.raises(SystemExit, match=r"moments are from update 20, the weights from update 19"):
        tampered(updates=19)


@pytest.mark.torchrun
def test_moments_that_are_all_zero_are_refused(tampered):
    zeros = {name: t * 0 if ".exp_avg_sq." in name else t for name, t in tampered.tensors.items()}
    with pytest.raises(SystemExit, match=r"all of optimizer.exp_avg_sq.\* is zero after 20 updates; choose another."):
        tampered(zeros)


@pytest.mark.torchrun
def test_a_checkpoint_of_other_data_or_with_another_name_is_refused(tampered):
    with pytest.raises(SystemExit, match="was trained on other data or from another base: data: "):
        tampered(fingerprints={})
    with pytest.raises(SystemExit, match="holds step 10: it was renamed"):
        tampered(step=10)


# ---- Gates ----


def test_sequences_beyond_the_models_context_are_refused():
    for config in (tiny_config(), tiny_config(transformers.MistralConfig, sliding_window=100)):
        with pytest.raises(SystemExit, match=r"300 tokens, the model's context or window is \d+. Run prepare_data.py"):
            dataloader.check_lengths(np.array([300]), "training", 1, config, 4096)


def test_a_sequence_beyond_the_token_budget_is_refused_at_start(runs):
    args = default_settings() | run_settings(runs, "small", TOKENS_PER_MICRO_BATCH=50)
    with pytest.raises(SystemExit, match=r"more than TOKENS_PER_MICRO_BATCH = 50\. Raise it to at least 63\."):
        sft_v1.load_inputs(args)


def test_without_torchrun_it_says_how_to_start(tmp_path):
    result = subprocess.run([sys.executable, ROOT / "sft_v1.py"], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 1 and "Start this script with torchrun" in result.stderr
    assert "Traceback" not in result.stderr


def test_each_number_among_the_settings_has_one_lower_bound():
    bounded = [*sft_v1.AT_LEAST, *sft_v1.ABOVE_0]
    numbers = [name for name, value in default_settings().items() if type(value) in (int, float)]
    assert sorted(bounded) == sorted(numbers) and set(RUN) <= set(default_settings())


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("SEQUENCES_PER_STEP", 0, "at least 1"),
        ("LEARNING_RATE", 0.0, "above 0"),
        ("LEARNING_RATE", math.nan, "above 0"),
        ("WARMUP_STEPS", -1, "at least 0"),
        ("ADAM_BETA2", 1.0, "below 1"),
        ("MIN_LEARNING_RATE", 1.0, "is above LEARNING_RATE"),
        ("COMMUNICATE", "often", "one of auto, per_step, per_micro_batch"),
        ("COMPUTE_DTYPE", "int8", "one of bfloat16, float32"),
    ],
)
def test_impossible_settings_are_refused(name, value, sentence):
    sft_v1.validate_settings(default_settings())
    with pytest.raises(SystemExit, match=f"{name}.*{sentence}"):
        sft_v1.validate_settings(default_settings() | {name: value})


def check(data, base):
    return sft_v1.check_inputs(data, dataloader.read_report(data), base)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_a_base_that_was_resized_for_another_template_or_tokenizer_is_refused(runs, tmp_path, name):
    base = shutil.copytree(runs / "base", tmp_path / "base")
    (base / name).write_text("keep = true" * 100)
    with pytest.raises(SystemExit, match=rf"tokenizers of .* differ: {name}: .* here. Run resize_vocab.py") as refusal:
        check(runs / "data", base)
    assert "keep" not in str(refusal.value)


def test_a_run_is_not_continued_with_another_rope_theta_or_on_data_of_which_half_is_zero(runs, tmp_path, alone, capsys):
    changes = {"MAX_STEPS": 4, "VALIDATE_EVERY": 0}
    for name in ("base", "data"):
        shutil.copytree(runs / name, tmp_path / name)
    run_alone(alone, tmp_path, "run", **changes)
    again = shutil.copytree(tmp_path / "base", tmp_path / "again")
    edit_json(again / "config.json", rope_parameters={"rope_theta": 5e5, "rope_type": "default"})
    with pytest.raises(SystemExit):
        run_alone(alone, tmp_path, "run", RESIZED_MODEL=str(again), **changes)
    sentence = "run holds another run: config.json rope_parameters.rope_theta: 10000.0 then, 500000.0 now. Name another"
    assert sentence in capsys.readouterr().err
    (path,) = (tmp_path / "data" / "train").glob("*.arrow")
    content = bytearray(path.read_bytes())
    content[len(content) // 4 : len(content) // 2] = bytes(len(content) // 2 - len(content) // 4)
    path.write_bytes(content)
    with pytest.raises(SystemExit):
        run_alone(alone, tmp_path, "run", **changes)
    assert "the ids, lengths or masks of x (train split) are not what prepare_data.py wrote" in capsys.readouterr().err


def test_what_does_not_belong_together_is_refused(runs, tmp_path):
    data, base = write_data(tmp_path / "data"), shutil.copytree(runs / "base", tmp_path / "base")
    assert check(data, base).items() >= {"config.json vocab_size": 515, "special_tokens_map.json": None}.items()
    with pytest.raises(SystemExit, match=r"none/report.json is missing. Run prepare_data.py"):
        check(tmp_path / "none", base)
    with pytest.raises(SystemExit, match=r"none/config.json is missing. Run resize_vocab.py"):
        check(data, tmp_path / "none")
    (base / "model.safetensors").rename(tmp_path / "kept")
    with pytest.raises(SystemExit, match=r"base has no safetensors. Run resize_vocab.py"):
        check(data, base)
    (tmp_path / "kept").rename(base / "model.safetensors")
    shutil.rmtree(data / "train")
    with pytest.raises(SystemExit, match=r"holds no finished data .* Run prepare_data.py"):
        dataloader.load_data(str(data))
    (base / "tokenizer.json").write_bytes(b"another")
    with pytest.raises(SystemExit, match=r"tokenizers of .* differ: tokenizer.json: .* Run resize_vocab.py"):
        check(data, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"vocab_size": "515"}))
    with pytest.raises(SystemExit, match=r"515 rows .* this base was not resized"):
        check(data, base)
    write_base(base, tiny_config(vocab_size=500))
    with pytest.raises(SystemExit, match=r"500 rows .* 515 tokens: this base was not resized"):
        check(data, base)
    (data / "tokenizer" / "tokenizer.json").write_bytes(b"another")
    with pytest.raises(SystemExit, match=r"not the one its report names: tokenizer.json: .* Run prepare_data.py"):
        check(data, base)
    (data / "report.json").write_text("{")
    with pytest.raises(SystemExit, match="not readable JSON"):
        check(data, base)


def test_a_run_on_a_quick_look_at_the_data_warns(tmp_path, capsys):
    data, checkpoint_dir = write_data(tmp_path / "data"), tmp_path / "run"
    checkpoint_dir.mkdir()
    args = {"DATA_DIR": str(data), "CHECKPOINT_DIR": str(checkpoint_dir)}
    state = sft_v1.State(settings={}, fingerprints={}, versions={}, world_size=1)
    report = dataloader.read_report(data)
    sft_v1.announce(args, state, report, "the plan", 0, [])
    assert "WARNING" not in capsys.readouterr().out
    sft_v1.announce(args, state, report | {"limit": 1000}, "the plan", 0, [])
    warning = "WARNING: the data was prepared with --limit 1000. Don't take this run for the real one."
    assert warning in capsys.readouterr().out.splitlines()


def test_a_folder_of_another_run_is_refused_and_left_alone(tmp_path):
    def check(**changes):
        fingerprints = {"data": "a", "tokenizer": "b", "base": "c"} | changes.get("fingerprints", {})
        settings = {"SEED": 1, "SEQUENCES_PER_STEP": 32} | changes.get("settings", {})
        state = sft_v1.State(settings, fingerprints, versions={}, world_size=1)
        sft_v1.check_folder(tmp_path, state)
        return state

    state = check()
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(SystemExit, match="not empty and holds no run"):
        check()
    stored = sft_v1.asdict(state)
    (tmp_path / "run.json").write_text(json.dumps(stored))
    check()
    with pytest.raises(SystemExit, match="holds another run: data: a then, z now"):
        check(fingerprints={"data": "z"})
    with pytest.raises(SystemExit, match="holds another run: SEED: 1 then, 2 now"):
        check(settings={"SEED": 2})
    (tmp_path / "run.json").write_text(json.dumps(stored | {"settings": [1]}))
    with pytest.raises(SystemExit, match="holds another run: SEED: None then, 1 now"):
        check()
    assert (tmp_path / "thesis.txt").read_text() == "precious"
