"""The teacher as the stages see it: `ask` returns what is on disk and asks for the rest; a plan only counts.

Used by generate_constitutional.py.
"""

import datetime
from collections import Counter

from tqdm import tqdm

from sft.generation import batches, providers
from sft.generation.records import STAGES, StageFile

SERVERS = {"anthropic": providers.Live, "openai": providers.Live, "anthropic-batches": batches.Batches}


class Stopped(Exception):
    """The run ends in order; the same command continues. The message says why."""


def prices(args, provider=None):
    """Return (price of a million tokens in, price of a million tokens out), or None if they are unknown.

    provider: one of SERVERS instead of PROVIDER.
    """
    if not args["PRICES_LOOKED_UP"]:
        return None
    rate = SERVERS[provider or args["PROVIDER"]].rate
    return args["PRICE_INPUT"] * rate, args["PRICE_OUTPUT"] * rate


def cost(tokens, prices):
    """Return the money for (tokens in, tokens out), or None without prices."""
    return None if prices is None else (tokens[0] * prices[0] + tokens[1] * prices[1]) / 1e6


def remedy(reason):
    """Return what helps against this reason for no answer, or ""."""
    if "timed out" not in reason:
        return ""
    return " A server that works off one request after the other needs --concurrency 1 or more --timeout-seconds."


class Files:
    """The StageFile of each stage in `folder`."""

    def __init__(self, folder, args, writes=True):
        self.stages = {stage: StageFile(folder / f"{stage}.jsonl", args["RETRY_ERRORS"], writes) for stage in STAGES}

    def ledger(self):
        """Return {stage: Counter of calls, errors, lost, input_tokens, output_tokens, cost, unpriced}."""
        lines = {}
        for stage, file in self.stages.items():
            lines[stage] = file.ledger + Counter(errors=len(file.errors), lost=file.lost)
        return lines

    def lost_tokens(self):
        """Return [tokens in, tokens out] that requests without a known end cost at most."""
        return [sum(file.lost_tokens[side] for file in self.stages.values()) for side in (0, 1)]

    def close(self):
        """Close the files."""
        for file in self.stages.values():
            file.close()


class Planner:
    """Answers from the disk and, where an answer is missing, with a text of the expected length. Counts both."""

    def __init__(self, files):
        self.files = files
        self.used, self.missing = {stage: set() for stage in STAGES}, {stage: {} for stage in STAGES}

    def ask(self, calls, name):
        """Return a record per Call. name: of the step, which a plan doesn't show."""
        records = []
        for call in calls:
            file = self.files.stages[call.stage]
            if call.key in file.errors:
                records.append(None)
            elif call.key in file.answers:
                self.used[call.stage].add(call.key)
                records.append(file.answers[call.key])
            else:
                self.missing[call.stage][call.key] = call.expected_tokens
                stand_in = {"text": call.expected, "stop_reason": "end_turn", "model": call.model, "date": ""}
                records.append(stand_in)
        return records

    @property
    def complete(self):
        """Whether nothing is missing so far."""
        return not any(self.missing.values())

    def unused(self):
        """Return the number of paid answers on disk that no call of this plan asks for."""
        return sum(len(file.answers.keys() - self.used[stage]) for stage, file in self.files.stages.items())


class Teacher:
    """Answers from the disk, and from the provider where an answer is missing; every answer is on disk before use."""

    def __init__(self, files, folder, args):
        self.files, self.args, self.prices = files, args, prices(args)
        self.journal = batches.Journal(folder / "batches.jsonl")
        kind = SERVERS[args["PROVIDER"]]
        self.server = kind(args, self.journal) if kind is batches.Batches else kind(args)
        self.tokens = Counter()  # of this run

    def unsettled(self):
        """Return the money that lost requests and the batches still out cost at most."""
        out = cost(self.journal.tokens_out(), prices(self.args, "anthropic-batches")) or 0
        return out + (cost(self.files.lost_tokens(), self.prices) or 0)

    def spent(self):
        """Return the money of all answers on disk, and what is unsettled."""
        return sum(file.ledger["cost"] for file in self.files.stages.values()) + self.unsettled()

    def afford(self, calls):
        """Return whether MAX_COST allows the `calls` at the most they can cost, besides what is spent."""
        if not self.args["MAX_COST"]:
            return True
        most = sum(cost(call.most_tokens, self.prices) for call in calls)
        if self.spent() + most <= self.args["MAX_COST"]:
            return True
        self.too_dear = True
        return False

    def ask(self, calls, name):
        """Return the record of each Call, None where the teacher refused it. name: of the step, for the bar.

        Raises: Stopped if some have no answer: the money is spent, or the teacher doesn't answer.
        """
        if not calls:
            return []
        file, self.too_dear = self.files.stages[calls[0].stage], False
        known = file.answers.keys() | file.errors.keys()
        missing = {call.key: call for call in calls if call.key not in known}
        reason = ""
        if missing:
            with tqdm(total=len(missing), desc=name, unit="row", dynamic_ncols=True) as bar:
                reason = self.fetch(list(missing.values()), file, bar)
        left = [key for key in missing if key not in file.answers and key not in file.errors]
        if left and self.too_dear:
            raise Stopped(f"MAX_COST = {self.args['MAX_COST']:g} doesn't cover the next request. Raise it to go on.")
        if left:
            raise Stopped(
                f"The teacher left {len(left):,} requests of the step {name!r} unanswered ({reason}).{remedy(reason)}"
            )
        return [file.answers.get(call.key) for call in calls]

    def fetch(self, calls, file, bar):
        """Ask the provider, and write each outcome as it comes. Returns: why the last one had no answer, or ""."""
        reason, in_a_row = "", 0

        def deliver(call, outcome):
            nonlocal reason, in_a_row
            if isinstance(outcome, providers.Unanswered):
                reason, in_a_row = str(outcome), in_a_row + 1
                file.append({"key": call.key, "unanswered": reason}, durable=False)
                if in_a_row == providers.NO_ANSWER_IN_A_ROW:
                    raise Stopped(
                        f"The teacher did not answer {in_a_row} requests in a row ({reason}).{remedy(reason)}"
                    )
                return
            in_a_row = 0
            if isinstance(outcome, providers.Refused):
                file.append({"key": call.key, "error": str(outcome)})
            else:
                self.write(call, outcome, file)
            bar.update()
            bar.set_postfix_str(self.postfix(), refresh=False)

        self.server.answer(calls, file, self.afford, deliver)
        return reason

    def write(self, call, reply, file):
        """Append the Reply to a Call to its stage's file."""
        tokens = reply.input_tokens, reply.output_tokens
        file.append(
            {
                "key": call.key,
                "text": reply.text,
                "stop_reason": reply.stop_reason,
                "model": reply.model,
                "input_tokens": reply.input_tokens,
                "output_tokens": reply.output_tokens,
                "cost": cost(tokens, self.prices),
                "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            }
        )
        self.tokens.update(input=reply.input_tokens, output=reply.output_tokens)

    def postfix(self):
        """Return tokens and money for the progress bar."""
        text = f"{self.tokens['input']:,} in, {self.tokens['output']:,} out"
        return text if self.prices is None else f"{text}, {self.spent():.2f} spent"
