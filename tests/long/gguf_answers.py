"""Run by gguf_export.py in an environment of its own: what llama.cpp makes of a GGUF file. JSON in, JSON out."""

import json
import sys

import llama_cpp


def main():
    """Print {"bos", "ids", "answers"}: whether the file asks for a BOS, the texts' ids, and [answer, ended] each."""
    asked = json.load(sys.stdin)
    float32 = {"type_k": 0, "type_v": 0}  # of the cache, which is float16 otherwise
    model = llama_cpp.Llama(asked["path"], n_ctx=1024, verbose=False, **float32)
    ids = [model.tokenize(text.encode(), add_bos=True, special=True) for text in asked["texts"]]
    answers = []
    for question in asked["questions"]:
        turns = [{"role": "user", "content": question}]
        choice = model.create_chat_completion(turns, temperature=0.0, max_tokens=asked["max_tokens"])["choices"][0]
        answers.append([choice["message"]["content"].strip(), choice["finish_reason"] == "stop"])
    bos = model.metadata.get("tokenizer.ggml.add_bos_token") == "true"
    print(json.dumps({"bos": bos, "ids": ids, "answers": answers}))


if __name__ == "__main__":
    main()
