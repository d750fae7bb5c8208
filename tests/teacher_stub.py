"""A loopback teacher that speaks Anthropic's Messages and Batches and OpenAI's chat completions. It answers by the key.

The same request gets the same answer, in whatever order and however often it comes; `paid` counts the answers.
"""

import hashlib
import json
import re
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from random import Random

WORDS = re.findall(
    r"\w+",
    """
    the a of and to in that it is was for on are with as they be at one have this from by hot but some what
    there we can out other were all your when up use word how said an each she which do their time if will
    way about many then them would write like so these her long make thing see him two has look more day
    could go come did my sound no most number who over know water than call first people may down side been
    now find house garden river morning letter window bread friend bridge winter market small quiet bright
    warm early honest carefully slowly together beside under without
    """,
)


def prose(random, words):
    """Return sentences of about this many common words."""
    text = []
    while sum(len(sentence.split()) for sentence in text) < words:
        text.append(" ".join(random.choice(WORDS) for _ in range(random.randint(6, 14))).capitalize() + ".")
    return " ".join(text)


def answer_to(body):
    """Return the text that answers a request (dict with "system" and "messages")."""
    random = Random(hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest())
    system, last = body["system"], body["messages"][-1]["content"]
    if system.startswith("You write what people type"):
        number = int(re.search(r"array of (\d+)", last)[1])
        if "objects" in last:
            pairs = [{"risky": prose(random, 14), "benign": prose(random, 14)} for _ in range(number)]
            return "Here they are:\n" + json.dumps(pairs)
        return json.dumps([prose(random, 14) for _ in range(number)])
    if system.startswith("You review"):
        return random.choice(["NOTHING", prose(random, 12), prose(random, 12)])
    if system.startswith("You grade"):
        return f"SCORE: {random.randint(3, 10)}\nREASON: {prose(random, 6)}"
    think = f"<think>{prose(random, 12)}</think>\n" if "Begin with your reasoning" in system else ""
    return think + prose(random, 30)


class Stub:
    """The server. fault(key, n): what happens to the n-th request (from 0) with a key: None, or one of FAULTS."""

    def __init__(self, fault=lambda key, n: None, delay=0.0):
        self.fault, self.delay, self.lock = fault, delay, threading.Lock()
        self.asked, self.paid, self.batches, self.requests = Counter(), Counter(), {}, []
        self.create_faults, self.batch_asked, self.polls = [], Counter(), 1
        self.entry_fault = lambda key, n: None
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # or each answer's body waits 40 ms for the client to confirm its head

            def log_message(self, *_):
                pass

            def do_POST(self):
                stub.post(self, json.loads(self.rfile.read(int(self.headers["content-length"]))))

            def do_GET(self):
                stub.get(self)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    # ---- One request ----

    def post(self, handler, body):
        self.requests.append((handler.path, dict(handler.headers), body))
        if handler.path == "/v1/messages/batches":
            return self.create_batch(handler, body)
        openai = handler.path == "/v1/chat/completions"
        if openai:
            plain = {"system": body["messages"][0]["content"], "messages": body["messages"][1:]}
        else:
            plain = {"system": body["system"], "messages": body["messages"]}
        key = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        with self.lock:
            n = self.asked[key]
            self.asked[key] += 1
        fault = self.fault(key, n)
        time.sleep(self.delay)
        if isinstance(fault, int):
            return reply(handler, fault, {"type": "error", "error": {"type": f"e{fault}", "message": f"error {fault}"}})
        if fault == "malformed":
            return send(handler, 200, b'{"content": [', {})
        if fault == "no fields":
            return reply(handler, 200, {"hello": "world"})
        if fault == "torn":
            handler.close_connection = True
            return send(handler, 200, b'{"id": "m', {}, length=1000)
        if fault == "slow":
            time.sleep(2)
        text = answer_to(plain)
        with self.lock:
            self.paid[key] += 1
        reply(handler, 200, (completion if openai else message)(body, text, fault == "cut off"))

    # ---- Batches ----

    def create_batch(self, handler, body):
        fault = self.create_faults.pop(0) if self.create_faults else None
        if isinstance(fault, int):
            return reply(handler, fault, {"type": "error", "error": {"type": "overloaded_error", "message": "busy"}})
        with self.lock:
            name = f"msgbatch_{len(self.batches)}"
            self.batches[name] = {"requests": body["requests"], "created": time.time(), "polls": 0, "results": None}
        if fault == "lost":  # created, but the client never hears of it
            handler.close_connection = True
            return None
        return reply(handler, 200, self.batch(name))

    def batch(self, name):
        batch, stamp = self.batches[name], time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        counts = dict.fromkeys(("processing", "succeeded", "errored", "canceled", "expired"), 0)
        counts["processing"] = len(batch["requests"])
        ended = batch["polls"] > self.polls
        return {
            "id": name, "type": "message_batch", "processing_status": "ended" if ended else "in_progress",
            "request_counts": counts, "created_at": stamp, "expires_at": stamp, "ended_at": stamp if ended else None,
            "archived_at": None, "cancel_initiated_at": None,
            "results_url": f"{self.url}/v1/messages/batches/{name}/results" if ended else None,
        }  # fmt: skip

    def get(self, handler):
        path = handler.path.partition("?")[0].removeprefix("/v1/messages/batches").strip("/")
        if not path:
            entries = [self.batch(name) for name in reversed(self.batches)]
            return reply(handler, 200, {"data": entries, "has_more": False, "first_id": None, "last_id": None})
        name = path.partition("/")[0]
        if path.endswith("/results"):
            return send(handler, 200, self.results(name), {"content-type": "application/x-jsonl"})
        with self.lock:
            self.batches[name]["polls"] += 1
        return reply(handler, 200, self.batch(name))

    def results(self, name):
        """Return the results of a batch, in another order than asked, with duplicates; the same at each call."""
        batch = self.batches[name]
        with self.lock:
            if batch["results"] is None:
                lines = []
                for request in batch["requests"]:
                    key, params = request["custom_id"], request["params"]
                    n = self.batch_asked[key]
                    self.batch_asked[key] += 1
                    result = self.entry_fault(key, n)
                    if result is None:
                        text = answer_to({"system": params["system"], "messages": params["messages"]})
                        result = {"type": "succeeded", "message": message(params, text, False)}
                        self.paid[key] += 1
                    lines.append(json.dumps({"custom_id": key, "result": result}) + "\n")
                Random(name).shuffle(lines)
                batch["results"] = "".join([*lines, *lines[:2]]).encode()
        return batch["results"]


def message(body, text, cut_off):
    return {
        "id": "msg_1", "type": "message", "role": "assistant", "model": f"{body['model']}-2026",
        "content": [{"type": "text", "text": text[: len(text) // 2] if cut_off else text}],
        "stop_reason": "max_tokens" if cut_off else "end_turn", "stop_sequence": None,
        "usage": {"input_tokens": len(body["system"]) // 4, "output_tokens": len(text) // 4},
    }  # fmt: skip


def completion(body, text, cut_off):
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "logprobs": None}
    choice["finish_reason"] = "length" if cut_off else "stop"
    usage = {"prompt_tokens": 10, "completion_tokens": len(text) // 4, "total_tokens": 10 + len(text) // 4}
    return {"id": "c", "object": "chat.completion", "created": 1, "model": body["model"], "choices": [choice]} | {
        "usage": usage
    }


def reply(handler, status, value):
    headers = {"content-type": "application/json"}
    if status in (429, 529):
        headers |= {"retry-after": "0.02", "retry-after-ms": "20"}
    send(handler, status, json.dumps(value).encode(), headers)


def send(handler, status, data, headers, length=None):
    try:
        handler.send_response(status)
        for name, value in ({"content-type": "application/json"} | headers).items():
            handler.send_header(name, value)
        handler.send_header("content-length", str(len(data) if length is None else length))
        handler.end_headers()
        handler.wfile.write(data)
    except OSError:
        pass  # the client was killed
