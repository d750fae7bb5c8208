"""hub.py: prepare_data.py's own mixture through the real hub clients; a hub that moves, fails or cannot be reached.

Run it alone: bash tests/run.sh tests/test_hub.py
"""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import datasets
import huggingface_hub
import loopback_hub
import pytest
from helpers import ROOT, chat, prepare_args, source
from huggingface_hub.utils import httpx
from loopback_hub import METAMATH, OPENHERMES, SMOLTALK, TULU

import prepare_data
from sft.data import hub as hub_module
from sft.data import sources

# ---- The mixture of prepare_data.py ----

COUNTS = {"constitutional": 20, "smoltalk": 100, "openhermes": 200, "tulu": 100, "metamath": 50}


@pytest.fixture(scope="module")
def hub():
    server = loopback_hub.Hub()
    yield server
    server.shutdown()


def run(folder, hub, base, output, **counts):
    """Run prepare_data.py in `folder` on its own mixture, with COUNTS or `counts`, in a process with its cache there.

    Returns: CompletedProcess.
    """
    mixture = [row | {"examples": (COUNTS | counts)[row["name"]]} for row in prepare_data.MIXTURE]
    mixture[0]["path"] = "constitutional.jsonl"
    (folder / "mixture.json").write_text(json.dumps(mixture))
    rows = [chat(f"Who are you, {n}?", "Genesis, an assistant.") for n in range(40)]
    if not (folder / "constitutional.jsonl").exists():
        (folder / "constitutional.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    program = "import runpy, sys\nfrom sft.data import hub\nhub.RETRY_WAITS = (0.1,) * 3\n"
    program += "sys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", program, ROOT / "prepare_data.py", "--mixture", "mixture.json"]
    command += ["--base-model", base, "--data-dir", output, "--decontaminate-against", "", "--workers", "1"]
    command += ["--validation-conversations", "10", "--max-seq-len", "512"]
    env = {key: value for key, value in os.environ.items() if "OFFLINE" not in key}
    env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "hf"), "PYTHONPATH": str(ROOT)}
    command = [str(part) for part in command]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


def revisions(report):
    return {line["name"]: line["revision"] for line in report["sources"] if line["revision"]}


def test_the_mixture_is_prepared_from_the_hub_and_its_commits_are_never_mixed(hub, tmp_path, small_tokenizer_dir):
    """Three runs: one that fails at its last source, its repetition after a branch moved, and one without a hub."""
    commits = loopback_hub.commit_mixture(hub)
    hub.faults = [{"path": f"GET /datasets/{OPENHERMES}/blob", "times": 1, "cut": 10_000}]  # resumed by the client
    hub.faults += [{"path": f"GET /api/datasets/{TULU}/revision", "times": 1, "status": 503}]
    failed = run(tmp_path, hub, small_tokenizer_dir, "out", metamath=1000)
    assert failed.returncode == 1 and "Traceback" not in failed.stderr
    assert "WARNING: tulu: HfHubHTTPError: Server error '503" in failed.stderr
    assert "The next attempt is in 0.1 s." in failed.stderr
    assert failed.stderr.rpartition("metamath: ")[2].startswith("1,010 conversations are needed"), failed.stderr
    for name, repo in (("smoltalk", SMOLTALK), ("openhermes", OPENHERMES), ("tulu", TULU), ("metamath", METAMATH)):
        assert f"{name}: fetching {repo}\n" in failed.stdout

    commits["smoltalk"] = loopback_hub.commit_smoltalk(hub, 300, first=1000)  # as many rows, but other ones
    moved = run(tmp_path, hub, small_tokenizer_dir, "out")
    assert moved.returncode == 0, moved.stderr
    assert "constitutional: finished by an earlier run" in moved.stdout
    assert "smoltalk: finished" not in moved.stdout
    report = report_of(tmp_path / "out")
    assert revisions(report) == commits
    for line in report["sources"]:
        assert line["read"] == line["kept"] + line["rejected"]
        assert line["conversations"] == COUNTS[line["name"]] and line["validation_conversations"] == 10
    reasons = {line["name"]: set(line["reasons"]) for line in report["sources"]}
    assert reasons["smoltalk"] == {"content is not text", "empty assistant turn", "another model's identity"}
    assert reasons["tulu"] == {"tool turn", "excluded: source is ai2-adapt-dev/tulu_hard_coded_repeated_10"}
    assert reasons["openhermes"] == {"content is not text"} and not reasons["metamath"]

    tables = {folder.name for folder in (tmp_path / "hf" / "datasets").glob("datasets--*")}
    assert tables == {f"datasets--{repo.replace('/', '--')}" for repo in (SMOLTALK, TULU)}  # JSON arrays take memory
    unplug(hub)
    again = run(tmp_path, hub, small_tokenizer_dir, "again")
    assert again.returncode == 0, again.stderr
    assert report_of(tmp_path / "again")["digest"] == report["digest"]
    assert revisions(report_of(tmp_path / "again")) == commits
    for name, commit in commits.items():
        assert f"WARNING: {name}: the hub cannot be reached" in again.stderr
        assert f"main is read from the cache, at commit {commit}" in again.stderr


# ---- One source, and the files in mixtures/ ----

FILE = {"hub": METAMATH, "file": "MetaMathQA-395K.json", "schema": "query/response"}
TABLES = {"hub": SMOLTALK, "config": "smol-magpie-ultra"}


@pytest.fixture
def waits(hub, tmp_path, monkeypatch):
    """Let this process use `hub` and an empty cache, tmp_path / "hf". Returns: list of the seconds waited."""
    hub.repos, hub.faults, hub.requests[:] = {}, [], []
    for name, value in (
        ("ENDPOINT", hub.url),
        ("HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"),
        ("HF_HOME", str(tmp_path / "hf")),
        ("HF_HUB_CACHE", str(tmp_path / "hf" / "hub")),
        ("HF_HUB_OFFLINE", False),
    ):
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    for name, value in (
        ("HF_ENDPOINT", hub.url),
        ("HF_DATASETS_CACHE", str(tmp_path / "hf" / "datasets")),
        ("HF_HUB_OFFLINE", False),
    ):
        monkeypatch.setattr(datasets.config, name, value)
    seconds = []
    monkeypatch.setattr(time, "sleep", seconds.append)
    return seconds


@pytest.mark.parametrize(
    ("name", "rejected"),
    [
        ("smol-smoltalk", set()),
        ("tulu-3-olmo-2", {"another model's identity"}),
        ("dolci", {"excluded: domain is Tool Use", "excluded: domain is Hardcoded"}),
    ],
)
def test_each_ready_mixture_reads_its_hub_data_set(hub, waits, tmp_path, small_tokenizer_dir, name, rejected):
    loopback_hub.commit_newer(hub, 100)
    mixture = tmp_path / "mixtures" / f"{name}.json"
    mixture.parent.mkdir()
    shutil.copy(ROOT / "mixtures" / mixture.name, mixture)
    rows = [chat(f"Who are you, {n}?", "Genesis, an assistant.") for n in range(60)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "constitutional.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"MIXTURE": str(mixture), "BASE_MODEL": str(small_tokenizer_dir), "DATA_DIR": str(tmp_path / "out")}
    prepare_data.main(prepare_args(**changes, LIMIT=40, WORKERS=1))
    first, second = report_of(tmp_path / "out")["sources"]
    assert first["name"] == "constitutional" and second["name"] == name
    for line in (first, second):
        assert line["conversations"] == 40 and line["validation_conversations"] == 4
    assert set(second["reasons"]) == rejected and len(second["revision"]) == 40


def test_every_mixture_is_a_file_that_is_tried_here():
    assert {path.stem for path in (ROOT / "mixtures").glob("*")} == {"smol-smoltalk", "tulu-3-olmo-2", "dolci"}


def read(**fields):
    """Return (number of rows of a hub source, its commit)."""
    open_rows, fingerprint = sources.find_source(source(**fields), None)
    return len(open_rows()), fingerprint["revision"]


def failure(**fields):
    """Return the sentence with which a hub source is refused."""
    with pytest.raises(SystemExit) as error:
        read(**fields)
    says = str(error.value)
    assert says.startswith(f"s: {fields['hub']} cannot be read (") and "\n" not in says, says
    assert says.endswith("The same command continues where it stopped; downloaded files are kept."), says
    return says


def unplug(hub):
    hub.faults = [{"path": "", "cut": None}]


def test_a_pinned_commit_is_never_replaced_by_another_cached_one(hub, waits, monkeypatch):
    commits = [loopback_hub.commit_smoltalk(hub, count) for count in (30, 20, 25)]
    for commit, count in zip(commits[:2], (30, 20), strict=True):
        assert read(**TABLES, revision=commit) == (count, commit)
    hub.faults = [{"path": "", "status": 503}]
    for commit, count in zip(commits[:2], (30, 20), strict=True):
        assert read(**TABLES, revision=commit) == (count, commit)
    assert not waits
    assert "Check the network, or wait until the hub answers again" in failure(**TABLES, revision=commits[2])
    unplug(hub)
    assert "Check the network" in failure(**TABLES, revision=commits[2])
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    assert "Unset HF_HUB_OFFLINE" in failure(**TABLES, revision=commits[2])
    assert read(**TABLES, revision=commits[0]) == (30, commits[0])


def test_a_branch_is_read_from_the_cache_only_while_the_hub_cannot_be_reached(hub, waits, monkeypatch, capsys):
    old, math = loopback_hub.commit_smoltalk(hub, 30), loopback_hub.commit_metamath(hub, 10)
    assert read(**TABLES) == (30, old) and read(**FILE) == (10, math)
    unplug(hub)
    capsys.readouterr()
    assert read(**TABLES) == (30, old) and read(**FILE) == (10, math)
    assert capsys.readouterr().err.count("WARNING: s: the hub cannot be reached (") == 2
    assert not waits
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # as the user's environment may ask
    assert read(**TABLES) == (30, old) and read(**FILE) == (10, math)
    assert "OfflineModeIsEnabled" in capsys.readouterr().err
    assert "Unset HF_HUB_OFFLINE" in failure(**TABLES | {"config": "everyday-conversations"})
    assert "Unset HF_HUB_OFFLINE" in failure(**FILE | {"hub": OPENHERMES})
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    hub.faults = []
    new = loopback_hub.commit_smoltalk(hub, 40)
    hub.faults = [{"path": "GET .*blob.*parquet", "status": 403}]
    failure(**TABLES)
    unplug(hub)
    assert read(**TABLES) == (30, old)  # the newer one is known, but not whole
    hub.faults = []
    assert read(**TABLES) == (40, new)


def test_a_local_folder_of_the_hubs_name_is_not_read(hub, waits, tmp_path, monkeypatch):
    commit = loopback_hub.commit_smoltalk(hub, 30)
    for path, data in loopback_hub.shards(SMOLTALK, "train", 1, loopback_hub.smoltalk_rows(7)).items():
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_bytes(data)
    monkeypatch.chdir(tmp_path)
    assert read(**TABLES) == (30, commit)


@pytest.mark.parametrize(
    "fault",
    [
        {"path": "GET /api/.*/revision/main", "status": 503, "times": 6},
        {"path": "GET /api/.*/revision/main", "cut": None, "times": 6},
        {"path": "HEAD .*/README.md", "status": 500, "times": 16},  # the client itself makes 6 attempts, or one
        {"path": "GET /api/.*/tree", "status": 502, "times": 16},
        {"path": "GET .*blob.*parquet", "cut": None, "times": 16},
        {"path": "GET .*blob.*parquet", "cut": 1000, "times": 16},
    ],
)
def test_what_may_pass_by_itself_is_tried_again(hub, waits, capsys, fault):
    commit = loopback_hub.commit_smoltalk(hub, 30)
    hub.faults = [fault]
    assert read(**TABLES) == (30, commit)
    assert waits and fault["times"] == 0
    assert capsys.readouterr().err.count("The next attempt is in ") > 0


def test_the_hub_says_when_to_come_back_and_a_minute_is_outlasted(hub, waits, capsys):
    commit = loopback_hub.commit_metamath(hub, 10)
    hub.faults = [{"path": "GET /api/.*/revision", "status": 429, "headers": {"Retry-After": "33"}, "times": 2}]
    assert read(**FILE) == (10, commit)
    assert waits == [33, 33]
    assert capsys.readouterr().err.count("429 Too Many Requests") == 2
    assert sum(hub_module.RETRY_WAITS) > 60


def test_a_firewall_is_not_taken_for_a_read_only_cache():
    error = httpx.ConnectError("Operation not permitted")
    error.__cause__ = PermissionError(errno.EPERM, "Operation not permitted")
    assert hub_module.diagnose(error)[0] is hub_module.TEMPORARY
    assert "write to the hub's cache" in hub_module.diagnose(error.__cause__)[0]


def gated(status):
    return {"path": "/api/", "status": status, "headers": {"X-Error-Code": "GatedRepo"}}


@pytest.mark.parametrize(
    ("fields", "fault", "says"),
    [
        (TABLES, gated(401), "Accept its terms at {page}, then log in: hf auth login."),
        (TABLES, gated(403), "Accept its terms at {page}, then log in: hf auth login."),
        (TABLES, {"path": "blob.*parquet", "status": 403}, "Log in (hf auth login), ask for access at {page}, or"),
        (FILE, {"path": "/api/", "status": 403}, "The hub or a proxy before it refuses this."),
        (TABLES | {"hub": "HuggingFaceTB/smalltalk"}, {}, 'Correct its "hub"; if it is private or gated'),
        (FILE | {"hub": "meta-math/MetaMath"}, {}, 'Correct its "hub"; if it is private or gated'),
        (FILE | {"hub": "a/b/c"}, {}, 'Correct its "hub", OWNER/NAME.'),
        (TABLES | {"revision": "v2"}, {}, 'Correct its "revision", a branch, tag or commit ({page}).'),
        (TABLES | {"revision": "a" * 40}, {}, 'Correct its "revision", a branch, tag or commit ({page}).'),
        (FILE | {"revision": "a" * 40}, {}, 'Correct its "revision", a branch, tag or commit ({page}).'),
        (FILE | {"file": "MetaMathQA.json"}, {}, 'Correct its "file" ({page}/tree/main).'),
        (TABLES | {"config": "magpie"}, {}, "'smol-magpie-ultra', 'everyday-conversations']). Correct its \"config\"."),
        ({"hub": SMOLTALK}, {}, 'Correct its "config".'),
        (TABLES | {"split": "test"}, {}, "['train']). Correct its \"split\"."),
        ({"hub": "o/none"}, {}, 'It has no files that `datasets` can read. Name one "file" of it ({page}).'),
        ({"hub": "o/counts"}, {}, "Its README.md disagrees with its files: it has changed, or"),
        ({"hub": "o/columns"}, {}, "Delete {files} and {tables} to download them again, name another"),
        (
            {"hub": "o/damaged"},
            {},
            "not a parquet file). Its files have changed, or their copy here is damaged. Delete",
        ),
        ({"hub": "o/damaged", "file": "data/train-0.parquet"}, {}, "not a parquet file). Its files have changed, or"),
    ],
)
def test_each_failure_has_its_own_remedy(hub, waits, tmp_path, fields, fault, says):
    loopback_hub.commit_smoltalk(hub, 30)
    loopback_hub.commit_metamath(hub, 10)
    tables = loopback_hub.shards("data", "train", 1, [{"messages": "x"}] * 3)
    hub.commit("o/none", {"README.md": b"# Nothing\n"})
    hub.commit("o/counts", tables | {"README.md": loopback_hub.card(data=4)})
    hub.commit("o/columns", tables | loopback_hub.shards("data", "train", 2, [{"text": 1, "more": 2}] * 3))
    hub.commit("o/damaged", {"data/train-0.parquet": b"PAR1 not really"})
    hub.faults = [fault] if fault else []
    folder = f"datasets--{fields['hub'].replace('/', '--')}"
    names = {"page": f"{hub.url}/datasets/{fields['hub']}", "files": tmp_path / "hf" / "hub" / folder}
    assert says.format(**names, tables=tmp_path / "hf" / "datasets" / folder) in failure(**fields)
    assert not waits


def test_a_damaged_cache_is_named_and_mended_by_deleting_it(hub, waits, tmp_path):
    commit = loopback_hub.commit_smoltalk(hub, 30)
    read(**TABLES)
    [table] = (tmp_path / "hf" / "datasets").rglob("*.arrow")
    for damage in (lambda: table.write_bytes(table.read_bytes()[:1000]), table.unlink):
        damage()
        says = failure(**TABLES)
        for folder in set(re.findall(rf"{re.escape(str(tmp_path))}\S+/datasets--[\w-]+", says)):
            shutil.rmtree(folder)
        assert read(**TABLES) == (30, commit)


def test_a_kill_while_tables_are_made_leaves_no_harm(hub, waits, tmp_path):
    commit = loopback_hub.commit_smoltalk(hub, 30)
    read(**TABLES)
    [info] = (tmp_path / "hf" / "datasets").rglob("dataset_info.json")
    info.parent.rename(f"{info.parent}.incomplete")
    Path(f"{info.parent}.incomplete", info.name).unlink()
    assert read(**TABLES) == (30, commit)


def test_a_cache_that_is_full_or_may_not_be_written_is_a_sentence(hub, waits, monkeypatch):
    loopback_hub.commit_metamath(hub, 10)
    for number, remedy in ((errno.ENOSPC, "Free disk space"), (errno.EROFS, "Get the right to write to the hub's")):
        with monkeypatch.context() as patch:
            patch.setattr(os, "makedirs", Mock(side_effect=OSError(number, os.strerror(number))))
            assert remedy in failure(**FILE)
