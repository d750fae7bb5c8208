"""system.py: what is written is whole or not there, a lock has one owner, differences are phrases.

Run it alone: bash tests/run.sh tests/test_system.py
"""

import errno
import json
import os
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from helpers import ROOT, fake_card, full_disk

from sft import system


def test_differences_are_phrases_and_a_missing_name_differs():
    then, now = {"a": 1, "b": 2, "c": 3}, {"a": 1, "b": 5, "d": 4}
    assert system.differences(then, now) == ["b: 2 then, 5 now", "c: 3 then, None now", "d: None then, 4 now"]
    assert system.differences({"x": 1}, {"x": 2}, "here", "there") == ["x: 1 here, 2 there"]
    assert system.differences(then, dict(then)) == []


def test_a_digest_covers_names_and_contents(tmp_path):
    (tmp_path / "a.py").write_text("1")
    (tmp_path / "b.txt").write_text("2")
    first = system.folder_digest(tmp_path, "*.py", "*.txt")
    assert first == system.folder_digest(tmp_path, "*.txt", "*.py") != system.folder_digest(tmp_path, "*.py")
    (tmp_path / "a.py").rename(tmp_path / "c.py")
    assert system.folder_digest(tmp_path, "*.py", "*.txt") != first
    assert system.sha256(tmp_path / "c.py").startswith("6b86b273ff34fce1")  # sha256sum of "1"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "x.json is missing. Run step.py first"),
        (b"{", "x.json is not readable JSON"),
        (b"\xff", "x.json is not readable JSON"),
        (b"[" * 100_000, "x.json is not readable JSON"),
        (b"[]", "x.json holds a list, not an object. Run step.py again"),
    ],
)
def test_json_that_cannot_be_read_is_a_sentence(tmp_path, content, sentence):
    if content is not None:
        (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(SystemExit) as refusal:
        system.read_json(tmp_path / "x.json", "step.py")
    assert sentence in str(refusal.value)
    with pytest.raises(SystemExit, match="Get it again"):  # no script of the suite writes it
        system.read_json(tmp_path / "x.json")


def test_of_a_record_the_lines_are_read_that_are_whole(tmp_path):
    path, whole = tmp_path / "record.jsonl", [{"step": 1, "text": "ä\u2028\r"}, {"step": 2}]
    assert system.read_lines(path) == []
    lines = [json.dumps(line, ensure_ascii=False).encode() for line in whole]
    damage = b"\0" * 9, b"\xff", b"", b"[1]", b"7", b"[" * 100_000
    path.write_bytes(b"\n".join([lines[0], *damage, lines[1], b'{"step": 3}']))
    assert system.read_lines(path) == whole
    for size in range(len(lines[0]) + 1):  # a kill may cut anywhere
        path.write_bytes(lines[0][:size])
        assert system.read_lines(path) == []


def test_a_file_is_replaced_whole_or_stays(tmp_path):
    path = tmp_path / "x.json"
    system.write_whole(path, "old")
    with full_disk(10), pytest.raises(OSError):
        system.write_whole(path, b"new" * 100)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    system.write_whole(path, b"new" * 100)
    assert path.read_bytes() == b"new" * 100 and list(tmp_path.iterdir()) == [path]


def test_a_staged_folder_appears_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "a" / "out"
    with system.staged(folder, "--out-dir") as staging:
        assert staging.parent == system.unfinished(folder) == folder.with_name("out.unfinished")
        (staging / "x").write_text("whole")
        assert not folder.exists()
    assert (folder / "x").read_text() == "whole" and not staging.parent.exists()
    assert [path.name for path in folder.iterdir()] == ["x"]
    sentence = r"out is not empty. Move it away, or name another --out-dir"
    with pytest.raises(SystemExit, match=sentence), system.staged(folder, "--out-dir"):
        pytest.fail("the block must not run")
    assert (folder / "x").read_text() == "whole"


@pytest.mark.parametrize("error", [SystemExit("why"), KeyboardInterrupt(), OSError("disk full")])
def test_a_staged_folder_whose_block_fails_leaves_nothing(tmp_path, error):
    killed, handle = system.claim(tmp_path / "out", "--out-dir")  # of a run that was killed
    handle.close()
    (killed / "out").mkdir()
    (killed / "out" / "stale").touch()
    with pytest.raises((SystemExit, KeyboardInterrupt)) as end, system.staged(tmp_path / "out", "--out-dir") as staging:
        assert not list(staging.iterdir())
        raise error
    assert not list(tmp_path.iterdir())
    if isinstance(error, OSError):
        assert "out cannot be written (disk full). Free disk space, or name another --out-dir" in str(end.value)


def test_an_output_folder_that_is_a_link_is_written_where_it_leads(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk")
    (tmp_path / "dangling").symlink_to("later/folder")
    for link, target in (("out", "disk"), ("dangling", "later/folder")):
        with system.staged(tmp_path / link, "--out-dir") as staging:
            assert staging.parent == system.unfinished(tmp_path / target)
            (staging / "x").write_text("whole")
        assert (tmp_path / target / "x").read_text() == "whole" and (tmp_path / link).is_symlink()
    (tmp_path / "round").symlink_to("round")
    with pytest.raises(SystemExit, match="round cannot be"), system.staged(tmp_path / "round", "--out-dir"):
        pass


def test_the_folder_where_one_stands_can_be_written(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with system.staged(".", "--out-dir") as staging:
        (staging / "x").touch()
    assert (tmp_path / "here" / "x").exists()


def test_a_mount_point_is_refused_before_any_work(tmp_path):
    """A real mount, in a namespace of its own."""
    program = "import sys; sys.path.insert(0, sys.argv[1])\nfrom sft import system\n"
    program += "with system.staged(sys.argv[2], '--out-dir'):\n    print('worked')\n"
    volume = tmp_path / "volume"
    volume.mkdir()
    shell = 'mount -t tmpfs none "$0" && "$1" -c "$2" "$3" "$4"'
    command = ["unshare", "-rm", "sh", "-c", shell, volume, sys.executable, program, ROOT]
    done = subprocess.run([*command, volume], capture_output=True, text=True)
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"no mounts here: {done.stderr}")
    sentence = f"{volume} is a mount point. Name a folder inside it with --out-dir."
    assert done.returncode == 1 and done.stdout == "" and done.stderr.strip() == sentence
    done = subprocess.run([*command, volume / "inside"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "worked\n"
    assert not system.unfinished(volume).exists()


def test_a_second_writer_of_a_staged_folder_is_refused_and_the_first_one_finishes(tmp_path):
    with system.staged(tmp_path / "out", "--out-dir") as staging:
        (staging / "x").write_text("whole")
        sentence = rf"out.unfinished is in use by another run \(process {os.getpid()}\)"
        with pytest.raises(SystemExit, match=sentence), system.staged(tmp_path / "out", "--out-dir"):
            pytest.fail("the block must not run")
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (tmp_path / "out" / "x").read_text() == "whole"


def test_an_unfinished_folder_of_somebody_else_is_not_deleted(tmp_path):
    (tmp_path / "out.unfinished").mkdir()
    (tmp_path / "out.unfinished" / "thesis.txt").write_text("precious")
    (tmp_path / "linked.unfinished").symlink_to("out.unfinished")
    for name in ("out", "linked"):
        sentence = f"{name}.unfinished is a link, or holds files and no .lock.* name another --out-dir"
        with pytest.raises(SystemExit, match=sentence), system.staged(tmp_path / name, "--out-dir"):
            pytest.fail("the block must not run")
    assert [path.name for path in (tmp_path / "out.unfinished").iterdir()] == ["thesis.txt"]


def test_files_of_others_behind_links_keep_their_content(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "x.json.unfinished").symlink_to(victim)
    system.write_whole(tmp_path / "x.json", "new")
    assert (tmp_path / "x.json").read_text() == "new" and not (tmp_path / "x.json").is_symlink()
    (tmp_path / system.LOCK).symlink_to(victim)
    with pytest.raises(SystemExit, match=r"\.lock is a link. Remove it, or name another --out-dir"):
        system.lock(tmp_path, "--out-dir")
    (tmp_path / system.LOCK).unlink()
    os.link(victim, tmp_path / system.LOCK)
    with pytest.raises(SystemExit, match=r"\.lock isn't a lock"):
        system.lock(tmp_path, "--out-dir")
    assert victim.read_text() == "precious"


def test_a_lock_that_a_power_cut_left_as_zeros_is_taken(tmp_path):
    (tmp_path / system.LOCK).write_bytes(b"\0" * 6)
    system.lock(tmp_path, "--out-dir").close()
    assert (tmp_path / system.LOCK).read_text() == f"{os.getpid()}\n"


def test_a_file_system_without_locks_is_a_sentence(tmp_path, monkeypatch):
    def no_locks(handle, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(system.fcntl, "flock", no_locks)
    with pytest.raises(SystemExit, match=r"its file system has no locks \(.*No locks available\).* --out-dir"):
        system.lock(tmp_path, "--out-dir")


def test_a_lock_has_one_owner_and_a_dead_one_frees_it(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom sft import system\nimport time\n"
    code += f"handle = system.lock({str(tmp_path)!r}, '--out-dir')\nprint('locked', flush=True)\ntime.sleep(60)\n"
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert owner.stdout.readline() == "locked\n"
    sentence = rf"is in use by another run \(process {owner.pid}\). Wait for it or name another --out-dir"
    with pytest.raises(SystemExit, match=sentence):
        system.lock(tmp_path, "--out-dir")
    owner.kill()
    owner.wait()
    with system.lock(tmp_path, "--out-dir"):
        assert (tmp_path / system.LOCK).read_text() == f"{os.getpid()}\n"


def test_a_child_dies_with_its_parent(tmp_path):
    child = "from sft import system; import time; system.end_with_parent(); print('up', flush=True); time.sleep(60)"
    parent = (
        "import os, subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.PIPE)\n"
        "child.stdout.readline()\n"
        "print(child.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    env = {"PYTHONPATH": str(ROOT)}
    stdout = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, env=env, timeout=60).stdout
    for _ in range(100):
        if not alive(int(stdout)):
            return
        time.sleep(0.05)
    pytest.fail("the child outlived its parent")


def alive(pid):
    """Return whether the process runs; a zombie, which nobody waits for here, does not."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# ==== The device ====

LOADED = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {}  Release Build  Sun Aug 31\nGCC 13.3.0\n"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Return a function that makes a machine: driver of /proc, driver of nvidia-smi, (vendor, class) on the PCI bus."""

    def make(loaded=None, answered=None, pci=None):
        monkeypatch.setattr(system, "LOADED_DRIVER", tmp_path / "version")
        monkeypatch.setattr(system, "PCI_DEVICES", tmp_path / "pci")
        monkeypatch.setenv("PATH", str(tmp_path / "bin"))
        if loaded:
            (tmp_path / "version").write_text(LOADED.format(loaded))
        if answered:
            fake_card(tmp_path / "bin", answered)
        if pci:
            device = tmp_path / "pci" / "0000:01:00.0"
            device.mkdir(parents=True)
            (device / "vendor").write_text(f"{pci[0]}\n")
            (device / "class").write_text(f"{pci[1]}\n")

    return make


def torch_of(version, cuda):
    return SimpleNamespace(__version__=version, version=SimpleNamespace(cuda=cuda))


@pytest.mark.parametrize(
    ("here", "torch", "says"),
    [
        (("535.183.01",), ("2.13.0", "13.0"), r"with driver 535.183.01, but torch 2.13.0 is built for CUDA 13.0, which "
         r"needs driver 580 or newer"),
        ((None, "570.86"), ("2.13.0", "13.0"), "driver 570.86, but torch .* needs driver 580 or newer"),  # as in WSL2
        (("470.256.02",), ("2.9.0+cu128", "12.8"), "470.256.02, but torch .* needs driver 525 or newer"),
        (("999.1",), ("3.0.0", "14.0"), "driver 999.1, which is new enough"),
        (("580.65.06",), ("2.13.0+cpu", None), r"without CUDA. Install a build with it: .* torch==2.13.0\."),
        ((None, None, ("0x10de", "0x030000")), ("2.13.0", "13.0"), "an NVIDIA card without a driver, but torch"),
        (("580.65.06",), ("2.13.0", "13.0"), "sees no GPU .CUDA_VISIBLE_DEVICES is '7'.. Unset that variable"),
    ],
)  # fmt: skip
def test_a_card_that_torch_cannot_use_is_named_with_the_driver_it_needs(machine, monkeypatch, here, torch, says):
    machine(*here)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert re.search(says, system.unused_card(torch_of(*torch)))


@pytest.mark.parametrize("pci", [None, ("0x1002", "0x030000"), ("0x10de", "0x020000")])  # another card, a network card
def test_a_machine_without_an_nvidia_card_takes_the_cpu(machine, monkeypatch, pci):
    machine(pci=pci)
    assert system.unused_card(torch_of("2.13.0", "13.0")) is None
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert system.choose_device("auto", "--device cpu") == system.choose_device("cpu", "--device cpu") == "cpu"
    with pytest.raises(SystemExit, match=r"Torch sees no GPU here\. To run on the CPU instead: --device cpu\."):
        system.choose_device("cuda", "--device cpu")


def test_the_cpu_is_taken_beside_an_unused_card_only_where_it_is_asked_for(machine, monkeypatch):
    machine("535.183.01")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert system.choose_device("cpu", "--device cpu") == "cpu"
    for setting in ("auto", "cuda"):
        with pytest.raises(SystemExit, match=r"driver 535\.183\.01, but .* To run on the CPU instead: --device cpu\."):
            system.choose_device(setting, "--device cpu")


@pytest.mark.parametrize("script", ["sft_v1.py", "chat.py", "sample_base.py"])
def test_a_script_refuses_an_unused_card_before_any_work(tmp_path, script):
    """Where there is a GPU, CUDA_VISIBLE_DEVICES hides it from torch, and the answer names that machine's driver."""
    fake_card(tmp_path / "bin", "535.183.01")
    env = os.environ | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "CUDA_VISIBLE_DEVICES": "",
        "LOCAL_RANK": "0",
    }
    result = subprocess.run([sys.executable, ROOT / script], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    assert re.search(r"This machine has an NVIDIA card with driver \d+\.\d+.*, but torch ", result.stderr), (
        result.stderr
    )
    assert result.stderr.strip().endswith("To run on the CPU instead: --device cpu.")
