"""The constitution: a Markdown file that a person writes, read into a Constitution. docs/constitution.md has its form.

    # Title                             what stands before the first ## is for readers of the file
    ## Who                              "- name: ...", "- maker: ...", "- language: en", then the manner in prose
    ## Principles                       "### id: title", then prose
    ## Askers                           a list: who might ask
    ## Categories                       "### reasoning: 30%", prose, "Topics:" with a list, "Formats:" with a list

Used by generate_constitutional.py.
"""

import dataclasses
import re
from pathlib import Path

SECTIONS = ("Who", "Principles", "Askers", "Categories")
CATEGORIES = ("reasoning", "safety", "personality", "instruction_following")
FIELDS = ("name", "maker", "language")
FORMAT = re.compile(r"([1-3]) turns?, (\d+) to (\d+) words(, think)?")


@dataclasses.dataclass(frozen=True)
class Format:
    """The form of a conversation: its turns, the words of an answer, and whether answers begin with a <think> block."""

    turns: int
    least_words: int
    most_words: int
    think: bool


@dataclasses.dataclass(frozen=True)
class Principle:
    """A rule that answers are held against; `id` names it in the rows."""

    id: str
    title: str
    text: str


@dataclasses.dataclass(frozen=True)
class Category:
    """A kind of conversation. share: of all rows, in percent; topics: list of str; formats: list of Format."""

    id: str
    share: float
    text: str
    topics: list
    formats: list


@dataclasses.dataclass(frozen=True)
class Constitution:
    """Who the model is, what it holds to, who asks (list of str) and about what."""

    name: str
    maker: str
    language: str
    manner: str
    principles: list
    askers: list
    categories: list


class Line(str):
    """A line of the file that knows its number."""

    number = 0


def numbered(text):
    """Return the lines of `text` without white space at their ends, each with its number, from 1."""
    lines = []
    for number, content in enumerate(text.split("\n"), start=1):
        line = Line(content.strip())
        line.number = number
        lines.append(line)
    return lines


def wrong(line, sentence):
    """Return the ValueError that says what is wrong with a Line."""
    return ValueError(f"line {line.number}: {sentence}")


def split_at(lines, marker):
    """Return (lines before the first heading with `marker`, such as "## ", list of (heading, its title, its lines))."""
    before, parts = [], []
    for line in lines:
        if line.startswith(marker):
            parts.append((line, line[len(marker) :].strip(), []))
        elif parts:
            parts[-1][2].append(line)
        else:
            before.append(line)
    return before, parts


def prose(lines):
    """Return the lines as text: paragraphs of one line each."""
    paragraphs = "\n".join(lines).strip().split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs if paragraph.strip())


def items(heading, lines):
    """Return the entries of a list as Lines; a line that begins otherwise continues the entry before it."""
    found = []
    for line in filter(None, lines):
        if line.startswith("- ") and line[2:].strip():
            entry = Line(line[2:].strip())
        elif found and not line.startswith(("-", "#")):
            entry = Line(f"{found.pop()} {line}")
        else:
            raise wrong(line, f'{line!r} is no entry of a list. Begin it with "- ".')
        entry.number = line.number
        found.append(entry)
    if not found:
        raise wrong(heading, 'the list below is empty. Add an entry that begins with "- ".')
    seen = set()
    for entry in found:
        if entry in seen:
            raise wrong(entry, f"{str(entry)!r} stands there twice. Remove one.")
        seen.add(entry)
    return found


def read_who(heading, lines):
    """Return the fields of the section "Who": name, maker, language, manner."""
    fields, rest = {}, []
    for line in lines:
        match = re.fullmatch(r"- (\w+): (.+)", line)
        if match and match[1] not in FIELDS:
            raise wrong(line, f"{match[1]!r} is unknown. Known are {', '.join(FIELDS)}.")
        if match:
            fields[match[1]] = match[2]
        else:
            rest.append(line)
    fields["manner"] = prose(rest)
    for name in (*FIELDS, "manner"):
        if not fields.get(name):
            how = "a paragraph on its manner" if name == "manner" else f'"- {name}: ..."'
            raise wrong(heading, f"{name} is missing. Add {how}.")
    if not re.fullmatch(r"[a-z]{2}", fields["language"]):
        raise wrong(heading, f"language is {fields['language']!r}; it must be a code of two letters, such as en.")
    return fields


def read_principles(heading, lines):
    """Return the list of Principle of the section "Principles"."""
    before, parts = split_at(lines, "### ")
    for line in filter(None, before):
        raise wrong(line, 'text before the first principle. Begin a principle with "### id: title".')
    principles = []
    for line, title, body in parts:
        match = re.fullmatch(r"([a-z][a-z0-9_-]*): (.+)", title)
        if not match:
            raise wrong(
                line, f'{title!r} is no heading of a principle. Write "### id: title", the id in small letters.'
            )
        if match[1] in [principle.id for principle in principles]:
            raise wrong(line, f"a second principle has the id {match[1]!r}. Choose another.")
        text = prose(body)
        if not text:
            raise wrong(line, f"the principle {match[1]!r} has no text. Write below its heading what it asks for.")
        principles.append(Principle(match[1], match[2], text))
    if not principles:
        raise wrong(heading, 'there is no principle. Add "### id: title" and a paragraph.')
    return principles


def read_format(entry):
    """Return the Format of a list entry such as "2 turns, 40 to 120 words, think"."""
    match = FORMAT.fullmatch(entry)
    if not match:
        raise wrong(entry, f'{str(entry)!r} is no format. Write "1 turn, 40 to 120 words", if need be with ", think".')
    least, most = int(match[2]), int(match[3])
    if not 1 <= least <= most <= 2000:
        raise wrong(entry, f"{least} to {most} words: the numbers must rise and lie between 1 and 2000.")
    return Format(int(match[1]), least, most, bool(match[4]))


def read_category(line, title, lines):
    """Return the Category below the heading `line`."""
    match = re.fullmatch(r"(\w+): (\d+(?:\.\d+)?) ?%", title)
    if not match or match[1] not in CATEGORIES:
        raise wrong(line, f'{title!r} must be one of {", ".join(CATEGORIES)} with its share: "### reasoning: 30%".')
    parts = {"text": [], "Topics:": [], "Formats:": []}
    headings, current = {"Topics:": line, "Formats:": line}, "text"
    for entry in lines:
        if entry in headings:
            headings[entry], current = entry, str(entry)
        else:
            parts[current].append(entry)
    text = prose(parts["text"])
    if not text:
        raise wrong(line, f"{match[1]} has no text. Write below its heading what it is about.")
    for name in headings:
        if not any(parts[name]):
            raise wrong(headings[name], f'{match[1]} has no "{name}" with a list. Add it.')
    topics = [str(entry) for entry in items(headings["Topics:"], parts["Topics:"])]
    formats = [read_format(entry) for entry in items(headings["Formats:"], parts["Formats:"])]
    return Category(match[1], float(match[2]), text, topics, formats)


def read_categories(heading, lines):
    """Return the list of Category of the section "Categories": each of CATEGORIES once, 100% in all."""
    _, parts = split_at(lines, "### ")
    categories = []
    for line, title, body in parts:
        category = read_category(line, title, body)
        if category.id in [other.id for other in categories]:
            raise wrong(line, f"{category.id} stands there twice. Remove one.")
        categories.append(category)
    missing = set(CATEGORIES) - {category.id for category in categories}
    if missing:
        raise wrong(heading, f"{sorted(missing)[0]} is missing. Its share may be 0%.")
    total = sum(category.share for category in categories)
    if abs(total - 100) > 0.01:
        raise wrong(heading, f"the shares of the categories add up to {total:g}%. Make it 100%.")
    return categories


def parse(text):
    """Return the Constitution that the Markdown `text` describes. Raises: ValueError with the line and the remedy."""
    lines = numbered(text)
    _, parts = split_at(lines, "## ")
    sections = {}
    for line, title, body in parts:
        if title not in SECTIONS:
            raise wrong(line, f"the section {title!r} is unknown. Known are {', '.join(SECTIONS)}.")
        if title in sections:
            raise wrong(line, f"the section {title!r} stands there twice. Join them.")
        sections[title] = line, body
    for title in SECTIONS:
        if title not in sections:
            raise wrong(lines[-1], f'the file ends without a section "## {title}". Add it.')
    return Constitution(
        **read_who(*sections["Who"]),
        principles=read_principles(*sections["Principles"]),
        askers=[str(entry) for entry in items(*sections["Askers"])],
        categories=read_categories(*sections["Categories"]),
    )


def read(path):
    """Return the Constitution in the file `path`. Raises: SystemExit with the line and the remedy."""
    try:
        return parse(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise SystemExit(f"{path} cannot be read ({error}). Name the constitution with --constitution.") from None
    except ValueError as error:
        raise SystemExit(f"{path}, {error}") from None
