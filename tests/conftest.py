"""Base folders that several test files use: tokenizers without the ChatML markers, and a tiny model that can read."""

import fcntl
import json
import os

import pytest
from helpers import PASSAGE, make_reader, tiny_config, trained, write_base, write_data
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads of this process would not survive prepare_data.py's fork
VOCABULARY = 49_152
FAST_FIRST = (
    *("settings", "system", "demo", "conversations", "sources", "workers", "dataloader", "checkpoints"),
    *("compare_evals", "prepare_data", "resize_vocab"),
)
TEXT = """The sea was calm that morning, and nobody on the pier expected the boat to come back so soon.
def add(first, second):
    return first + second

for number in range(10):
    print(number, "squared is", number ** 2)

In 1969 people landed on the moon; 384,400 kilometres lie between. Is it far? Yes, and no: light needs 1.3 seconds.
Who are you? What can you do for me? I am not sure, but I can help you to find out. Let us think step by step.
"""


def pytest_collection_modifyitems(items):
    """Run the fast files first: what is broken shows in seconds."""
    order = {f"test_{name}.py": rank for rank, name in enumerate(FAST_FIRST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


def pad(vocab, number):
    """Fill `vocab` with names that no text produces, up to `number` tokens."""
    for extra in range(number - len(vocab)):
        vocab[f"\ue000unused{extra}\ue001"] = len(vocab)
    return vocab


def save(tokenizer, folder, names):
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 2048, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def grown(model, pre_tokenizer, trainer):
    """Train a small model on TEXT and return its tokenizer's JSON state."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.train_from_iterator([TEXT], trainer)
    return json.loads(tokenizer.to_str())


def byte_level(folder, vocabulary):
    """Save a byte-level BPE with `<|endoftext|>` as its only special token and no BOS of its own in `folder`."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    state = grown(models.BPE(), pre_tokenizers.ByteLevel(add_prefix_space=False), trainer)
    pad(state["model"]["vocab"], vocabulary)
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.decoder = decoders.ByteLevel()
    names = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    return save(tokenizer, folder, names)


@pytest.fixture(scope="session")
def bpe_tokenizer_dir(tmp_path_factory):
    """A byte-level BPE with `<|endoftext|>` as its only special token and no BOS of its own."""
    folder = byte_level(tmp_path_factory.mktemp("bpe") / "base", VOCABULARY)
    assert Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size() == VOCABULARY
    return folder


@pytest.fixture(scope="session")
def small_tokenizer_dir(tmp_path_factory):
    """The same without its unused tokens, for tests that do not ask for the vocabulary: reading it costs a second."""
    return byte_level(tmp_path_factory.mktemp("small") / "base", 0)


@pytest.fixture(scope="session")
def small_encoder(small_tokenizer_dir):
    """(small_tokenizer_dir's tokenizer, extended, its Encoder)."""
    from sft.data import chatml

    tokenizer, adds_bos = chatml.extend_tokenizer(small_tokenizer_dir, True, True)
    return tokenizer, chatml.Encoder(tokenizer, adds_bos, True, True)


@pytest.fixture(scope="session")
def spm_tokenizer_dir(tmp_path_factory):
    """As converted from SentencePiece: BPE on Metaspace with byte fallback, `[INST]` added, and a BOS of its own."""
    special = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=1200, special_tokens=special)
    scheme = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    state = grown(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True), scheme, trainer)
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < 3]
    pad(state["model"]["vocab"], VOCABULARY - 1)
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.add_tokens([AddedToken("[INST]", normalized=False)])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    assert tokenizer.get_vocab_size() == VOCABULARY
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return save(tokenizer, tmp_path_factory.mktemp("spm") / "base", names)


@pytest.fixture(scope="session")
def reader_dir(tmp_path_factory):
    """A folder with a tiny Llama, float32, that knows the passage of reading_check.py by heart, and its tokenizer."""
    import transformers

    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special, alphabet = ["<unk>", "<s>", "</s>"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    backend.train_from_iterator([PASSAGE.read_text()], trainer)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    return make_reader(tokenizer, tmp_path_factory.mktemp("reader") / "base")


# ==== Training ====


@pytest.fixture
def alone():
    """A process group of this process alone, and its mesh."""
    import torch

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,), mesh_dim_names=("shard",))
    torch.distributed.destroy_process_group()


def once(folder, name, action):
    """Run `action()` in the first of pytest's processes that comes here; the others wait for its end."""
    with open(folder / f"{name}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if not (folder / f"{name}.done").exists():
            action()
            (folder / f"{name}.done").touch()


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """The folder of the small runs, one for all of pytest's processes: base/ and data/; a test adds its run."""
    folder = tmp_path_factory.getbasetemp() / "runs"
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = tmp_path_factory.getbasetemp().parent / "runs"
    folder.mkdir(exist_ok=True)

    def write():
        write_base(folder / "base", tiny_config())
        write_data(folder / "data")

    once(folder, "inputs", write)
    return folder


@pytest.fixture(scope="session")
def two_ranks(runs):
    """The folder of the uninterrupted run on two ranks that others are compared with. Its output is in `stdout`."""
    once(runs, "two", lambda: (runs / "stdout").write_text(trained(runs, "two", 2)))
    return runs / "two"
