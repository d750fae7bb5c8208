"""Text of others (rows of a data set, names of tasks), made safe for a terminal, for Markdown and HTML."""

import re

# Control characters but newline and tab, and the marks that turn the reading direction
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(text):
    """Return `text` with each control character but newline and tab as its escape, such as \\x1b."""
    return CONTROL.sub(lambda match: ascii(match[0])[1:-1], text)


def one_line(text):
    """Return `text` as one printable line: white space of any kind becomes a single space."""
    return printable(" ".join(text.split()))


def table_cell(text):
    """Return `text` as a cell of a Markdown table: one line, without a column's end, HTML or a link."""
    line = one_line(text).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\|\[\]`])", r"\\\1", line)
