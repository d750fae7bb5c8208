"""Anthropic's Message Batches: half the price, answers within a day.

batches.jsonl in the run's folder says what was submitted. Its lines are

    {"batch": n, "keys": [...], "time": ..., "most": [input tokens, output tokens]}
                                                before a batch is created: what it will ask, and cost at most
    {"batch": n, "id": ...}                     its id, before anything waits for it
    {"batch": n, "done": true}                  all of its answers are in the stages' files

A line without an id is what a crash leaves while a batch is created. Such a batch is looked for among the account's: it
is the one of that size, created since, whose results have these keys. Only if there is none, it is submitted again.
"""

import dataclasses
import json
import time

from tqdm import tqdm

from sft import system
from sft.generation import providers
from sft.generation.providers import Refused, Unanswered
from sft.generation.records import parse_lines

ROUNDS = 4  # a request that expires or fails is asked again in so many batches in all
CLOCK_SKEW_SECONDS = 3600  # between this machine and the server


class Journal:
    """The batches of a run: {number: {"keys", "time", "id", "done"}}, and the file behind them."""

    def __init__(self, path):
        self.batches = {}
        for line in parse_lines(path):
            if type(line.get("batch")) is int:
                self.batches.setdefault(line["batch"], {}).update(line)
        self.path = path

    def write(self, number, **fields):
        """Append a line about a batch and wait until it is on the disk."""
        self.batches.setdefault(number, {"batch": number}).update(fields)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"batch": number, **fields}) + "\n")
        system.durable(self.path)

    def open_batches(self):
        """Return the numbers of the batches whose answers are still to be fetched."""
        return [number for number, batch in self.batches.items() if not batch.get("done") and batch.get("keys")]

    def tokens_out(self):
        """Return [tokens in, tokens out] that the batches whose answers are still to be fetched cost at most."""
        most = [self.batches[number].get("most", (0, 0)) for number in self.open_batches()]
        return [sum(tokens[side] for tokens in most) for side in (0, 1)]


@dataclasses.dataclass(frozen=True)
class Unasked:
    """Stands for the Call of an answer that this run didn't ask for; an earlier one, of more rows, has paid it."""

    key: str


class Batches:
    """Asks in batches of BATCH_SIZE requests."""

    rate = 0.5  # of the price

    def __init__(self, args, journal):
        import anthropic

        self.sdk = anthropic
        self.key, self.args = providers.api_key(args["PROVIDER"], args["BASE_URL"]), args
        self.client = providers.anthropic_client(args, self.key)
        self.api = self.client.messages.batches
        self.create_once = self.client.with_options(max_retries=0).messages.batches.create
        self.journal = journal

    def answer(self, calls, stage_file, afford, deliver):
        """Ask for the answers to `calls` and deliver(call, Reply, Refused or Unanswered); see providers.Live."""
        waiting = {call.key: call for call in calls}
        last = {}  # key -> why it has no answer

        def take(key, outcome):
            if isinstance(outcome, Unanswered):
                last[key] = outcome
            elif key in waiting:
                deliver(waiting.pop(key), outcome)
            elif not isinstance(outcome, Refused) and key not in stage_file.answers:
                deliver(Unasked(key), outcome)

        for number in self.journal.open_batches():
            if waiting.keys() & self.journal.batches[number]["keys"]:
                self.fetch(number, take)
        for _ in range(ROUNDS):
            submitted = self.submit(list(waiting.values()), afford)
            for number in submitted:
                self.fetch(number, take)
            if not waiting or not submitted:
                break
        for key, call in waiting.items():
            if key in last:
                deliver(call, last[key])

    # ---- Submitting ----

    def submit(self, calls, afford):
        """Create batches for `calls`, as far as the budget reaches. Returns: their numbers."""
        numbers, sent = [], 0
        while sent < len(calls):
            size = min(self.args["BATCH_SIZE"], len(calls) - sent)
            while size and not afford(calls[sent : sent + size]):  # the batches before it count as spent
                size //= 2
            if not size:
                break
            part = calls[sent : sent + size]
            number = len(self.journal.batches)
            most = [sum(call.most_tokens[side] for call in part) for side in (0, 1)]
            self.journal.write(number, keys=[call.key for call in part], time=time.time(), most=most)
            requests = [{"custom_id": call.key, "params": providers.anthropic_request(call)} for call in part]
            self.create(number, requests)
            numbers.append(number)
            sent += size
        return numbers

    def create(self, number, requests):
        """Create a batch and write its id. After an error that leaves open whether it exists, look for it first."""
        for attempt in range(self.args["MAX_RETRIES"] + 1):
            try:
                self.journal.write(number, id=self.create_once(requests=requests).id)
                return
            except self.sdk.RateLimitError as error:
                wait_after(error, attempt)
            except self.sdk.AnthropicError as error:
                self.refuse_for_good(number, error)
                wait_after(error, attempt)
                if self.find(number):
                    return
        self.journal.write(number, done=True)  # nothing was created
        raise SystemExit(
            "The teacher accepts no batch: it is overloaded or can't be reached. What was answered is kept; run the "
            "same command later."
        )

    def refuse_for_good(self, number, error):
        """Raise SystemExit if the error says that the batch was not and will not be created."""
        try:
            providers.translate(error, self.key)
        except Unanswered:
            return
        except Refused as refusal:
            self.journal.write(number, done=True)
            raise SystemExit(f"The teacher refuses the batch ({refusal}). Lower --batch-size.") from None
        except SystemExit:
            self.journal.write(number, done=True)
            raise

    def find(self, number):
        """Find the batch that was perhaps created for the journal's line, and write its id. Returns: whether it exists.

        The list of batches doesn't say which requests one has, its results do; so a candidate has to end first.
        """
        batch, known = self.journal.batches[number], {other.get("id") for other in self.journal.batches.values()}
        for candidate in self.api.list(limit=100):
            created = candidate.created_at.timestamp()
            if created < batch["time"] - CLOCK_SKEW_SECONDS:
                break  # newest first
            size = sum(getattr(candidate.request_counts, kind) for kind in type(candidate.request_counts).model_fields)
            if candidate.id in known or size != len(batch["keys"]):
                continue
            self.wait_for_end(candidate.id)
            if {entry.custom_id for entry in self.api.results(candidate.id)} == set(batch["keys"]):
                self.journal.write(number, id=candidate.id)
                return True
        return False

    # ---- Fetching ----

    def fetch(self, number, take):
        """Wait for a batch, take(key, outcome) each of its results in whatever order, and write that it is done."""
        batch = self.journal.batches[number]
        try:
            if not batch.get("id") and not self.find(number):
                self.journal.write(number, done=True)  # it was never created
                return
            self.wait_for_end(batch["id"])
            self.read_results(batch, take)
        except self.sdk.AnthropicError as error:
            if isinstance(error, self.sdk.NotFoundError):
                self.journal.write(number, done=True)
                return
            providers.translate(error, self.key)
        self.journal.write(number, done=True)

    def wait_for_end(self, batch_id):
        """Poll until the batch has ended."""
        first = True
        while True:
            batch = self.api.retrieve(batch_id)
            if batch.processing_status == "ended":
                return
            if first:
                tqdm.write(f"batch {batch_id}: waiting; Ctrl-C is safe, the same command finds it again")
                first = False
            time.sleep(self.args["POLL_SECONDS"])

    def read_results(self, batch, take):
        """take(key, outcome) each result of a batch; a result of an unknown key, or a second one, is left out."""
        unseen = set(batch["keys"])
        for attempt in range(providers.MALFORMED_ATTEMPTS):
            try:
                for entry in self.api.results(batch["id"]):
                    if entry.custom_id in unseen:
                        unseen.remove(entry.custom_id)
                        take(entry.custom_id, self.outcome(entry.result))
                break
            except ValueError as error:  # a line that is no JSON; what came before it is taken
                if attempt + 1 == providers.MALFORMED_ATTEMPTS:
                    tqdm.write(f"batch {batch['id']}: its results end with a damaged line ({error})")
        for key in unseen:
            take(key, Unanswered("the batch has no result for it"))

    def outcome(self, result):
        """Return what became of a request: Reply, Refused, or Unanswered if it is worth another try."""
        if result.type == "succeeded":
            try:
                return providers.read_anthropic(result.message)
            except ValueError as error:
                return Unanswered(str(error))
        if result.type == "errored" and result.error.error.type == "invalid_request_error":
            return Refused(providers.without_key(result.error.error.message, self.key))
        return Unanswered(f"the batch says {result.type}")


def wait_after(error, attempt):
    """Sleep as long as the server asks for, or else longer after each attempt."""
    response = getattr(error, "response", None)
    try:
        seconds = float(response.headers["retry-after"])
    except (AttributeError, KeyError, ValueError):
        seconds = min(60, 0.5 * 2**attempt)
    time.sleep(seconds)
