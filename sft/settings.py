"""Turn the UPPER_CASE constants at the top of a script into its command-line flags.

A constant `LEARNING_RATE = 2e-5  # peak learning rate` becomes `--learning-rate 1e-4`; its trailing comment is the
help text and its value the default. `# ---- Title ----` lines group the flags; the first `# ==== Title ====` line ends
the settings. The constant's type decides what the flag takes:

    int, float, str     one value (an int is accepted where the default is a float)
    bool                --name or --no-name
    tuple               several strings, comma-separated
    list                the path of a JSON file that holds such a list (the script reads it)

An unknown or abbreviated flag, or a value of the wrong type, ends the program with a sentence.
"""

import argparse
import ast
import io
import re
import sys
from pathlib import Path


def setting_name(node):
    """Return the UPPER_CASE name that the statement `node` (ast) assigns, or None."""
    if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Name):
        return None
    name = node.targets[0].id
    return name if re.fullmatch(r"[A-Z][A-Z0-9_]*", name) else None


def trailing_comment(node, lines):
    """Return the comment after a one-line value, or after the opening bracket of a longer one."""
    line = lines[node.lineno - 1]
    if node.lineno == node.end_lineno:
        line = line.encode()[node.end_col_offset :].decode()  # the ast counts columns in bytes
    return line.partition("#")[2].strip()


def constants(path):
    """Yield (group, name, comment) of each UPPER_CASE setting at the top of the Python file `path`, in order."""
    source = Path(path).read_text(encoding="utf-8").partition("\n# ====")[0]
    lines = source.splitlines()
    group = "settings"
    next_line = 0  # the first line after the last setting
    for node in ast.parse(source).body:
        name = setting_name(node)
        if name is None:
            continue
        for line in lines[next_line : node.lineno]:
            if title := re.fullmatch(r"# -+ (.+?) -+", line):
                group = title[1]
        next_line = node.end_lineno
        yield group, name, trailing_comment(node, lines)


def flag_name(name):
    """Return the flag of the constant `name`: --learning-rate of LEARNING_RATE."""
    return "--" + name.lower().replace("_", "-")


def comma_separated(text):
    """Return the tuple of the strings between the commas of `text`; empty ones are left out."""
    return tuple(part for part in text.split(",") if part)


def flag_options(default, comment):
    """Return the keyword arguments of argparse's `add_argument` for a constant with this default and comment."""
    shown = "the table in this file" if isinstance(default, list) else repr(default)
    options = {"default": default, "help": f"{comment} [{shown}]".replace("%", "%%")}
    if isinstance(default, bool):
        return options | {"action": argparse.BooleanOptionalAction}
    if isinstance(default, tuple):
        return options | {"type": comma_separated, "metavar": "A,B"}
    if isinstance(default, list):
        return options | {"type": str, "metavar": "FILE"}
    return options | {"type": type(default), "metavar": type(default).__name__.upper()}


def from_flags(module):
    """Set the constants in `module` (the script's `globals()`) from `sys.argv`.

    stdout and stderr escape from here on what their encoding lacks.
    Returns: dict of every constant's name and value, which the script saves with what it writes.
    Raises: SystemExit(2) with a sentence for an unknown, abbreviated or mistyped flag.
    """
    for stream in (sys.stdout, sys.stderr):  # a character of others that the terminal lacks must not end a script
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    parser = argparse.ArgumentParser(
        description=module["__doc__"], allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    groups = {}
    for title, name, comment in constants(module["__file__"]):
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        groups[title].add_argument(flag_name(name), dest=name, **flag_options(module[name], comment))
    args = vars(parser.parse_args())
    module.update(args)
    return args
