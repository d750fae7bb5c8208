"""The house: what stands at the root, which file imports which, how long a function may be.

Alone: bash tests/run.sh tests/test_structure.py
"""

import ast
import re
import subprocess

import pytest
from helpers import ROOT

SCRIPTS = (
    *("generate_constitutional", "sample_base", "import_base", "prepare_data", "resize_vocab", "sft_v1", "export_hf"),
    "chat",
)
ROOT_FILES = {f"{script}.py" for script in SCRIPTS}
ROOT_FILES |= {
    "constitution.md",
    "requirements-generate.txt",
    "run_eval.sh",
    "requirements.txt",
    "README.md",
    "LICENSE",
    "pyproject.toml",
}
FOLDERS = {"sft", "tests", "demo", "benchmarks", "docs", "mixtures"}
MODULES = sorted([*ROOT.glob("*.py"), *ROOT.glob("sft/**/*.py")])
LONGEST_FUNCTION = 60  # lines, with its docstring


def module_name(path):
    """Return the name under which the file `path` is imported: "sft.data.chatml", "prepare_data"."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imports_of(path):
    """Return the set of names of our own modules that the file `path` imports, anywhere in it."""
    known = {module_name(other) for other in MODULES}
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    packages = {"sft", "sft.generation", "sft.data", "sft.training", "sft.evaluation"}
    return (names & known) - packages


IMPORTS = {module_name(path): imports_of(path) for path in MODULES}


def test_the_root_holds_the_scripts_and_nothing_else():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    paths = [path for path in tracked.stdout.splitlines() if not path.startswith(".")]
    assert {path for path in paths if "/" not in path} == ROOT_FILES
    assert {path.split("/")[0] for path in paths if "/" in path} == FOLDERS


def test_training_and_evaluation_do_not_import_each_other():
    for name, imported in IMPORTS.items():
        for room, other in (("training", "evaluation"), ("evaluation", "training")):
            if name.startswith(f"sft.{room}"):
                assert not [module for module in imported if module.startswith(f"sft.{other}")], name


def test_nothing_in_a_room_imports_a_script_and_scripts_import_each_other_only_for_the_dry_run():
    for name, imported in IMPORTS.items():
        allowed = {"export_hf"} if name == "sft_v1" else set()
        assert imported & set(SCRIPTS) <= allowed, name
    uses = re.findall(r"export_hf\.(\w+)\(", (ROOT / "sft_v1.py").read_text())
    assert set(uses) == {"dry_run"}


def test_no_import_leads_back_to_where_it_began():
    finished = set()

    def visit(name, path):
        assert name not in path, f"a circle: {' -> '.join([*path, name])}"
        if name not in finished:
            for imported in sorted(IMPORTS[name]):
                visit(imported, [*path, name])
            finished.add(name)

    for name in IMPORTS:
        visit(name, [])


def test_no_function_is_longer_than_a_screen():
    long = []
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno + 1 > LONGEST_FUNCTION:
                long.append(f"{module_name(path)}.{node.name}: {node.end_lineno - node.lineno + 1} lines")
    assert not long


def test_every_relative_link_of_the_documents_leads_somewhere():
    for page in [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
