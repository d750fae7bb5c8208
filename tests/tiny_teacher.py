"""A tiny Llama behind `transformers serve` that writes common words, in lines that can be read as questions.

Its weights are random but for one direction: every state points along it, and the output's weights there decide which
tokens are likely. So it needs no training, and its nonsense passes the checks that look at words.
"""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from teacher_stub import WORDS

TEMPLATE = "{% for message in messages %}<s>{{ message['role'] }}\n{{ message['content'] }}\n{% endfor %}<s>assistant\n"
LIKELY = {"\n- ": 6.0, ".": 5.5, "</s>": 5.5}  # logits; words have 0 and a part that depends on the text so far
UNLIKELY = -20.0  # all other bytes
SIZE, LAYERS, INNER, HEADS, STEADY = 64, 2, 128, 4, 30.0


def write_tokenizer(folder):
    """Write a tokenizer of bytes and, as whole tokens, of words in `folder`. Returns: {token: id}."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate(["<s>", "</s>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    words = ["\n- ", *(f" {word}" for word in sorted(set(WORDS)))]
    backend.add_tokens([AddedToken(text, normalized=False) for text in words])
    backend.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "chat_template": TEMPLATE}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 8192} | names
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return backend.get_vocab()


def write_teacher(folder):
    """Write the teacher as the Hugging Face folder `folder`, without importing torch; return it."""
    import numpy as np
    from safetensors.numpy import save_file

    folder.mkdir()
    vocab, random = write_tokenizer(folder), np.random.default_rng(0)

    def matrix(rows, columns, scale=1.0):
        return random.normal(0, scale, (rows, columns)).astype(np.float32)

    weights = {"model.embed_tokens.weight": matrix(len(vocab), SIZE), "model.norm.weight": np.ones(SIZE, np.float32)}
    weights["model.embed_tokens.weight"][:, 0] = STEADY
    weights["lm_head.weight"] = matrix(len(vocab), SIZE, 0.1)
    for token, number in vocab.items():
        if not token.startswith(" "):
            weights["lm_head.weight"][number] = 0
            weights["lm_head.weight"][number, 0] = LIKELY.get(token, UNLIKELY) / SIZE**0.5
        else:
            weights["lm_head.weight"][number, 0] = 0
    shapes = {"self_attn.q_proj": (SIZE, SIZE), "self_attn.k_proj": (SIZE, SIZE), "self_attn.v_proj": (SIZE, SIZE)}
    shapes |= {"self_attn.o_proj": (SIZE, SIZE), "mlp.gate_proj": (INNER, SIZE), "mlp.up_proj": (INNER, SIZE)}
    shapes["mlp.down_proj"] = (SIZE, INNER)
    for layer in range(LAYERS):
        for name, shape in shapes.items():
            weights[f"model.layers.{layer}.{name}.weight"] = made = matrix(*shape)
            if name.endswith(("o_proj", "down_proj")):
                made *= 0.1
                made[0] = 0  # the steady part of a state stays as it is,
            else:
                made[:, 0] = 0  # and drowns nothing
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{layer}.{name}.weight"] = np.ones(SIZE, np.float32)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "float32", "hidden_act": "silu"}
    config |= {"vocab_size": len(vocab), "hidden_size": SIZE, "intermediate_size": INNER, "num_hidden_layers": LAYERS}
    config |= {"num_attention_heads": HEADS, "num_key_value_heads": HEADS, "max_position_embeddings": 8192}
    config |= {"tie_word_embeddings": False, "rms_norm_eps": 1e-6}
    (folder / "config.json").write_text(json.dumps(config | ids))
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": True} | ids))
    return folder


class Server:
    """`transformers serve` on a model folder, under that folder's name; one request after the other, abandoned too."""

    def __init__(self, model, log):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.root, self.log = f"http://127.0.0.1:{port}", Path(log)
        self.url = self.root + "/v1"
        main = "from transformers.cli.transformers import main; main()"  # this Python's, wherever the script lies
        model = Path(model)
        command = [sys.executable, "-c", main, "serve", model.name, "--port", str(port), "--device", "cpu"]
        command, env = [*command, "--host", "127.0.0.1"], os.environ | {"OMP_NUM_THREADS": "1"}
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(command, cwd=model.parent, stdout=output, stderr=output, env=env)

    def __enter__(self):
        for _ in range(1200):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.root}/health", timeout=5):
                return self
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.1)
        raise TimeoutError(self.log.read_text())

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()

    @property
    def answered(self):
        """The number of requests that the server has answered, by its log."""
        return len(re.findall(r'POST /v1/chat/completions HTTP/1.1" 200', self.log.read_text()))
