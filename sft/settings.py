"""Turn the UPPER_CASE constants at the top of a script into its command-line flags.

A constant `LEARNING_RATE = 2e-5  # peak learning rate` becomes `--learning-rate 1e-4`; its trailing comment is the
help text and its value the default. `# ---- Title ----` lines group the flags; the first `# ==== Title ====` line ends
the settings. The constant's type decides what the flag takes:

    int, float, str     one value (an int is accepted where the default is a float)
    bool                --name or --no-name
    tuple               one or more strings, each an argument of its own: --tasks piqa mmlu; "" alone is none
    list                the path of a JSON file that holds such a list (the script reads it)

An unknown or abbreviated flag, or a value of the wrong type, ends the program with a sentence.
"""

import argparse
import ast
import contextlib
import io
import math
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


def defaults(path):
    """Return {name: value} of the settings at the top of the Python file `path`, without running it.

    A value that is not written out, such as a sum, is left out.
    """
    values = {}
    for node in ast.parse(Path(path).read_text(encoding="utf-8").partition("\n# ====")[0]).body:
        if name := setting_name(node):
            with contextlib.suppress(ValueError):
                values[name] = ast.literal_eval(node.value)
    return values


def flag_name(name):
    """Return the flag of the constant `name`: --learning-rate of LEARNING_RATE."""
    return "--" + name.lower().replace("_", "-")


def flag_options(default, comment):
    """Return the keyword arguments of argparse's `add_argument` for a constant with this default and comment."""
    shown = "the table in this file" if isinstance(default, list) else repr(default)
    options = {"default": default, "help": f"{comment} [{shown}]".replace("%", "%%")}
    if isinstance(default, bool):
        return options | {"action": argparse.BooleanOptionalAction}
    if isinstance(default, tuple):
        # No default: "extend" would add to it instead of replacing it; see from_flags.
        return options | {"action": "extend", "nargs": "+", "metavar": "TEXT", "default": None}
    if isinstance(default, list):
        return options | {"type": str, "metavar": "FILE"}
    return options | {"type": type(default), "metavar": type(default).__name__.upper()}


def escape_what_the_terminal_lacks():
    """Have stdout and stderr escape what their encoding lacks: a character of others must not end a script."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def from_flags(module):
    """Set the constants in `module` (the script's `globals()`) from `sys.argv`.

    Returns: dict of every constant's name and value, which the script saves with what it writes.
    Raises: SystemExit(2) with a sentence for an unknown, abbreviated or mistyped flag.
    """
    escape_what_the_terminal_lacks()
    parser = argparse.ArgumentParser(
        description=module["__doc__"], allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    groups = {}
    for title, name, comment in constants(module["__file__"]):
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        groups[title].add_argument(flag_name(name), dest=name, **flag_options(module[name], comment))
    args = vars(parser.parse_args())
    for name, value in args.items():
        if isinstance(module[name], tuple):
            args[name] = module[name] if value is None else tuple(text for text in value if text)
    module.update(args)
    return args


def check_bounds(args, choices, at_least):
    """Raise SystemExit with a sentence for a setting outside its bounds.

    args: {name: value}; choices: {name: the values it may have}; at_least: {name: the least of a finite number}.
    """
    for name, values in choices.items():
        if args[name] not in values:
            raise SystemExit(f"{name} is {args[name]!r}; it must be one of {', '.join(values)}.")
    for name, least in at_least.items():
        if not least <= args[name] < math.inf:
            raise SystemExit(f"{name} is {args[name]}; it must be at least {least}.")
