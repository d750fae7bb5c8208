"""Flags, help and refusals of settings.py; every constant of every script is a flag, and importing starts nothing.

Run it alone: bash tests/run.sh tests/test_settings.py
"""

import json
import os
import runpy
import subprocess
import sys

import pytest
from helpers import ROOT, run_python

from sft import settings

SCRIPT = '''"""Does nothing much."""

from sft import settings

# ---- First group ----
RATE = 2e-5  # rate per step, 0 to 100% ("quoted", käse)
STEPS = 3  # steps
ON = True  # a switch
OFF = False  # another
NAME = "a # b"  # text with a hash
# ---- Second group ----
TASKS = ("x", "y")  # names
TABLE = [  # rows of the table
    {"name": "z"},
]
_HIDDEN = 1
lower = 2

# ==== Constants ====

FIXED = 3  # not a setting

if __name__ == "__main__":
    args = settings.from_flags(globals())
    print(repr(args))
    assert args == {name: globals()[name] for name in args}
'''
# Imports every script and asks each for its help, in one process: torch is imported once.
ALL_SCRIPTS = """
import contextlib, importlib, io, json, runpy, sys
help_texts = {}
for path in sys.argv[1:]:
    sys.argv = ["script", "--bogus"]
    importlib.import_module(path.removesuffix(".py").replace("/", "."))
print("quiet", flush=True)
for path in PATHS:
    sys.argv, output = [path, "--help"], io.StringIO()
    with contextlib.redirect_stdout(output):
        try:
            runpy.run_path(f"{ROOT}/{path}", run_name="__main__")
        except SystemExit as end:
            assert end.code == 0, end.code
    help_texts[path] = output.getvalue()
print(json.dumps(help_texts))
"""


def has_flags(path):
    return "\n    main(settings.from_flags(globals()))" in path.read_text(encoding="utf-8")


PATHS = sorted([*ROOT.glob("*.py"), *ROOT.glob("sft/**/*.py")])
SCRIPTS = [str(path.relative_to(ROOT)) for path in PATHS if has_flags(path)]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Return a function that runs SCRIPT in this process with some flags and returns (exit status, stdout, stderr)."""
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    monkeypatch.setenv("COLUMNS", "200")

    def call(*flags):
        monkeypatch.setattr(sys, "argv", ["script.py", *flags])
        status = 0
        try:
            runpy.run_path(str(tmp_path / "script.py"), run_name="__main__")
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return call


def test_defaults_come_back_as_a_dict(run):
    expected = {"RATE": 2e-5, "STEPS": 3, "ON": True, "OFF": False, "NAME": "a # b", "TASKS": ("x", "y")}
    assert eval(run()[1]) == expected | {"TABLE": [{"name": "z"}]}


def test_flags_set_constants_of_their_type(run):
    flags = ("--rate", "1", "--steps=-7", "--no-on", "--off", "--name", "c d", "--tasks", "p", "q", "--table", "t.json")
    args = eval(run(*flags)[1])
    expected = {"RATE": 1.0, "STEPS": -7, "ON": False, "OFF": True, "NAME": "c d", "TASKS": ("p", "q")}
    assert args == expected | {"TABLE": "t.json"}
    assert isinstance(args["RATE"], float)


def test_commas_in_a_text_do_not_split_it_and_nothing_that_was_given_is_lost(run):
    for flags, expected in (
        (["--tasks", "Hello, who are you?", r"v1{1,3}\b"], ("Hello, who are you?", r"v1{1,3}\b")),
        (["--tasks", "p", "--tasks", "q", "r"], ("p", "q", "r")),
        (["--tasks=-p,q"], ("-p,q",)),
        (["--tasks", ""], ()),
        ([], ("x", "y")),
    ):
        assert eval(run(*flags)[1])["TASKS"] == expected


def test_help_shows_docstring_groups_comments_and_defaults(run):
    text = " ".join(run("--help")[1].split())
    for part in (
        "Does nothing much.",
        "First group:",
        "Second group:",
        '--rate FLOAT rate per step, 0 to 100% ("quoted", käse) [2e-05]',
        "text with a hash ['a # b']",
        "rows of the table",
        "--no-on",
    ):
        assert part in text, text
    assert "HIDDEN" not in text and "fixed" not in text and "lower" not in text


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--bogus", "1"], "unrecognized arguments: --bogus"),
        (["--rat", "1"], "unrecognized arguments: --rat"),
        (["--steps", "1.5"], "argument --steps: invalid int value: '1.5'"),
        (["--rate", "fast"], "argument --rate: invalid float value: 'fast'"),
        (["--name"], "argument --name: expected one argument"),
        (["--tasks"], "argument --tasks: expected at least one argument"),
        (["stray"], "unrecognized arguments: stray"),
    ],
)
def test_wrong_flags_are_refused_with_their_name(run, flags, sentence):
    status, _, stderr = run(*flags)
    assert status == 2 and sentence in stderr


def test_a_script_as_a_process_of_its_own_takes_flags_and_refuses_wrong_ones(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    env = {"PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"}
    command = [sys.executable, tmp_path / "script.py"]
    result = subprocess.run([*command, "--name", "käse"], capture_output=True, text=True, env=env)
    assert result.returncode == 0 and eval(result.stdout)["NAME"] == "käse"
    result = subprocess.run([*command, "--bogus"], capture_output=True, text=True, env=env)
    assert result.returncode == 2 and "unrecognized arguments: --bogus" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.fixture(scope="module")
def help_texts(tmp_path_factory):
    """Import every script, then ask each for its help, in one process; return {script: help text}."""
    folder = tmp_path_factory.mktemp("empty")
    program = f"import os, sys\nROOT, PATHS = {str(ROOT)!r}, {SCRIPTS!r}\nsys.path.insert(0, ROOT)\n"
    program += f"os.environ['HOME'] = os.getcwd()\n{ALL_SCRIPTS}"
    stdout = run_python(folder, "-B", "-c", program, *SCRIPTS)
    assert not [path for path in folder.iterdir() if not path.name.startswith(".")]
    quiet, texts = stdout.splitlines()
    assert quiet == "quiet"  # no import printed anything
    return json.loads(texts)


def test_the_scripts_are_all_there(help_texts):
    names = {"import_base.py", "prepare_data.py", "resize_vocab.py", "sft_v1.py", "export_hf.py", "chat.py"}
    names |= {f"sft/evaluation/{name}.py" for name in ("assistant_check", "compare_evals", "reading_check")}
    assert names <= help_texts.keys() == set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_constant_of_every_script_is_a_flag_with_a_comment(help_texts, script):
    constants = list(settings.constants(ROOT / script))
    assert constants
    for _, name, comment in constants:
        assert len(comment) > 5, f"{script}: {name} has no comment"
        assert f"--{name.lower().replace('_', '-')}" in help_texts[script]


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ({"HOW": "c"}, r"HOW is 'c'; it must be one of a, b\."),
        ({"STEPS": 0}, r"STEPS is 0; it must be at least 1\."),
        ({"STEPS": float("nan")}, r"STEPS is nan; it must be at least 1\."),
        ({"STEPS": float("inf")}, r"STEPS is inf; it must be at least 1\."),
    ],
)
def test_a_value_outside_its_bounds_is_a_sentence(args, sentence):
    settings.check_bounds({"HOW": "a", "STEPS": 1}, {"HOW": ("a", "b")}, {"STEPS": 1})
    with pytest.raises(SystemExit, match=sentence):
        settings.check_bounds({"HOW": "a", "STEPS": 1} | args, {"HOW": ("a", "b")}, {"STEPS": 1})


def test_text_that_the_terminals_encoding_lacks_is_escaped(tmp_path):
    program = "# ==== x ====\nfrom sft import settings\nsettings.from_flags(globals())\nprint('\u4f60 \u00fc')\n"
    (tmp_path / "script.py").write_text(program, encoding="utf-8")
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "latin-1"}
    result = subprocess.run([sys.executable, tmp_path / "script.py"], capture_output=True, env=env)
    assert result.stdout.decode("latin-1") == "\\u4f60 \u00fc\n", result.stderr
