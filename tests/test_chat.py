"""chat.py: what is typed, what is answered, and what the model sees, with a tiny model that knows its conversations.

Run it alone: bash tests/run.sh tests/test_chat.py
"""

import io
import shutil
import sys

import pytest
import torch
import transformers
from helpers import ROOT, args_of, run_python
from tokenizers import Tokenizer, models, pre_tokenizers

import chat

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% if m.role == 'assistant' %}[end] {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
# The answer to "more" depends on what came before it, and "count" on the system prompt.
CONVERSATIONS = [
    [("user", "count"), ("assistant", "one two three"), ("user", "more"), ("assistant", "four five six")],
    [("user", "more"), ("assistant", "more of what ?")],
    [("system", "be loud"), ("user", "count"), ("assistant", "ONE TWO THREE"), ("user", "more"), ("assistant", "FOUR")],
]


def messages(turns):
    return [{"role": role, "content": content} for role, content in turns]


@pytest.fixture(scope="module")
def chat_dir(tmp_path_factory):
    """A folder with a tiny Llama that knows CONVERSATIONS by heart, with ids of words and a template without ChatML."""
    words = " ".join(content for turns in CONVERSATIONS for _, content in turns).split()
    names = ["[pad]", "[end]", "[system]", "[user]", "[assistant]", "[unk]"]
    vocab = {word: index for index, word in enumerate(dict.fromkeys([*names, *words]))}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="[unk]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(names)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=TEMPLATE, pad_token="[pad]", eos_token="[end]", unk_token="[unk]"
    )
    config = transformers.LlamaConfig(
        vocab_size=len(vocab), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32, eos_token_id=1, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    texts = [tokenizer.apply_chat_template(messages(turns), tokenize=False) for turns in CONVERSATIONS]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(100):
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("chat") / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def talk(chat_dir, monkeypatch, capsys):
    """Return a function that types some lines, then Ctrl-D, and returns what the terminal showed."""

    def run(*lines, **changes):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
        chat.main(args_of(chat, **{"EXPORT_DIR": str(chat_dir), "TEMPERATURE": 0.0} | changes))
        return capsys.readouterr().out

    return run


def answers(stdout):
    return [line.removeprefix("You: Model: ") for line in stdout.splitlines() if "Model: " in line]


def test_the_model_sees_the_whole_conversation_until_an_empty_line(talk):
    stdout = talk("count", "  more ", "", "more")
    assert answers(stdout) == ["one two three", "four five six", "more of what ?"]
    assert stdout.count("(a new conversation)") == 1 and stdout.endswith("\nYou: \n")
    assert "an empty line starts a new conversation, Ctrl-D ends." in stdout


def test_a_system_prompt_begins_every_conversation(talk):
    stdout = talk("count", "more", "", "count", SYSTEM_PROMPT="be loud")
    assert answers(stdout) == ["ONE TWO THREE", "FOUR", "ONE TWO THREE"]


def test_a_question_that_fills_the_window_is_left_out_and_the_conversation_continues(talk):
    stdout = talk("count", "more " * 40, "more")
    assert "(the conversation fills the window of 32 tokens; an empty line starts a new one)" in stdout
    assert answers(stdout) == ["one two three", "four five six"]


def test_an_answer_is_cut_at_the_limit_and_at_the_window_and_says_so(talk):
    assert "one two\n(cut at 2 tokens)" in talk("count", MAX_NEW_TOKENS=2)
    # The first turn has 7 tokens, the second 2 and its words: of the window of 32, one token is left.
    assert "\n(cut at 1 tokens)" in talk("count", "more " * 22)


def test_sampling_has_a_temperature(talk, monkeypatch):
    seen = []
    generate = transformers.LlamaForCausalLM.generate

    def record(model, *args, **options):
        seen.append({name: options.get(name) for name in ("do_sample", "temperature", "top_p")})
        return generate(model, *args, **options)

    monkeypatch.setattr(transformers.LlamaForCausalLM, "generate", record)
    assert answers(talk("count", TEMPERATURE=0.1)) == ["one two three"]
    talk("count")
    assert seen[0] == {"do_sample": True, "temperature": 0.1, "top_p": 0.95} and seen[1]["do_sample"] is False


def test_the_answer_is_streamed_word_by_word(talk, monkeypatch):
    pieces = []
    streamer = chat.PrintableStreamer

    class Recorder(streamer):
        def on_finalized_text(self, text, stream_end=False):
            pieces.append(text)
            super().on_finalized_text(text, stream_end)

    monkeypatch.setattr(chat, "PrintableStreamer", Recorder)
    talk("count")
    assert "".join(pieces).strip() == "one two three" and len([piece for piece in pieces if piece.strip()]) > 1


def test_ctrl_c_ends_without_a_traceback(talk, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(chat, "stream_answer", interrupt)
    assert talk("count").endswith("You: \n")


def refused(talk, *lines, **changes):
    with pytest.raises(SystemExit) as refusal:
        talk(*lines, **changes)
    return str(refusal.value)


def test_what_cannot_chat_is_a_sentence(talk, chat_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "exports/none is not a folder. Run export_hf.py, or name" in refused(talk, EXPORT_DIR="exports/none")
    base = shutil.copytree(chat_dir, tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    message = refused(talk, EXPORT_DIR=str(base))
    assert "has no chat template: it is not a chat model. Run export_hf.py, or name the folder of a chat" in message
    (base / "tokenizer.json").unlink()
    (base / "tokenizer_config.json").unlink()
    assert "base has no tokenizer that loads" in refused(talk, EXPORT_DIR=str(base))
    assert "TEMPERATURE is -1.0; it must be at least 0" in refused(talk, TEMPERATURE=-1.0)
    assert "TEMPERATURE is inf; it must be at least 0, and finite" in refused(talk, TEMPERATURE=float("inf"))
    assert "MAX_NEW_TOKENS is 0; it must be at least 1" in refused(talk, MAX_NEW_TOKENS=0)


def test_a_template_that_refuses_a_system_prompt_is_a_sentence(talk, chat_dir, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(chat_dir)
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    tokenizer.chat_template = refusal + TEMPLATE
    tokenizer.save_pretrained(shutil.copytree(chat_dir, tmp_path / "model"))
    folder = {"EXPORT_DIR": str(tmp_path / "model")}
    assert answers(talk("count", **folder)) == ["one two three"]
    message = refused(talk, "count", SYSTEM_PROMPT="be loud", **folder)
    assert "template refuses this conversation (no system turn). Check --system-prompt" in message


def test_a_process_of_its_own_refuses_a_folder_that_is_no_model(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "nothing-known"}')
    error = run_python(tmp_path, ROOT / "chat.py", "--export-dir", "model", ok=False)
    assert "model has no config.json that transformers can read" in error and "Run export_hf.py, or name" in error


def test_an_answer_cannot_clear_the_terminal(capsys):
    chat.PrintableStreamer(None).on_finalized_text("\x1b[2Jhi\n", stream_end=True)
    assert capsys.readouterr().out == "\\x1b[2Jhi\n\n"
