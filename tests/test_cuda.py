"""The CUDA path without a GPU: the trainer's own code on fake tensors on "cuda:0" with a fake process group.

Each scenario is a process of its own, because the device has to be registered before torch is imported.
Needs g++. Alone: bash tests/run.sh tests/test_cuda.py
"""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

pytestmark = pytest.mark.torchrun  # a minute of one core, in processes of their own
GIB = 2**30
BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
SMALL = {"vocab_size": 2048, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}

# ==== Scenarios: run by `python tests/test_cuda.py NAME` ====


def wait_in_a_micro_batch(run):
    """Plant a wait of the host behind each micro-batch."""
    real = run.trainer.forward_backward

    def waiting(*args):
        loss = real(*args)
        loss.item()
        return loss

    run.trainer.forward_backward = waiting


def keep_a_tensor(run):
    """Plant a tensor that stays after each step."""
    real, kept = run.trainer.train_step, []

    def keeping(model, optimizer, micro_batches, *args):
        kept.append(micro_batches[0].input_ids.clone())
        return real(model, optimizer, micro_batches, *args)

    run.trainer.train_step = keeping


def gather_again(run):
    """Plant that the gathered parameters are given back between two micro-batches."""
    from sft.training import validation

    real = run.trainer.forward_backward

    def resharding(model, *args):
        validation.reshard(model)
        return real(model, *args)

    run.trainer.forward_backward = resharding


def reduce_each_time(run):
    """Plant that each micro-batch reduces the gradients, with the reduction that is for one in a step."""
    real = run.trainer.forward_backward
    run.trainer.forward_backward = lambda model, batch, scale, communicate: real(model, batch, scale, True)


FAULTS = {"wait": wait_in_a_micro_batch, "kept": keep_a_tensor, "gather": gather_again, "race": reduce_each_time}


def by_hand():
    """Return what the two simulations make of traces that one can follow by hand."""
    import fake_cuda

    mib = 2**20
    memory = [("a", 40 * mib, "x"), ("b", 10 * mib, "x"), ("a", -40 * mib, "x"), ("c", 30 * mib, "x")]
    memory += [("d", 20 * mib, "x"), ("e", 1000, "x"), ("f", 5 * mib, "y")]
    gather, kernel = fake_cuda.Transfer("gather", 1e9), fake_cuda.Kernel("k", "else", 0, 0, 0.1)
    rank = [("", "send", "link", gather), ("", "record", "link", 1), ("", "run", "compute", kernel)]
    rank += [("", "wait", "compute", 1), ("", "run", "compute", kernel), ("", "run", "compute", kernel)]
    late = [("", "run", "link", kernel), *rank]
    waiting = [("", "run", "compute", kernel), ("", "host", "compute", "item"), *rank]
    cases = {"hidden": [rank, rank], "late": [rank, late], "the host waits": [waiting, waiting]}
    seconds = {name: fake_cuda.timeline(traces, 10e9) for name, traces in cases.items()}
    seconds["slow link"] = fake_cuda.timeline([rank, rank], 5e9)
    seconds["slow kernels"] = fake_cuda.timeline([rank, rank], 10e9, efficiency=0.5)
    pools = {" ".join(name): size / mib for name, size in fake_cuda.reserved(memory).items()}
    return {"seconds": seconds, "reserved_mib": pools}


def scenario(name):
    """Return the record of a scenario: dict of dicts of symbolic_gpu.count."""
    import symbolic_gpu
    import transformers

    if name in ("per_step", "per_micro_batch"):
        config = transformers.LlamaConfig(**symbolic_gpu.common.GENESIS)
        return {name: symbolic_gpu.count(config, 2, traced_ranks=(0,), COMMUNICATE=name)}
    config = transformers.LlamaConfig(**SMALL)
    chosen = {"COMMUNICATE": "per_step", "TOKENS_PER_MICRO_BATCH": 1024}
    records = {"two machines": symbolic_gpu.count(config, 2, traced_ranks=(0,), ranks=4, machines=2, **chosen)}
    records["by hand"] = by_hand()
    for fault, plant in {"none": None, **FAULTS}.items():
        records[fault] = symbolic_gpu.count(config, 2, traced_ranks=(0,), prepare=plant, **chosen)
    return records


@cache
def records(name):
    """Return `scenario(name)` from a process of its own."""
    done = subprocess.run([sys.executable, __file__, name], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


# ==== What must hold ====


def last(step):
    """Return the number of the last micro-batch of a step, as its phase names it: "micro-batch 4 of 4"."""
    return f"micro-batch {len(step['micro_batches'][0])} of {len(step['micro_batches'][0])}"


def check_waits(step):
    """Assert that the host waits for the device once, after the last micro-batch."""
    (waits,) = step["waits"]
    assert len({place for _, _, place in waits}) == 1, f"the host waits at {waits}"
    assert not [phase for phase, _, _ in waits if phase.startswith("micro-batch")], f"the host waits in {waits}"


def check_traffic(step, communicate):
    """Assert that the ranks gather and reduce when the plan says so, and as much."""
    (sent,) = step["sent"]
    gathers = {phase for phase, name, _ in sent if "allgather" in name}
    reductions = {phase for phase, name, _ in sent if "reduce_scatter" in name}
    count = len(step["micro_batches"][0])
    if communicate == "per_step":
        assert gathers == {f"micro-batch 1 of {count}"}, f"gathers in {gathers}"
        assert reductions == {last(step)}, f"reductions in {reductions}"
    else:
        every = {f"micro-batch {number} of {count}" for number in range(1, count + 1)}
        assert gathers == reductions == every
    total = sum(size for _, _, size in sent)
    assert total == pytest.approx(step["sent_planned"], rel=0.01), f"{total / 1e9} GB sent"


def check_memory(record):
    """Assert that no step leaves anything behind, and that a run takes what the plan says."""
    for step in record["steps"]:
        assert step["left_behind"] == [0], f"{step['left_behind']} bytes stay"
    planned = record["plan"]["total"]
    tensors = planned - record["plan"]["gaps"]
    assert 0.9 * tensors < record["alive"] < 1.02 * tensors, f"{record['alive'] / GIB} alive, {tensors / GIB} planned"
    reserved = sum(record["reserved"].values())
    assert reserved < planned, f"{reserved / GIB} reserved, {planned / GIB} planned"


def check_races(record):
    """Assert that no stream gets memory back on which another one may still be at work."""
    assert record["races"] == [], f"races: {record['races']}"


def check_state(record):
    """Assert that validation and answers came, and that a checkpoint would hold float32 on the device."""
    assert set(record["validation"]) == {"validation_loss", "validation_loss/x", "validation_loss/y"}
    assert len(record["answers"]) == 2
    assert record["state_dtypes"] == ["torch.float32"] and record["state_devices"] == ["cuda:0"]
    assert record["state_bytes"] == pytest.approx(record["plan"]["masters"] + record["plan"]["moments"], rel=0.01)


# ==== Tests ====


@pytest.mark.parametrize("communicate", ["per_step", "per_micro_batch"])
def test_genesis_trains_validates_answers_and_saves_on_two_cards_as_planned(communicate):
    record = records(communicate)[communicate]
    assert record["plan"]["communicate"] == communicate
    for step in record["steps"]:
        check_waits(step)
        check_traffic(step, communicate)
    check_memory(record)
    check_races(record)
    check_state(record)


def test_two_machines_of_two_cards_gather_inside_and_sum_across():
    record = records("small")["two machines"]
    for step in record["steps"]:
        check_waits(step)
        check_traffic(step, "per_step")
        (sent,) = step["sent"]
        assert last(step) in {phase for phase, name, _ in sent if "allreduce" in name}
    check_races(record)
    check_state(record)


def test_the_checks_above_see_a_wait_a_tensor_that_stays_a_second_gather_and_a_race():
    small = records("small")
    step = small["none"]["steps"][1]
    check_waits(step)
    check_traffic(step, "per_step")
    assert step["left_behind"] == [0]
    with pytest.raises(AssertionError, match="the host waits"):
        check_waits(small["wait"]["steps"][1])
    with pytest.raises(AssertionError, match="bytes stay"):
        check_memory(small["kept"])
    with pytest.raises(AssertionError, match="gathers in"):
        check_traffic(small["gather"]["steps"][1], "per_step")
    check_races(small["none"])
    with pytest.raises(AssertionError, match=r"races: .*'micro-batch 2 of \d', 'add_'"):
        check_races(small["race"])


def test_the_simulated_allocator_and_timeline_give_what_follows_by_hand():
    record = records("small")["by hand"]
    # Of a's 40 MiB c takes 30. The 10 left are too few for d, which goes behind b. Small ones have a pool of their own.
    assert record["reserved_mib"] == {"x large": 80, "x small": 2, "y large": 20}
    expected = {"hidden": 0.3, "late": 0.4, "the host waits": 0.4, "slow link": 0.4, "slow kernels": 0.6}
    assert record["seconds"] == pytest.approx(expected)


def test_without_a_compiler_a_sentence_says_what_to_install(tmp_path):
    program = "import shutil, pathlib; shutil.which = lambda name: None; pathlib.Path.is_file = lambda path: False\n"
    program += "import fake_cuda"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={"PYTHONPATH": str(BENCHMARKS)}
    )
    assert done.returncode == 1 and done.stderr.strip().startswith("g++ is missing")
    assert len(done.stderr.splitlines()) == 1


if __name__ == "__main__":
    sys.path.insert(0, str(BENCHMARKS))
    print(json.dumps(scenario(sys.argv[1])))
