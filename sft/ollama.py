"""The Modelfile of an export: with it, Ollama serves the model with our template, stop and context.

Its FROM names the GGUF file that llama.cpp's converter writes next to it. Ollama could read the safetensors itself
(`FROM .`), but its importer knows four ways of splitting text, takes any other for the plain one, without a message,
and adds a BOS only for the key `add_bos_token`.
"""

from sft import hf_folder
from sft.data import chatml

MODELFILE = "Modelfile"
# chat_template.jinja in the syntax of Go's text/template, as far as that goes: Ollama's templates have no function that
# trims white space or cuts a text, so an earlier turn keeps its think block, whatever KEEP_PAST_THINKING says. A BOS is
# no part of it: the GGUF file says whether the tokenizer adds one.
TEMPLATE = """\
{{- range .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}<|im_start|>assistant
"""


def modelfile(folder):
    """Return the text of the Modelfile for the model folder `folder`. The context is that of its config.json.

    Only the end of a turn is a stop: stops are text to Ollama, and the base's own (`</s>`) may be part of an answer.
    """
    context = hf_folder.load_config(folder, "Run resize_vocab.py again.").max_position_embeddings
    lines = [
        "# In this folder, with convert_hf_to_gguf.py of llama.cpp:",
        "#     python convert_hf_to_gguf.py . --outfile model.gguf",
        "#     ollama create NAME",
        "FROM model.gguf",
        f'TEMPLATE """{TEMPLATE}"""',
        f'PARAMETER stop "{chatml.STOP}"',
        f"PARAMETER num_ctx {context}",
    ]
    return "\n".join(lines) + "\n"
