"""hf_folder.py: token names, stop ids, the index, bits, and a model that loads strictly or ends with a sentence.

Run it alone: bash tests/run.sh tests/test_hf_folder.py
"""

import json

import pytest
import torch
import transformers
from helpers import edit_json
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from sft import hf_folder


def test_bits_are_compared_not_values():
    one = torch.tensor([0.0, float("nan")])
    assert hf_folder.same_bits(one, one.clone()) and not hf_folder.same_bits(one, -one)
    assert not hf_folder.same_bits(one, one[:1]) and not hf_folder.same_bits(one, one.bfloat16())


def test_token_names_are_text_or_none():
    config = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>", "pad_token": None}
    assert hf_folder.token_names(config, "x") == {"bos": "<s>", "eos": "</s>", "unk": None, "pad": None}
    for token in (2, ["a"], {"content": 2}, "\ud800"):
        with pytest.raises(SystemExit, match=r"^x: the unk_token of its tokenizer_config.json is not text"):
            hf_folder.token_names({"unk_token": token}, "x")


@pytest.mark.parametrize(("ids", "expected"), [(None, []), (0, [0]), ([2, 0], [2, 0])])
def test_stop_ids_are_a_list_from_json_and_from_transformers(ids, expected):
    assert hf_folder.stop_ids({"eos_token_id": ids}) == expected
    assert hf_folder.stop_ids(transformers.GenerationConfig(eos_token_id=ids)) == expected


def test_the_index_of_several_files_is_read_back_and_one_file_has_none(tmp_path):
    layout = {"a.safetensors": ["x", "y"], "b.safetensors": ["z"]}
    for file_name, names in layout.items():
        save_file({name: torch.ones(2) for name in names}, tmp_path / file_name)
    hf_folder.write_index(tmp_path, layout, total_size=24)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 24}
    assert {name: sorted(names) for name, names in hf_folder.shards(tmp_path).items()} == layout
    (tmp_path / "one").mkdir()
    hf_folder.write_index(tmp_path / "one", {"model.safetensors": ["x"]}, total_size=8)
    assert not list((tmp_path / "one").iterdir())


@pytest.fixture
def folder(tmp_path):
    """A folder with a tiny random Llama and a tokenizer of words w0 to w49, whose template is the content."""
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    backend = Tokenizer(models.WordLevel({f"w{index}": index for index in range(50)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = "{{ messages[0].content }}"
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template)
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_model_loads_strictly_or_ends_with_the_remedy(folder):
    model = hf_folder.load_model(folder, "Do that.", torch.bfloat16)
    assert not model.training and model.dtype == torch.bfloat16
    edit_json(folder / "config.json", num_hidden_layers=3)
    with pytest.raises(SystemExit, match=r"model does not load strictly: {'missing keys': .* Do that\.$"):
        hf_folder.load_model(folder, "Do that.")
    edit_json(folder / "config.json", num_hidden_layers=2, vocab_size=7)
    with pytest.raises(SystemExit, match=r"model can't be loaded as a model \(.* Do that\.$"):
        hf_folder.load_model(folder, "Do that.")
    (folder / "config.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"model has no config.json that transformers can read \(.* Do that\.$"):
        hf_folder.load_config(folder, "Do that.")


def test_a_folder_that_does_not_exist_is_not_looked_up_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for load in (hf_folder.load_config, hf_folder.load_model):
        with pytest.raises(SystemExit, match=r"^exports/sft_v1 is not a folder. Do that\.$"):
            load("exports/sft_v1", "Do that.")


def test_an_answer_is_greedy_through_the_template_and_says_whether_it_ended(folder):
    model = hf_folder.load_model(folder, "")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = [7, 3, 20]
    with torch.no_grad():
        for _ in range(5):
            ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
    expected = " ".join(f"w{token_id}" for token_id in ids[3:])
    assert hf_folder.answer(model, tokenizer, "w7 w3 w20", 5) == (expected, False)
    model.generation_config.eos_token_id = [49, ids[3]]
    assert hf_folder.answer(model, tokenizer, "w7 w3 w20", 5) == (f"w{ids[3]}", True)
