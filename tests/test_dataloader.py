"""dataloader.py: the set of a step depends on seed and step alone; the layout covers it, in budget and in balance.

bash tests/run.sh tests/test_dataloader.py
"""

import numpy as np
import pyarrow as pa
import pytest
import torch
from common import genesis_lengths
from helpers import sequences, tiny_config, write_data
from hypothesis import given
from hypothesis import strategies as st

from sft.data import writer
from sft.training import dataloader, memory_plan

# ---- Data ----


@pytest.fixture
def two_sources(tmp_path):
    """The (folder, report) of two sources as prepare_data.py writes them: one is repeated, one has no validation."""
    rng = np.random.default_rng(0)
    lines = [{"name": name, "digest": {}} for name in ("tulu", "metamath")]
    report = {"sources": lines, "digest": {}}
    for split in ("train", "validation"):
        (tmp_path / split).mkdir()
        for index, (line, repeat) in enumerate(zip(lines, (1, 2), strict=True)):
            path = tmp_path / split / f"data-{index:05}.arrow"
            split_writer = writer.SplitWriter(path, line["name"], repeat, np.dtype(np.uint16), 64)
            for batch in range(3 - 3 * (split == "validation") * index):
                lengths = np.arange(1, 20 + batch, dtype=np.int32)
                tokens = lengths.sum()
                split_writer.write(lengths, rng.integers(1, 50, tokens, dtype=np.uint16), rng.random(tokens) < 0.7)
            line["digest"][split] = split_writer.close()
        report["digest"][split] = writer.digest_of_digests(line["digest"][split] for line in lines)
        writer.write_dataset_metadata(tmp_path / split, 2, split_writer.schema, "x")
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "validation"]}')
    return tmp_path, report


def rewrite(path, change):
    """Write the Arrow stream `path` again with `change(input_ids, assistant_masks)`, lists of lists."""
    with pa.OSFile(str(path)) as file, pa.ipc.open_stream(file) as stream:
        table = stream.read_all()
    ids, masks = table["input_ids"].to_pylist(), table["assistant_masks"].to_pylist()
    change(ids, masks)
    with pa.ipc.new_stream(str(path), table.schema) as stream:
        stream.write_table(pa.table([ids, masks, table["source"]], schema=table.schema))


def move_a_boundary(ids, masks):
    for rows in (ids, masks):
        rows[5].append(rows[6].pop(0))


@pytest.mark.parametrize(
    "change",
    [
        lambda ids, masks: ids[3].__setitem__(0, 0),
        lambda ids, masks: masks[3].__setitem__(0, not masks[3][0]),
        move_a_boundary,
        lambda ids, masks: ids.reverse() or masks.reverse(),
    ],
)
def test_data_that_is_not_what_the_report_describes_is_refused_by_source_and_split(two_sources, change):
    folder, report = two_sources
    dataloader.check_digests(dataloader.load_data(str(folder)), report, folder)
    path = folder / "train" / "data-00001.arrow"
    rewrite(path, lambda ids, masks: None)  # as one batch instead of six
    dataloader.check_digests(dataloader.load_data(str(folder)), report, folder)
    rewrite(path, change)
    with pytest.raises(SystemExit, match=r"data-00001.arrow: the ids, lengths or masks of metamath \(train split\)"):
        dataloader.check_digests(dataloader.load_data(str(folder)), report, folder)


def test_a_report_of_other_sources_or_a_file_that_was_cut_is_refused(two_sources):
    folder, report = two_sources
    data = dataloader.load_data(str(folder))
    for other in ({}, report | {"sources": report["sources"][:1]}, report | {"digest": {"train": "x"}}):
        with pytest.raises(SystemExit, match=r"report.json does not describe its train split. Run prepare_data.py"):
            dataloader.check_digests(data, other, folder)
    path = folder / "validation" / "data-00000.arrow"
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(SystemExit, match=r"data-00000.arrow \(tulu, validation split\) cannot be read"):
        dataloader.check_digests(data, report, folder)


# ---- Order ----


def test_an_epoch_visits_each_sequence_once_and_epochs_differ():
    steps = dataloader.steps_per_epoch(1000, 32)
    assert steps == 31
    first = np.concatenate([dataloader.sequences_of_step(1000, 7, step, 32) for step in range(steps)])
    second = np.concatenate([dataloader.sequences_of_step(1000, 7, step, 32) for step in range(steps, 2 * steps)])
    assert len(set(first.tolist())) == len(first) == 31 * 32
    assert (first != second).any()
    assert (first[:32] != dataloader.sequences_of_step(1000, 8, 0, 32)).any()


def test_genesis_has_15955_steps():
    assert dataloader.steps_per_epoch(510_577, 32) == 15_955


# ---- Layout ----


@given(
    lengths=st.lists(st.integers(1, 100), min_size=1, max_size=40),
    ranks=st.integers(1, 5),
    budget=st.integers(100, 300),
    equal_counts=st.booleans(),
)
def test_a_layout_holds_each_sequence_once_in_as_few_micro_batches_as_fit_and_the_fullest_is_last(
    lengths, ranks, budget, equal_counts
):
    indices = range(len(lengths))
    layout = dataloader.lay_out(indices, lengths, ranks, budget, lengths, equal_counts)
    assert layout == dataloader.lay_out(indices, lengths, ranks, budget, lengths, equal_counts)
    assert sorted(i for rank in layout for batch in rank for i in batch) == list(indices)
    needed = []
    for rank in layout:
        tokens = [sum(lengths[i] for i in batch) for batch in rank]
        assert max(tokens) == tokens[-1] <= budget
        needed.append(max(1, len(dataloader.pack([i for batch in rank for i in batch], lengths, budget))))
    assert [len(rank) for rank in layout] == ([max(needed)] * ranks if equal_counts else needed)


def test_the_first_and_the_last_micro_batch_are_full_on_genesis_lengths():
    """The gathers hide behind the first one's forward, the reductions behind the last one's backward."""
    lengths = genesis_lengths(6400)
    costs = dataloader.cost(lengths, matrices=924_844_032, attention=32 * 12 * 128)
    first, last = [], []
    for step in range(200):
        indices = dataloader.sequences_of_step(len(lengths), 42, step, 32)
        for rank in dataloader.lay_out(indices, lengths, 2, 5120, costs, False):
            tokens = [sum(lengths[i] for i in batch) for batch in rank]
            assert tokens[0] == sorted(tokens)[-2]
            first.append(tokens[0])
            last.append(tokens[-1])
    assert np.mean(first) > 0.95 * 5120 and np.mean(last) > 0.99 * 5120


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_wait_less_than_5_percent_on_genesis_lengths(ranks):
    lengths = genesis_lengths(6400)
    assert 680 < lengths.mean() < 750
    costs = dataloader.cost(lengths, matrices=924_844_032, attention=32 * 12 * 128)
    waits = []
    for step in range(200):
        indices = dataloader.sequences_of_step(len(lengths), 42, step, 32)
        waits.append(dataloader.idle_share(dataloader.lay_out(indices, lengths, ranks, 8192, costs, False), costs))
    assert np.mean(waits) < 0.05


# ---- Micro-batch ----


def test_a_sequences_first_token_is_never_a_target():
    rows = [(np.arange(10, 15), np.ones(5, bool)), (np.arange(20, 23), np.ones(3, bool))]
    batch = dataloader.concatenate(rows)
    assert batch.targets.tolist() == [11, 12, 13, 14, 21, 22]
    assert batch.predictors.tolist() == [0, 1, 2, 3, 5, 6]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2]]
    assert batch.documents.bounds.tolist() == [0, 5, 8] and batch.documents.lengths == [5, 3]
    assert batch.tokens == 8


def test_a_micro_batch_moves_as_a_whole_with_or_without_targets():
    batch = dataloader.concatenate([(np.arange(4), np.ones(4, bool))])
    moved = batch.to("meta")
    tensors = (moved.input_ids, moved.position_ids, moved.predictors, moved.targets, moved.documents.bounds)
    assert all(tensor.device.type == "meta" for tensor in tensors) and moved.documents.lengths == [4]
    batch.targets = None
    assert batch.to("meta").targets is None


# ---- Loader ----


def test_the_loader_yields_the_sequences_of_each_step_and_counts_them(tmp_path, alone):
    data = dataloader.load_data(str(write_data(tmp_path / "data")))["train"]
    sizes = memory_plan.shapes(tiny_config())
    loader = dataloader.PackedLoader(data, sizes, 256, torch.device("cpu"))
    ids, masks = sequences(200, 515)
    batches = list(loader.steps(seed=7, sequences_per_step=16, first=3, last=6))
    assert len(batches) == 3
    for step, batch in enumerate(batches, start=3):
        assert batch.indices == dataloader.sequences_of_step(200, 7, step, 16)
        tokens = torch.cat([micro_batch.input_ids[0] for micro_batch in batch.micro_batches]).tolist()
        assert sorted(tokens) == sorted(np.concatenate([ids[i] for i in batch.indices]).tolist())
        trained = sum(int(masks[i][1:].sum()) for i in batch.indices)
        assert batch.stats["trainable_tokens"] == sum(len(part.targets) for part in batch.micro_batches) == trained
        assert batch.stats["tokens"] == len(tokens) == sum(part.tokens for part in batch.micro_batches)
        costs = sum(dataloader.cost(len(ids[i]), sizes.matrices, sizes.attention) for i in batch.indices)
        assert batch.stats["flops"] == costs + 6 * sizes.head * trained
