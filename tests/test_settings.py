"""settings.py through a real script: flags, help, refusals, and no effect at import."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ["import_base", "prepare_data", "resize_vocab", "sft_v1", "export_hf"]
SCRIPTS += [f"sft.evaluation.{name}" for name in ("assistant_check", "compare_evals", "reading_check")]
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

# ==== Facts ====

FIXED = 3  # not a setting

if __name__ == "__main__":
    chosen = settings.from_flags(globals())
    print(repr(chosen))
    assert chosen == {name: globals()[name] for name in chosen}
'''


@pytest.fixture
def run(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")

    def call(*flags):
        return subprocess.run(
            [sys.executable, tmp_path / "script.py", *flags],
            capture_output=True,
            text=True,
            env={"PYTHONPATH": str(ROOT), "COLUMNS": "200", "PYTHONUTF8": "1"},
        )

    return call


def test_defaults_come_back_as_a_dict(run):
    expected = {"RATE": 2e-5, "STEPS": 3, "ON": True, "OFF": False, "NAME": "a # b", "TASKS": ("x", "y")}
    assert eval(run().stdout) == expected | {"TABLE": [{"name": "z"}]}


def test_flags_set_constants_of_their_type(run):
    flags = ("--rate", "1", "--steps=-7", "--no-on", "--off", "--name", "c d", "--tasks", "p,q,", "--table", "t.json")
    chosen = eval(run(*flags).stdout)
    assert chosen == {
        "RATE": 1.0,
        "STEPS": -7,
        "ON": False,
        "OFF": True,
        "NAME": "c d",
        "TASKS": ("p", "q"),
        "TABLE": "t.json",
    }
    assert isinstance(chosen["RATE"], float)


def test_help_shows_docstring_groups_comments_and_defaults(run):
    text = run("--help").stdout
    for part in (
        "Does nothing much.",
        "First group:",
        "Second group:",
        '--rate FLOAT     rate per step, 0 to 100% ("quoted", käse) [2e-05]',
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
        (["stray"], "unrecognized arguments: stray"),
    ],
)
def test_wrong_flags_are_refused_with_their_name(run, flags, sentence):
    result = run(*flags)
    assert result.returncode == 2 and sentence in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_constant_of_every_script_is_a_flag_with_a_comment(script):
    from sft import settings

    found = list(settings.constants(ROOT / f"{script.replace('.', '/')}.py"))
    assert found
    for _, name, comment in found:
        assert len(comment) > 5, f"{script}.{name} has no comment"
    result = subprocess.run([sys.executable, "-m", script, "--help"], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0
    for _, name, _ in found:
        assert f"--{name.lower().replace('_', '-')}" in result.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_importing_a_script_starts_nothing_and_ignores_the_command_line(script, tmp_path):
    code = f"import sys; sys.argv[1:] = ['--bogus']; import {script}; print('quiet')"
    env = {"PYTHONPATH": str(ROOT), "PATH": "", "HOME": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert result.stdout == "quiet\n", result.stderr
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith(".")]
