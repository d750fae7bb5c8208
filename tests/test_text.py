"""sft/text.py: no text of others moves the cursor, forges a row or brings its own HTML.

Alone: bash tests/run.sh tests/test_text.py
"""

from sft import text


def test_control_characters_are_shown_and_not_obeyed():
    assert text.printable("a\x1b[2Jb\x9bc\u202ed") == "a\\x1b[2Jb\\x9bc\\u202ed"
    assert text.printable("two\nlines\tand é 你好 👍🏽") == "two\nlines\tand é 你好 👍🏽"


def test_a_table_cell_stays_one_cell():
    assert text.table_cell("a|b\n| forged |") == "a\\|b \\| forged \\|"
    assert text.table_cell("<img src=x> & [a](b) `c`") == "&lt;img src=x> &amp; \\[a\\](b) \\`c\\`"
    assert text.table_cell("smol-magpie_ultra (v1.5) 50%") == "smol-magpie_ultra (v1.5) 50%"
