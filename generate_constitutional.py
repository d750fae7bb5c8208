"""Step 1a: generate the mixture's first source, the conversations in which the model is itself, from a constitution.

Reads   constitution.md: who the model is, its principles, and what it is asked.
Writes  data/constitutional.jsonl, and next to it constitutional-held-out.jsonl; in data/constitutional.work/ every
        answer of the teacher, report.md|png, rejected.jsonl and pairs.jsonl (first answer and revision).

    python generate_constitutional.py --plan-only            calls, tokens and money per stage; asks nothing
    python generate_constitutional.py --examples 40 --held-out 0 --output data/try.jsonl
    python generate_constitutional.py                        the whole source, with ANTHROPIC_API_KEY in the environment
    python generate_constitutional.py --provider openai --base-url http://127.0.0.1:8000/v1 --model NAME
    the same command after a kill                            asks only what has no answer yet

A conversation is asked for, answered, criticised by one principle and revised; with several turns, so is each answer.
An answer is on disk before anything is done with it, so none is paid twice. Where too many conversations are rejected,
the rest is written and the exit status is 1. Whether a provider's terms allow to train
on its model's outputs is for you to check.
"""

import hashlib
import json
import math
from collections import Counter
from pathlib import Path

from sft import settings, system
from sft.generation import checks, constitution, conversations, prompts, report
from sft.generation import teacher as teachers

# ---- Files ----
CONSTITUTION = "constitution.md"  # docs/constitution.md explains its form
OUTPUT = "data/constitutional.jsonl"  # rows to train on; the held-out rows and the answers lie next to it
# ---- Rows ----
EXAMPLES = 10_200  # conversations to write; prepare_data.py takes 10,000 and 100 to validate, and may reject some
HELD_OUT = 200  # further conversations, whose questions are unlike those to train on
SEED = 42  # of what is asked
# ---- Teacher ----
PROVIDER = "anthropic"  # "anthropic" | "anthropic-batches", half the price within a day | "openai", any such endpoint
MODEL = "claude-haiku-4-5"  # as the provider calls it
BASE_URL = ""  # of the endpoint, for "openai" with the /v1; "" = the provider's own
TEMPERATURE = 1.0  # from 0; Anthropic's Messages take none
QUESTIONS_PER_CALL = 5  # from 1; pairs in the category safety
JUDGE_THRESHOLD = 0  # reject conversations graded lower, 1 to 10; 0 = no judge
JUDGE_MODEL = ""  # "" = MODEL
# ---- Requests ----
CONCURRENCY = 8  # requests at once
MAX_RETRIES = 8  # of a request after 429, 5xx, overload or a lost connection
TIMEOUT_SECONDS = 120.0  # for one answer
BATCH_SIZE = 5_000  # requests per batch, up to 100,000
POLL_SECONDS = 60.0  # between two looks at a batch
RETRY_ERRORS = False  # ask again what the teacher has refused
# ---- Money ----
PRICE_INPUT = 0.0  # per million tokens, as you looked it up
PRICE_OUTPUT = 0.0  # per million tokens
PRICES_LOOKED_UP = ""  # the date, such as 2026-11-24; "" = prices are unknown, only tokens are counted
MAX_COST = 0.0  # stop before more than this is spent, over all runs; 0 = no limit
PAY_AGAIN = False  # go on although a changed constitution, template or setting makes paid answers useless
PLAN_ONLY = False  # print the plan and stop

# ==== Constants ====

AT_LEAST = {"EXAMPLES": 1, "HELD_OUT": 0, "QUESTIONS_PER_CALL": 1, "CONCURRENCY": 1, "MAX_RETRIES": 0, "BATCH_SIZE": 1}
AT_LEAST |= {"JUDGE_THRESHOLD": 0, "PRICE_INPUT": 0, "PRICE_OUTPUT": 0, "MAX_COST": 0, "TEMPERATURE": 0, "SEED": 0}
AT_LEAST |= {"TIMEOUT_SECONDS": 0, "POLL_SECONDS": 0}
ABOVE_0 = ("TIMEOUT_SECONDS", "POLL_SECONDS")
SETTINGS_OF_ANSWERS = ("SEED", "MODEL", "TEMPERATURE", "QUESTIONS_PER_CALL", "JUDGE_MODEL")
MAX_ROUNDS = 6  # of asking for more questions where too many conversations were rejected
SAMPLES = 10  # rows to print at the end


# ==== Conversations ====


def goals_of(rules, args):
    """Return {category: conversations wanted}, which add up to EXAMPLES + HELD_OUT."""
    total = args["EXAMPLES"] + args["HELD_OUT"]
    goals = {category.id: int(category.share * total / 100) for category in rules.categories}
    by_remainder = sorted(rules.categories, key=lambda category: -((category.share * total / 100) % 1))
    for category in by_remainder[: total - sum(goals.values())]:
        goals[category.id] += 1
    odd = goals["safety"] % 2  # its rows come in pairs
    goals["safety"] -= odd
    goals["personality"] += odd
    return goals


def ask_questions(teacher, prompt, rules, numbers, args):
    """Return the Items of the first `numbers` {category: asks} asks; near duplicates have a reason."""
    asks = [
        conversations.make_ask(rules, category, index, args)
        for category in rules.categories
        for index in range(numbers[category.id])
    ]
    replies = teacher.ask([prompt.questions(ask) for ask in asks], "questions")
    items = []
    for ask, reply in zip(asks, replies, strict=True):
        if reply:
            items += conversations.make_items(ask, reply["text"], args["SEED"])
    for category in rules.categories:
        alike = [item for item in items if item.category.id == category.id]
        checks.mark_duplicates(alike, "question", lambda item: item.question)
    checks.mark_twins(items)
    return items


def generate(teacher, rules, text, args):
    """Return (all Items, {category: wanted}): rounds of asking until each category has its number of usable ones.

    teacher: Teacher, or a Planner, with which it ends after the first round that isn't all on disk.
    """
    prompt, check, goals = prompts.Prompts(rules, args), checks.Checks(rules, text), goals_of(rules, args)
    per_ask = {name: args["QUESTIONS_PER_CALL"] * (2 if name == "safety" else 1) for name in goals}
    numbers = {name: math.ceil(goal / per_ask[name]) for name, goal in goals.items()}
    planning = isinstance(teacher, teachers.Planner)
    for _ in range(MAX_ROUNDS):
        items = ask_questions(teacher, prompt, rules, numbers, args)
        conversations.converse(items, teacher, prompt, rules, lambda item: check(item) if item.date else "")
        if args["JUDGE_THRESHOLD"]:
            conversations.judge(items, teacher, prompt)
        if planning and not teacher.complete:
            break
        checks.mark_all(items, args["JUDGE_THRESHOLD"])
        kept = Counter(item.category.id for item in items if not item.reason)
        if all(kept[name] >= goal for name, goal in goals.items()):
            break
        for name, goal in goals.items():
            share = max(kept[name] / max(1, numbers[name]), 0.25 * per_ask[name])
            numbers[name] += math.ceil(max(0, goal - kept[name]) / share)
    return items, goals


def choose(items, goals, held_out):
    """Return (Items to train on, held-out Items): the first usable ones of each category, split by family."""
    kept, counts = [], Counter()
    for item in items:
        if not item.reason and counts[item.category.id] < goals[item.category.id]:
            counts[item.category.id] += 1
            kept.append(item)
    checks.find_families(kept)
    sizes = Counter(item.family for item in kept)
    apart, left = set(), held_out
    for family in sorted(sizes, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if sizes[family] <= left:
            apart.add(family)
            left -= sizes[family]
    return [item for item in kept if item.family not in apart], [item for item in kept if item.family in apart]


# ==== Files ====


def row_of(item, args):
    """Return the row of an Item: `messages` and what else is known of it."""
    return {
        "messages": item.messages,
        "id": item.id,
        "category": item.category.id,
        "principle": ",".join(principle.id for principle in item.principles),
        "kind": item.kind,
        "constraint": item.constraint["id"] if item.constraint else "",
        "family": item.family,
        "model": item.model,
        "seed": args["SEED"],
        "date": item.date,
        "score": item.score or 0,
        "score_reason": item.score_reason,
    }


def pairs_of(item):
    """Yield a preference pair for each answer of an Item that was revised."""
    for turn, (draft, answer) in enumerate(zip(item.drafts, item.answers, strict=True)):
        if draft != answer:
            yield {
                "id": item.id,
                "prompt": item.messages[: 2 * turn + 1],
                "chosen": answer,
                "rejected": draft,
                "critique": item.critiques[turn],
                "principle": item.principles[turn].id,
            }


def rejected_of(item):
    """Return the line of rejected.jsonl of an Item."""
    return {"id": item.id, "category": item.category.id, "reason": item.reason, "messages": item.messages}


def write_lines(path, rows):
    """Replace the file `path` by the rows as JSON lines, in one step."""
    system.write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def beside(args, ending):
    """Return the Path of OUTPUT with another ending: ".work", "-held-out.jsonl"."""
    output = Path(args["OUTPUT"])
    return output.with_name(output.stem + ending)


def write_result(items, goals, teacher, work, args):
    """Write the rows, the pairs, the rejected conversations and the report. Raises: SystemExit if rows are missing."""
    train, held_out = choose(items, goals, args["HELD_OUT"])
    kept = train + held_out
    money = report.ledger_lines(teacher.files.ledger(), teacher.journal, teacher.unsettled(), teacher.prices)
    text = report.markdown(items, kept, goals, money, len(held_out))
    write_lines(work / "rejected.jsonl", [rejected_of(item) for item in items if item.reason])
    write_lines(work / "pairs.jsonl", [pair for item in kept for pair in pairs_of(item)])
    system.write_whole(work / "report.md", text)
    report.draw(items, kept, work / "report.png")
    if args["HELD_OUT"]:
        write_lines(beside(args, "-held-out.jsonl"), [row_of(item, args) for item in held_out])
    write_lines(args["OUTPUT"], [row_of(item, args) for item in train])
    print(report.sample(train, SAMPLES))
    print(f"\n{text}")
    print(f"written: {len(train):,} rows in {args['OUTPUT']}, {len(held_out):,} held out; what was rejected in {work}")
    wanted = sum(goals.values())
    if len(kept) < wanted:
        raise SystemExit(
            f"{wanted - len(kept):,} of {wanted:,} rows are missing after {MAX_ROUNDS} rounds of asking; the rest is "
            f"written. {work}/report.md says why conversations were rejected. Ask for fewer --examples, or name "
            "another --model or --constitution with a new --output."
        )


# ==== Main ====


def validate_settings(args):
    """Raise SystemExit with a sentence for a value that no run can have. args: dict of all settings."""
    settings.check_bounds(args, {"PROVIDER": teachers.SERVERS}, AT_LEAST)
    for name in ABOVE_0:
        if not args[name] > 0:
            raise SystemExit(f"{name} is {args[name]}; it must be above 0.")
    if args["MAX_COST"] and not args["PRICES_LOOKED_UP"]:
        raise SystemExit("MAX_COST needs prices. Look them up and set PRICE_INPUT, PRICE_OUTPUT and PRICES_LOOKED_UP.")
    if (args["PRICE_INPUT"] or args["PRICE_OUTPUT"]) and not args["PRICES_LOOKED_UP"]:
        raise SystemExit("PRICES_LOOKED_UP is missing. Set it to the date on which you looked up the prices.")
    if Path(args["OUTPUT"]).suffix != ".jsonl":
        raise SystemExit(f"OUTPUT is {args['OUTPUT']!r}; it must end in .jsonl.")


def determines_answers(args, rules):
    """Return {name: value} of what the answers depend on, to be compared with an earlier run's."""
    values = {name: args[name] for name in SETTINGS_OF_ANSWERS}
    values["constitution"] = hashlib.sha256(repr(rules).encode()).hexdigest()[:16]
    values["templates"] = system.sha256(prompts.__file__)[:16]
    return values


def print_plan(planner, args):
    """Print calls, tokens and money of each stage."""
    prices = teachers.prices(args)
    print(report.plan_table(planner, lambda tokens: teachers.cost(tokens, prices)))
    print("Tokens are estimates: 4 characters each, answers as long as their formats, every answer revised.")
    print("Conversations that the checks reject are replaced, which comes on top.")
    if prices is None:
        print("Prices are unknown: set PRICE_INPUT, PRICE_OUTPUT and PRICES_LOOKED_UP.")
    else:
        half = ", at the half price of batches" if teachers.SERVERS[args["PROVIDER"]].rate < 1 else ""
        print(f"Prices as looked up {args['PRICES_LOOKED_UP']}{half}.")


def refuse_useless(planner, work, current, args):
    """Raise SystemExit if something changed so that answers which were paid for would be paid for again."""
    path = work / "inputs.json"
    before = system.read_json(path, "generate_constitutional.py") if path.exists() else current
    changes, useless = system.differences(before, current), planner.unused()
    if changes and useless and not planner.complete and not args["PAY_AGAIN"]:
        raise SystemExit(
            f"{useless:,} paid answers don't fit any longer ({'; '.join(changes)}). The plan above says what the new "
            "ones cost. Undo the change, name another --output, or add --pay-again."
        )
    if args["PAY_AGAIN"] or not changes or not useless:
        system.write_whole(path, json.dumps(current, indent=1) + "\n")


def plan(rules, text, files, args):
    """Return the Planner after it has gone through all stages."""
    planner = teachers.Planner(files)
    generate(planner, rules, text, args)
    return planner


def run(rules, text, work, args):
    """Ask for what is missing and write the result."""
    files = teachers.Files(work, args)
    try:
        for stage, file in files.stages.items():
            if file.torn or file.damaged:
                print(f"{stage}: a torn line of {file.torn} bytes and {file.damaged} damaged lines are asked again")
        planner = plan(rules, text, files, args)
        print_plan(planner, args)
        refuse_useless(planner, work, determines_answers(args, rules), args)
        teacher = teachers.Teacher(files, work, args)
        items, goals = generate(teacher, rules, text, args)
        write_result(items, goals, teacher, work, args)
    finally:
        files.close()


def main(args):
    """Generate the conversations, or plan them, as the settings `args` (dict) say."""
    validate_settings(args)
    rules = constitution.read(args["CONSTITUTION"])
    text = Path(args["CONSTITUTION"]).read_text(encoding="utf-8")
    work = beside(args, ".work")
    if args["PLAN_ONLY"]:
        print_plan(plan(rules, text, teachers.Files(work, args, writes=False), args), args)
        return
    later = f"Every answer so far is in {work}; the same command continues."
    try:
        work.mkdir(parents=True, exist_ok=True)
        with system.lock(work, "--output"):
            run(rules, text, work, args)
    except teachers.Stopped as error:
        raise SystemExit(f"{error} {later}") from None
    except OSError as error:
        raise SystemExit(f"{work} cannot be written ({error}). Free disk space. {later}") from None
    except KeyboardInterrupt:
        raise SystemExit(f"Stopped. {later}") from None


if __name__ == "__main__":
    main(settings.from_flags(globals()))
