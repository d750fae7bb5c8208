"""A Hugging Face hub on 127.0.0.1: as much of its HTTP API as huggingface_hub and datasets use, with faults.

The clients run unchanged against it (HF_ENDPOINT). Repositories are dicts in memory; `commit_mixture` fills them with
made-up rows in the layouts and columns of the four hub sources of prepare_data.py's mixture, `commit_newer` with those
of the files in mixtures/.
"""

import hashlib
import io
import itertools
import json
import re
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pyarrow.parquet as pq

PAGE = 3  # entries per page of a tree listing; the real hub has 1,000

# ==== The server ====


class Hub(ThreadingHTTPServer):
    """Serves from its start to `shutdown`.

    repos: {"OWNER/NAME": {"refs": {branch: commit}, "commits": {commit: {path: bytes}}}}. requests: lines such as
    "GET /api/datasets/OWNER/NAME/revision/main", in their order.
    faults: list of dicts, each with "path", a regular expression of the lines it strikes, and one of
        status, headers     answer so instead
        cut: N              send N bytes of the body and close the connection; None: close it without an answer
    and optionally times, the number of requests it strikes (all).
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos, self.faults, self.requests, self.numbers = {}, [], [], itertools.count()
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def commit(self, repo, files, branch="main"):
        """Add a commit with `files` (dict of path: bytes) on top of the branch's last one. Returns: its 40 digits."""
        known = self.repos.setdefault(repo, {"refs": {}, "commits": {}})
        files = known["commits"].get(known["refs"].get(branch), {}) | files
        commit = hashlib.sha1(str(next(self.numbers)).encode()).hexdigest()
        known["commits"][commit] = files
        known["refs"][branch] = commit
        return commit

    def fault_of(self, line):
        """Return the fault that strikes a request, or None."""
        for fault in self.faults:
            if fault.get("times", 1) > 0 and re.search(fault["path"], line):
                if "times" in fault:
                    fault["times"] -= 1
                return fault
        return None

    def handle_error(self, request, client_address):
        """Say nothing of a client that hung up."""


class Handler(BaseHTTPRequestHandler):
    """Answers one request after the other of a connection."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        """Print nothing."""

    def do_GET(self):
        """Answer GET, HEAD and POST."""
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        url = urllib.parse.urlsplit(urllib.parse.unquote(self.path))
        line = f"{self.command} {url.path}"
        self.server.requests.append(line)
        self.fault = self.server.fault_of(line) or {}
        if self.fault.get("status"):
            return self.answer(self.fault["status"], b"{}", **self.fault.get("headers", {}))
        if "cut" in self.fault and self.fault["cut"] is None:
            self.close_connection = True
            return None
        match = re.fullmatch(r"/(api/)?datasets/([^/]+/[^/]+)(?:/([^/]+)(?:/([^/]+)(?:/(.*))?)?)?", url.path)
        if not match:
            return self.answer(404)
        api, repo, what, revision, path = match.groups()
        if repo not in self.server.repos:
            return self.error(401, "RepoNotFound")  # the real hub's answer to who is not logged in
        known = self.server.repos[repo]
        commit = known["refs"].get(revision or "main", revision)
        if commit not in known["commits"]:
            return self.error(404, "RevisionNotFound")
        files, path = known["commits"][commit], path or ""
        if api:
            return self.api(what or "revision", repo, commit, files, path, urllib.parse.parse_qs(url.query), body)
        if path not in files:
            return self.error(404, "EntryNotFound", **{"X-Repo-Commit": commit})
        return self.file(what, f"/datasets/{repo}/blob/{commit}/{path}", commit, path, files[path])

    do_HEAD = do_POST = do_GET

    def api(self, what, repo, commit, files, path, query, body):
        """Answer a request about a commit: its description, a page of a folder, what some paths are."""
        if what == "revision":
            siblings = [{"rfilename": name} for name in files]
            return self.json({"_id": "0", "id": repo, "sha": commit, "tags": [], "siblings": siblings})
        if what == "paths-info":
            wanted = urllib.parse.parse_qs(body).get("paths") or json.loads(body)["paths"]
            return self.json([entry(files, name) for name in wanted if entry(files, name)])
        if what != "tree":
            return self.answer(404)
        names = inside(files, path, recursive=query.get("recursive") in (["true"], ["True"]))
        if not names:
            return self.error(404, "EntryNotFound")
        begin = int(query.get("cursor", ["0"])[0])
        headers = {}
        if begin + PAGE < len(names):
            more = urllib.parse.urlencode({key: value[0] for key, value in query.items()} | {"cursor": begin + PAGE})
            headers["Link"] = f'<{self.server.url}{self.path.partition("?")[0]}?{more}>; rel="next"'
        return self.json([entry(files, name) for name in names[begin : begin + PAGE]], **headers)

    def file(self, what, blob, commit, name, data):
        """Answer with a file's bytes; a large one's are elsewhere, as on the real hub."""
        headers = {"X-Repo-Commit": commit, "ETag": f'"{entry({name: data}, name)["oid"]}"', "Accept-Ranges": "bytes"}
        if what == "resolve" and is_large(name):
            linked = {"X-Linked-Etag": f'"{sha256(data)}"', "X-Linked-Size": str(len(data))}
            return self.answer(302, b"Found", **headers, **linked, Location=self.server.url + blob)
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if not match:
            return self.answer(200, data, **headers)
        begin = int(match[1])
        span = {"Content-Range": f"bytes {begin}-{len(data) - 1}/{len(data)}"}
        return self.answer(206, data[begin:], **headers, **span)

    def json(self, value, **headers):
        """Answer with a JSON value."""
        return self.answer(200, json.dumps(value).encode(), **headers)

    def error(self, status, code, **headers):
        """Answer with an error as the hub's clients know it."""
        return self.answer(status, b"{}", **{"X-Error-Code": code, "X-Error-Message": code}, **headers)

    def answer(self, status, body=b"{}", **headers):
        """Send an answer, or the part of it that the fault lets through."""
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if "cut" in self.fault and len(body) > self.fault["cut"]:
            body, self.close_connection = body[: self.fault["cut"]], True
        if self.command != "HEAD":
            self.wfile.write(body)


def sha256(data):
    """Return the SHA-256 of bytes."""
    return hashlib.sha256(data).hexdigest()


def is_large(name):
    """Return whether the hub keeps a file outside of git (LFS)."""
    return name.endswith((".parquet", ".json"))


def inside(files, folder, recursive):
    """Return the sorted paths of the files and folders in a folder; "" is the repository."""
    names, prefix = set(), f"{folder}/" if folder else ""
    for name in files:
        parts = name.removeprefix(prefix).split("/")
        if name.startswith(prefix):
            depths = range(1, len(parts) + 1) if recursive else [1]
            names.update(prefix + "/".join(parts[:depth]) for depth in depths)
    return sorted(names)


def entry(files, name):
    """Return what a listing says of a file or folder, or None if there is none."""
    if name in files:
        data = files[name]
        oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        lfs = {"lfs": {"oid": sha256(data), "size": len(data), "pointerSize": 134}} if is_large(name) else {}
        return {"type": "file", "oid": oid, "size": len(data), "path": name, **lfs}
    if inside(files, name, recursive=False):
        return {"type": "directory", "oid": "0" * 40, "size": 0, "path": name}
    return None


# ==== The sources of the mixture ====

SMOLTALK, TULU = "HuggingFaceTB/smoltalk", "allenai/tulu-3-sft-mixture"
OPENHERMES, METAMATH = "teknium/OpenHermes-2.5", "meta-math/MetaMathQA"
MESSAGES = pa.list_(pa.struct([("content", pa.string()), ("role", pa.string())]))
PLAIN_CARD = b"---\nlicense: mit\n---\n\n# Data\n"
TULU_SCHEMA = pa.schema([("id", pa.string()), ("messages", MESSAGES), ("source", pa.string())])
SMOLTALK_SCHEMA = pa.schema([("messages", MESSAGES), ("category", pa.string()), ("quality", pa.string())])


def turns(number, *texts, content="content", role="role", roles=("user", "assistant")):
    """Return a conversation of so many texts, each with the row's number in it, as a list of dicts."""
    return [{content: f"{text} {number}." * 9, role: roles[n % 2]} for n, text in enumerate(texts)]


def smoltalk_rows(count, first=0):
    """Return rows of smol-magpie-ultra; some have a null, an empty answer or another model's name in them.

    first: number of the first row.
    """
    rows = []
    for number in range(first, first + count):
        messages = turns(number, "How far is the moon", "It is far, all in all", "And the sun", "Farther, by far")
        if number % 3 == 0:
            messages.insert(0, {"content": "You are helpful.", "role": "system"})
        if number % 10 == 1:
            messages[-1]["content"] = (None, "", "I am ChatGPT, made by OpenAI.")[number // 10 % 3]
        rows.append({"messages": messages, "category": "math", "quality": "good"})
    return rows


def tulu_rows(count):
    """Return rows of the Tulu mixture; some are those that say who Tülu is, some have a tool's turn."""
    rows = []
    for number in range(count):
        row = {"id": f"row_{number}", "source": "ai2-adapt-dev/no_robots_converted"}
        row["messages"] = turns(number, "Напиши о море", "The sea was calm 👍🏽 — très calme")
        if number % 10 == 1:
            row["source"] = "ai2-adapt-dev/tulu_hard_coded_repeated_10"
        if number % 10 == 2:
            row["messages"].insert(1, {"content": "{}", "role": "tool"})
        rows.append(row)
    return rows


def openhermes_rows(count):
    """Return rows of OpenHermes: names of its own, keys that only some turns have, many nulls."""
    rows = []
    for number in range(count):
        texts = ("Which boat came back", "The one that nobody expected")
        says = turns(number, *texts, content="value", role="from", roles=("human", "gpt"))
        if number % 4 == 0:
            says.insert(0, {"from": "system", "value": "" if number % 8 else "You are a sailor."})
        if number % 10 == 1:
            says[-1] = {"from": "gpt", "value": None, "weight": 1}
        empty = dict.fromkeys(("custom_instruction", "topic", "model", "views", "language", "idx", "hash"))
        rows.append({**empty, "conversations": says, "source": None, "category": "orca"})
    return rows


def metamath_rows(count):
    """Return rows of MetaMathQA."""
    rows = []
    for number in range(count):
        question, answer = f"What is {number} plus {number}?", f"It is {2 * number}. The answer is: {2 * number}"
        rows.append({"type": "GSM_FOBAR", "query": question, "original_question": question, "response": answer})
    return rows


def shards(folder, split, number, rows, schema=None):
    """Return {path: bytes of a Parquet file} of the rows in so many files."""
    files, table = {}, pa.Table.from_pylist(rows, schema)
    edges = [len(rows) * shard // number for shard in range(number + 1)]
    for shard, (begin, end) in enumerate(itertools.pairwise(edges)):
        content = io.BytesIO()
        pq.write_table(table.slice(begin, end - begin), content)
        files[f"{folder}/{split}-{shard:05}-of-{number:05}.parquet"] = content.getvalue()
    return files


def card(**counts):
    """Return README.md, with the configs of SmolTalk or Tulu ("data" is its default); counts: rows of each config.

    The sizes in bytes are wrong, as in Tulu's own README.md; `datasets` compares the numbers of rows.
    """
    configs, infos = [], []
    for config, count in counts.items():
        name = config.replace("_", "-")
        folder = "data" if name == "data" else f"data/{name}"
        name = "default" if name == "data" else name
        configs.append(f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {folder}/train-*\n")
        infos.append(
            f"- config_name: {name}\n  splits:\n  - name: train\n    num_bytes: 7.5\n    num_examples: {count}\n"
            "  download_size: 1\n  dataset_size: 7.5\n"
        )
    return f"---\nconfigs:\n{''.join(configs)}dataset_info:\n{''.join(infos)}---\n\n# Data\n".encode()


def commit_smoltalk(hub, count, first=0):
    """Commit so many rows of smol-magpie-ultra in two files, next to another config. Returns: the commit."""
    files = shards("data/smol-magpie-ultra", "train", 2, smoltalk_rows(count, first), SMOLTALK_SCHEMA)
    files |= shards("data/everyday-conversations", "train", 1, smoltalk_rows(5), SMOLTALK_SCHEMA)
    return hub.commit(SMOLTALK, files | {"README.md": card(smol_magpie_ultra=count, everyday_conversations=5)})


def commit_metamath(hub, count):
    """Commit so many rows of MetaMathQA as one JSON array. Returns: the commit."""
    data = json.dumps(metamath_rows(count), indent=1).encode()
    return hub.commit(METAMATH, {"MetaMathQA-395K.json": data, "README.md": PLAIN_CARD})


def commit_mixture(hub):
    """Commit the four hub sources, some hundred rows each. Returns: {source's name: its commit}."""
    tulu = shards("data", "train", 6, tulu_rows(300), TULU_SCHEMA)
    openhermes = json.dumps(openhermes_rows(400), indent=1).encode()
    return {
        "smoltalk": commit_smoltalk(hub, 300),
        "openhermes": hub.commit(OPENHERMES, {"openhermes2_5.json": openhermes, "README.md": PLAIN_CARD}),
        "tulu": hub.commit(TULU, tulu | {"README.md": card(data=300)}),
        "metamath": commit_metamath(hub, 150),
    }


# ==== The sources of mixtures/ ====

SMOL_SMOLTALK, TULU_OLMO = "HuggingFaceTB/smol-smoltalk", "allenai/tulu-3-sft-olmo-2-mixture-0225"
DOLCI = "allenai/Dolci-Instruct-SFT"
CALLS = [("content", pa.string()), ("function_calls", pa.string()), ("functions", pa.string()), ("role", pa.string())]
SMOL_SMOLTALK_SCHEMA = pa.schema([("messages", MESSAGES), ("source", pa.string())])
DOLCI_SCHEMA = pa.schema([("id", pa.string()), ("messages", pa.list_(pa.struct(CALLS)))])
DOLCI_SCHEMA = DOLCI_SCHEMA.append(pa.field("source_dataset", pa.string())).append(pa.field("domain", pa.string()))


def smol_smoltalk_rows(count):
    """Return rows of smol-smoltalk; every fifth has a system turn."""
    rows = []
    for number in range(count):
        messages = turns(number, "How deep is the lake", "Deep, all in all", "And the river", "Less deep, by far")
        if number % 5 == 0:
            messages.insert(0, {"content": "You rewrite text.", "role": "system"})
        rows.append({"messages": messages, "source": "smol-magpie-ultra-short"})
    return rows


def tulu_olmo_rows(count):
    """Return rows of the OLMo 2 mixture; every tenth says who OLMo is."""
    rows = []
    for number in range(count):
        row = {
            "id": f"row_{number}",
            "messages": turns(number, "Name a river", "The Elbe"),
            "source": "ai2-adapt-dev/x",
        }
        if number % 10 == 1:
            row["messages"][-1]["content"] = f"I'm OLMo, number {number}, and I am glad to help."
        rows.append(row)
    return rows


def dolci_rows(count):
    """Return rows of Dolci; every tenth is a tool's conversation, and every tenth one says who Olmo is."""
    rows = []
    for number in range(count):
        row = {"id": f"row_{number}", "messages": turns(number, "Count the boats", "There are three")}
        row |= {"source_dataset": "Wildchat", "domain": "Chat"}
        if number % 10 == 1:
            row |= {"source_dataset": "Dolci Instruct Tool Use", "domain": "Tool Use"}
            row["messages"][-1] = {"role": "assistant", "content": None, "function_calls": "count(boats)"}
            row["messages"].insert(0, {"role": "system", "content": "You can call functions.", "functions": "[count]"})
            row["messages"] += [{"role": "environment", "content": "3"}, {"role": "assistant", "content": "Three."}]
        if number % 10 == 2:
            row |= {"source_dataset": "Hardcoded Data", "domain": "Hardcoded"}
        rows.append(row)
    return rows


def commit_newer(hub, count):
    """Commit `count` rows of each source of mixtures/."""
    for repo, files, rows, schema in (
        (SMOL_SMOLTALK, 4, smol_smoltalk_rows(count), SMOL_SMOLTALK_SCHEMA),
        (TULU_OLMO, 6, tulu_olmo_rows(count), TULU_SCHEMA),
        (DOLCI, 15, dolci_rows(count), DOLCI_SCHEMA),
    ):
        hub.commit(repo, shards("data", "train", files, rows, schema) | {"README.md": card(data=count)})
