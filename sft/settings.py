"""Turn the UPPER_CASE constants at the top of a script into its command-line flags.

A constant `LEARNING_RATE = 2e-5  # peak learning rate` becomes `--learning-rate 1e-4`; its trailing comment is the
help text and its value the default. `# ---- Title ----` lines group the flags; the first `# ==== Title ====` line ends
the settings. By the constant's type:

    int, float, str     one value (an int is accepted where the default is a float)
    bool                --name or --no-name
    tuple               several strings, separated by commas
    list                the path of a JSON file that holds such a list (the script reads it)

Flags that do not exist, that are abbreviated or whose value has the wrong type end the program with a sentence.
"""

import argparse
import ast
import re


def constants(path):
    """Yield (group, name, comment) of each UPPER_CASE setting at the top of the Python file `path`, in order."""
    source = open(path, encoding="utf-8").read().partition("\n# ====")[0]
    lines, group, seen = source.splitlines(), "settings", 0
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and re.fullmatch(r"[A-Z][A-Z0-9_]*", getattr(node.targets[0], "id", "")):
            for line in lines[seen : node.lineno]:
                title = re.fullmatch(r"# -+ (.+?) -+", line)
                group = title[1] if title else group
            seen = node.end_lineno
            # The comment stands behind a one-line value or after the opening bracket of a longer one. Columns of the
            # ast are bytes.
            start = node.end_col_offset if node.lineno == node.end_lineno else 0
            yield group, node.targets[0].id, lines[node.lineno - 1].encode()[start:].decode().partition("#")[2].strip()


def from_flags(module):
    """Set the constants in `module` (the script's `globals()`) from `sys.argv`.

    Returns: dict of every constant's name and value, to be saved with what the run writes.
    Raises: SystemExit(2) with a sentence for an unknown, abbreviated or mistyped flag.
    """
    parser = argparse.ArgumentParser(
        description=module["__doc__"], allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    groups = {}
    for title, name, comment in constants(module["__file__"]):
        group = groups.setdefault(title, None) or parser.add_argument_group(title)
        groups[title], default = group, module[name]
        kind = {bool: None, list: str, tuple: lambda text: tuple(part for part in text.split(",") if part)}
        shown = "the table in this file" if isinstance(default, list) else repr(default)
        options = {"default": default, "help": f"{comment} [{shown}]".replace("%", "%%")}
        if isinstance(default, bool):
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"] = kind.get(type(default), type(default))
            options["metavar"] = {tuple: "A,B", list: "FILE"}.get(type(default), type(default).__name__.upper())
        group.add_argument(f"--{name.lower().replace('_', '-')}", dest=name, **options)
    chosen = vars(parser.parse_args())
    module.update(chosen)
    return chosen
