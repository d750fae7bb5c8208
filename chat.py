"""Talk to an export, or to any other Hugging Face folder with a chat template, in this terminal.

Reads   exports/sft_v1/ (export_hf.py). Writes nothing.

    python chat.py
    python chat.py --system-prompt "You are Genesis." --temperature 0
    python chat.py --export-dir exports/early

The answer appears as it is generated, on the first GPU or, on a machine without one, on the CPU. The model sees the
whole conversation; an empty line starts a new one. Ctrl-D ends.
"""

import contextlib
import math

import jinja2
import transformers
from transformers import AutoTokenizer, TextStreamer

from sft import hf_folder, settings, system
from sft.text import printable

# ---- Model ----
EXPORT_DIR = "exports/sft_v1"  # Hugging Face folder with a chat template
# ---- Conversation ----
SYSTEM_PROMPT = ""  # the system turn at the start of every conversation; "" = none
TEMPERATURE = 0.7  # from 0; 0 = always the likeliest token
MAX_NEW_TOKENS = 1024  # tokens of an answer at most; the model's window may leave fewer
# ---- How ----
DEVICE = "auto"  # "auto" (the first GPU if there is one) | "cuda" | "cpu"

# ==== Loading ====

CHOICES = {"DEVICE": ("auto", "cuda", "cpu")}
TOP_P = 0.95  # sampling draws from the likeliest tokens that have this probability together


def load(folder, device):
    """Return (model, tokenizer) of the chat model in `folder`, on `device` ("cuda" | "cpu").

    Raises: SystemExit if it has no chat template.
    """
    remedy = "Run export_hf.py, or name the folder of a chat model with --export-dir."
    hf_folder.load_config(folder, remedy)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise several kinds
        raise SystemExit(f"{folder} has no tokenizer that loads ({error}). {remedy}") from None
    if not tokenizer.chat_template:
        raise SystemExit(f"{folder} has no chat template: it is not a chat model. {remedy}")
    model = hf_folder.load_model(folder, remedy)
    return model.to(device), tokenizer


# ==== Conversation ====


def read_question():
    """Return the next line that the user types, without white space around it, or None at Ctrl-D."""
    try:
        return input("\nYou: ").strip()
    except EOFError:
        return None


class PrintableStreamer(TextStreamer):
    """Prints an answer as it is generated, with control characters escaped: a model may write any."""

    def on_finalized_text(self, text, stream_end=False):
        super().on_finalized_text(printable(text), stream_end)


def stream_answer(model, tokenizer, turns, temperature, max_new_tokens):
    """Print the answer to the conversation `turns` (list of {"role", "content"}) as it is generated.

    Returns: the answer's text, or None if the conversation fills the model's window.
    Raises: SystemExit if the chat template does not accept the conversation.
    """
    try:
        inputs = hf_folder.prompt(tokenizer, turns, model.device)
    except jinja2.TemplateError as error:
        raise SystemExit(
            f"The model's chat template refuses this conversation ({error}). Check --system-prompt."
        ) from None
    length = inputs["input_ids"].shape[1]
    window = getattr(model.config, "max_position_embeddings", None) or math.inf
    if length >= window:
        print(f"(the conversation fills the window of {window:,} tokens; an empty line starts a new one)")
        return None
    limit = min(max_new_tokens, window - length)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": TOP_P} if temperature else {"do_sample": False}
    print("Model: ", end="", flush=True)
    streamer = PrintableStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    ids = model.generate(**inputs, streamer=streamer, max_new_tokens=limit, **sampling)[0, length:]
    if ids[-1].item() not in hf_folder.stop_ids(model.generation_config):
        print(f"(cut at {len(ids):,} tokens)")
    return tokenizer.decode(ids, skip_special_tokens=True).strip()


def converse(model, tokenizer, args):
    """Read questions and stream the answers until Ctrl-D; an empty line starts a new conversation."""
    start = [{"role": "system", "content": args["SYSTEM_PROMPT"]}] if args["SYSTEM_PROMPT"] else []
    turns = list(start)
    while (question := read_question()) is not None:
        if not question:
            turns = list(start)
            print("(a new conversation)")
            continue
        turns.append({"role": "user", "content": question})
        answer = stream_answer(model, tokenizer, turns, args["TEMPERATURE"], args["MAX_NEW_TOKENS"])
        if answer is None:
            turns.pop()
        else:
            turns.append({"role": "assistant", "content": answer})


# ==== Main ====


def main(args):
    """Talk as the settings `args` (dict) say, until Ctrl-D or Ctrl-C."""
    if not 0 <= args["TEMPERATURE"] < math.inf:
        raise SystemExit(f"TEMPERATURE is {args['TEMPERATURE']}; it must be at least 0, and finite.")
    if args["MAX_NEW_TOKENS"] < 1:
        raise SystemExit(f"MAX_NEW_TOKENS is {args['MAX_NEW_TOKENS']}; it must be at least 1.")
    settings.check_bounds(args, CHOICES, {})
    device = system.choose_device(args["DEVICE"], "--device cpu")
    transformers.utils.logging.disable_progress_bar()
    with contextlib.suppress(KeyboardInterrupt):
        model, tokenizer = load(args["EXPORT_DIR"], device)
        print(f"{args['EXPORT_DIR']}: an empty line starts a new conversation, Ctrl-D ends.")
        converse(model, tokenizer, args)
    print()


if __name__ == "__main__":
    main(settings.from_flags(globals()))
