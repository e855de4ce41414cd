"""The one HTTP client for language models behind an OpenAI-compatible endpoint: chat completions, retried, cached and accounted for.

Flow of a request: its digest is looked up in the cache on disk; else it is posted, and on a failure that may pass (429, 5xx, a timeout, a broken
connection, an answer that is no completion) posted again, after a wait that doubles, is jittered from a seed, and is at least what Retry-After asks
for. A whole answer is stored and its tokens, seconds and price go to a log. Several requests run in threads, at most `concurrency` at once. The
standard library's client serves: one request is one connection, which costs nothing beside a model's answer, and no dependency is added for it.

The key is read from an environment variable when a request is made. It is in no file, no message and no log; redirects, which would carry it to
another host, are refused.
"""

from __future__ import annotations

import dataclasses
import datetime
import email.utils
import hashlib
import http.client
import json
import os
import pathlib
import random
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rlhf_jax.errors import UserError

PASSING = (408, 409, 425, 429)  # statuses that may pass, beside 5xx
LARGEST = 16 << 20  # bytes of an answer that are read
Message = Mapping[str, str]


class EndpointError(RuntimeError):
    """A request that got no answer: refused, or tried as often as allowed."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Where requests go and how often."""

    url: str  # up to and with /v1
    model: str
    key_env: str = ""  # environment variable with the key; "" = none is sent
    timeout: float = 60.0  # seconds that the endpoint may be silent
    retries: int = 5  # beyond the first attempt
    backoff: float = 0.5  # seconds before the first retry; doubled each time
    longest_wait: float = 60.0  # seconds between two attempts, Retry-After included
    concurrency: int = 8  # requests at once
    cache: str = ""  # folder; "" = none
    log: str = ""  # .jsonl file of what was used; "" = none
    price_in: float = 0.0  # per million tokens of the prompt, in any currency
    price_out: float = 0.0  # per million tokens of the answer
    seed: int = 0  # of the jitter

    def __post_init__(self) -> None:
        parts = urllib.parse.urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"url = {self.url!r}: must be like 'http://localhost:8000/v1'")
        if parts.username or parts.password or parts.query:
            raise ValueError("url holds a user, a password or a query: put a secret into the environment variable that key_env names")
        if not self.model:
            raise ValueError("model = '': must name the model that the endpoint serves")
        lowest = {"timeout": 1e-3, "retries": 0, "backoff": 0, "longest_wait": 0, "concurrency": 1, "price_in": 0, "price_out": 0}
        for name, low in lowest.items():
            if not getattr(self, name) >= low:
                raise ValueError(f"{name} = {getattr(self, name)!r}: must be at least {low}")


@dataclasses.dataclass(frozen=True)
class Answer:
    """A completion."""

    text: str
    finish: str  # stop, length …, as the endpoint says
    prompt_tokens: int
    completion_tokens: int
    cached: bool


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


class _Passing(Exception):
    """A failure that may pass; `wait`: seconds that the endpoint asked for."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class Endpoint:
    """A client; safe to use from several threads.

    Args:
      settings: where and how.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._open = urllib.request.build_opener(_NoRedirect).open
        self._slots = threading.BoundedSemaphore(settings.concurrency)
        self._writing = threading.Lock()

    def chat(self, messages: Sequence[Message], **options: Any) -> Answer:
        """The answer to a conversation.

        Args:
          messages: role and content each.
          options: temperature, max_tokens … of the request's body.

        Raises:
          EndpointError: refused, or no answer after all attempts.
          UserError: the key's environment variable is not set.
        """
        body = {"model": self.settings.model, "messages": [dict(message) for message in messages], **options}
        digest = hashlib.sha256(json.dumps([self.settings.url, body], sort_keys=True, ensure_ascii=False).encode()).hexdigest()
        begun = time.monotonic()
        answer, attempts = self._stored(digest), 0
        if answer is None:
            answer, attempts = self._asked(body, digest)
            self._store(digest, answer)
        self._account(digest, answer, attempts, time.monotonic() - begun)
        return answer

    def chat_many(self, conversations: Sequence[Sequence[Message]], **options: Any) -> list[Answer | EndpointError]:
        """The answers in order, an error in the place of one that did not come. Equal conversations are asked once.

        Args:
          conversations: messages each.
          options: as for `chat`.

        Raises:
          UserError: the key's environment variable is not set.
        """
        self._headers()
        keys = [json.dumps([dict(message) for message in messages], sort_keys=True) for messages in conversations]
        distinct = dict(zip(keys, conversations))

        def ask(messages: Sequence[Message]) -> Answer | EndpointError:
            try:
                return self.chat(messages, **options)
            except EndpointError as error:
                return error

        with ThreadPoolExecutor(self.settings.concurrency) as pool:
            answers = dict(zip(distinct, pool.map(ask, distinct.values())))
        return [answers[key] for key in keys]

    def _headers(self) -> dict[str, str]:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if name := self.settings.key_env:
            key = os.environ.get(name, "").strip()
            if not key:
                raise UserError(f"key_env = {name!r}: the environment variable is not set; export the endpoint's key in it")
            headers["Authorization"] = f"Bearer {key}"
        return headers

    def _asked(self, body: Mapping[str, Any], digest: str) -> tuple[Answer, int]:
        """The endpoint's answer, and how many attempts it took."""
        said = ""
        for attempt in range(self.settings.retries + 1):
            try:
                with self._slots:
                    return self._posted(body), attempt + 1
            except _Passing as failure:
                said = self._without_key(str(failure))
                if attempt == self.settings.retries:
                    break
                jitter = random.Random(f"{self.settings.seed}:{digest}:{attempt}").uniform(0.5, 1.0)
                time.sleep(min(max(self.settings.backoff * 2**attempt * jitter, failure.wait), self.settings.longest_wait))
        raise EndpointError(f"{self.settings.url} gave no answer in {self.settings.retries + 1} attempts; the last: {said}")

    def _posted(self, body: Mapping[str, Any]) -> Answer:
        url = f"{self.settings.url.rstrip('/')}/chat/completions"
        request = urllib.request.Request(url, json.dumps(body).encode(), self._headers(), method="POST")
        try:
            with self._open(request, timeout=self.settings.timeout) as response:
                content = response.read(LARGEST)
        except urllib.error.HTTPError as error:
            with error:
                said = f"status {error.code}: {error.read(300).decode(errors='replace')}"
            if error.code in PASSING or error.code >= 500:
                raise _Passing(said, _retry_after(error.headers.get("Retry-After"))) from None
            raise EndpointError(self._without_key(f"{self.settings.url} refused the request, {said}")) from None
        except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
            raise _Passing(f"{type(error).__name__}: {error}") from None
        try:
            said = json.loads(content)
            choice, usage = said["choices"][0], said.get("usage") or {}
            text = choice["message"]["content"]
            if not isinstance(text, str):
                raise TypeError("no text")
            count = lambda name: int(usage.get(name) or 0)  # noqa: E731
            return Answer(text, str(choice.get("finish_reason")), count("prompt_tokens"), count("completion_tokens"), cached=False)
        except (ValueError, LookupError, TypeError, AttributeError):
            raise _Passing(f"no completion but {content[:200]!r}") from None

    def _without_key(self, text: str) -> str:
        key = os.environ.get(self.settings.key_env, "").strip() if self.settings.key_env else ""
        return text.replace(key, "[key]") if key else text

    def _path(self, digest: str) -> pathlib.Path:
        return pathlib.Path(self.settings.cache) / digest[:2] / f"{digest}.json"

    def _stored(self, digest: str) -> Answer | None:
        """The cached answer; a damaged one is asked for again."""
        if not self.settings.cache:
            return None
        try:
            return Answer(**{**json.loads(self._path(digest).read_text()), "cached": True})
        except (OSError, ValueError, TypeError):
            return None

    def _store(self, digest: str, answer: Answer) -> None:
        if not self.settings.cache:
            return
        path = self._path(digest)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
        part.write_text(json.dumps(dataclasses.asdict(answer), ensure_ascii=False))
        part.replace(path)

    def _account(self, digest: str, answer: Answer, attempts: int, seconds: float) -> None:
        """One line of the log; what comes from the cache costs nothing."""
        if not self.settings.log:
            return
        settings = self.settings
        price = 0.0 if answer.cached else (answer.prompt_tokens * settings.price_in + answer.completion_tokens * settings.price_out) / 1e6
        line = {
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "model": settings.model, "request": digest,
            "cached": answer.cached, "attempts": attempts, "prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.completion_tokens,
            "seconds": round(seconds, 3), "price": price,
        }
        with self._writing:
            path = pathlib.Path(settings.log)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.write(json.dumps(line) + "\n")


def _retry_after(value: str | None) -> float:
    """Seconds until the moment that a Retry-After header names, 0 where it says nothing."""
    if not value:
        return 0.0
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        moment = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return 0.0
    return max(0.0, moment.timestamp() - time.time())
