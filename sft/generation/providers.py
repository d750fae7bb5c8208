"""Who serves the teacher: Anthropic's Messages, or any endpoint that speaks OpenAI's chat completions.

The official clients retry 408, 409, 429, 5xx and lost connections with backoff and obey retry-after; what is here says
what an error means once they give up. Keys come from the environment and are never written. batches.py has the
Message Batches.
"""

import contextlib
import dataclasses
import functools
import os
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait

KEYS = {"anthropic": "ANTHROPIC_API_KEY", "anthropic-batches": "ANTHROPIC_API_KEY", "openai": "OPENAI_API_KEY"}
MALFORMED_ATTEMPTS = 3  # an answer that is no answer is asked again this often in all
NO_ANSWER_IN_A_ROW = 10  # then the run stops: the teacher is not there


@dataclasses.dataclass(frozen=True)
class Reply:
    """The teacher's answer, as returned."""

    text: str
    stop_reason: str
    model: str
    input_tokens: int
    output_tokens: int


class Refused(Exception):
    """The teacher will never answer this request."""


class Unanswered(Exception):
    """The teacher did not answer this time, after all retries. Nothing was paid."""


def api_key(provider, base_url):
    """Return the key from the environment. A server of your own needs none. Raises: SystemExit if it is missing."""
    key = os.environ.get(KEYS[provider], "")
    if not key and not base_url:
        raise SystemExit(f"The environment has no {KEYS[provider]}. Set it, or name a server with --base-url.")
    return key or "none"


def without_key(error, key):
    """Return an error's text in one line, never with the key in it."""
    text = " ".join(str(error).split())[:300]
    return text.replace(key, "[key]") if len(key) > 4 else text


def translate(error, key):
    """Raise what an error of a client means for the run: Refused, Unanswered, or SystemExit if no request can work."""
    text, status = without_key(error, key), getattr(error, "status_code", None)
    if status in (401, 402, 403, 404) or "credit balance" in text or "insufficient_quota" in text:
        raise SystemExit(
            f"The teacher refuses every request ({text}). Correct the key, --model or --base-url; what was answered is "
            "kept, and the same command continues."
        ) from None
    if status is not None and 400 <= status < 500 and status not in (408, 409, 429):
        raise Refused(text) from None
    raise Unanswered(text) from None


def read_anthropic(message):
    """Return the Reply in an Anthropic message. Raises: ValueError if it lacks something."""
    try:
        usage = message.usage
        cached = (usage.cache_creation_input_tokens or 0) + (usage.cache_read_input_tokens or 0)
        text = "".join(block.text for block in message.content if block.type == "text")
        reply = Reply(text, message.stop_reason, message.model, usage.input_tokens + cached, usage.output_tokens)
    except (AttributeError, TypeError) as error:
        raise ValueError(f"the answer has not the form of a message ({error})") from None
    return checked(reply)


def read_openai(completion):
    """Return the Reply in an OpenAI chat completion. Raises: ValueError if it lacks something."""
    try:
        choice, usage = completion.choices[0], completion.usage
        tokens = usage.prompt_tokens, usage.completion_tokens
        reply = Reply(choice.message.content or "", choice.finish_reason, completion.model, *tokens)
    except (AttributeError, TypeError, IndexError) as error:
        raise ValueError(f"the answer has not the form of a chat completion ({error})") from None
    return checked(reply)


def checked(reply):
    """Return the Reply if its fields have the right types. Raises: ValueError."""
    texts, numbers = (reply.text, reply.stop_reason, reply.model), (reply.input_tokens, reply.output_tokens)
    if not all(isinstance(text, str) for text in texts) or not all(type(number) is int for number in numbers):
        raise ValueError("the answer lacks its text, its end, its model or its number of tokens")
    reply.text.encode()  # a lone surrogate raises UnicodeEncodeError, a ValueError
    return reply


def anthropic_request(call):
    """Return the parameters of a Call for Anthropic's Messages, which take no temperature and no seed."""
    return {"model": call.model, "max_tokens": call.max_tokens, "system": call.system, "messages": call.messages}


def openai_request(call, limit="max_tokens"):
    """Return the parameters of a Call for chat completions.

    limit: how the endpoint calls the most tokens of an answer. OpenAI's own calls it max_completion_tokens, and its
    reasoning models refuse the old name; most other servers know only that. The seed is the request's own: with one
    for all, a server that samples by it draws the same numbers for each, and answers resemble each other.
    """
    return {
        "model": call.model,
        limit: call.max_tokens,
        "temperature": call.temperature,
        "seed": int(call.key[:7], 16),
        "messages": [{"role": "system", "content": call.system}, *call.messages],
    }


def anthropic_client(args, key):
    """Return the official client for Anthropic."""
    import anthropic

    return anthropic.Anthropic(
        api_key=key, base_url=args["BASE_URL"] or None, max_retries=args["MAX_RETRIES"], timeout=args["TIMEOUT_SECONDS"]
    )


class Live:
    """Asks one request at a time, CONCURRENCY of them at once."""

    rate = 1.0  # of the price

    def __init__(self, args):
        self.key, self.concurrency = api_key(args["PROVIDER"], args["BASE_URL"]), args["CONCURRENCY"]
        if args["PROVIDER"] == "openai":
            import openai

            limit = "max_tokens" if args["BASE_URL"] else "max_completion_tokens"
            self.sdk_error, self.read = openai.OpenAIError, read_openai
            self.request = functools.partial(openai_request, limit=limit)
            self.create = openai.OpenAI(
                api_key=self.key,
                base_url=args["BASE_URL"] or None,
                max_retries=args["MAX_RETRIES"],
                timeout=args["TIMEOUT_SECONDS"],
            ).chat.completions.create
        else:
            import anthropic

            self.sdk_error, self.request, self.read = anthropic.AnthropicError, anthropic_request, read_anthropic
            self.create = anthropic_client(args, self.key).messages.create

    def ask(self, call):
        """Return the Reply to a Call. Raises: Refused, Unanswered, SystemExit."""
        for attempt in range(1, MALFORMED_ATTEMPTS + 1):
            try:
                return self.read(self.create(**self.request(call)))
            except self.sdk_error as error:
                translate(error, self.key)
            except ValueError as error:
                if attempt == MALFORMED_ATTEMPTS:
                    raise Unanswered(without_key(error, self.key)) from None

    def answer(self, calls, stage_file, afford, deliver):
        """Ask for the answers to `calls` and deliver(call, Reply, Refused or Unanswered) each as it comes.

        stage_file: records what is sent. afford(running): whether the budget allows the calls `running`; when not, no
        more are sent. An exception, such as Ctrl-C, first delivers what is in flight, because it is paid.
        """
        waiting, running = list(reversed(calls)), {}
        with ThreadPoolExecutor(self.concurrency) as pool:
            try:
                while running or waiting:
                    while waiting and len(running) < self.concurrency:
                        if not afford([*running.values(), waiting[-1]]):
                            waiting.clear()
                            break
                        call = waiting.pop()
                        stage_file.append({"key": call.key, "sent": list(call.most_tokens)}, durable=False)
                        running[pool.submit(self.ask, call)] = call
                    done, _ = wait(running, return_when=FIRST_COMPLETED)
                    for future in done:
                        settle(future, running.pop(future), deliver)
            except BaseException:
                for future, call in running.items():
                    with contextlib.suppress(Exception, SystemExit):
                        settle(future, call, deliver)
                raise


def settle(future, call, deliver):
    """Deliver what became of a call."""
    try:
        outcome = future.result()
    except (Refused, Unanswered) as error:
        outcome = error
    deliver(call, outcome)
