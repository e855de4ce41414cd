"""The client against a real server: what is retried, what is not, how long it waits, what it stores, logs, and never writes."""

from __future__ import annotations

import email.utils
import json
import pathlib
import socket
import time
from typing import Any

import pytest

from rlhf_jax import endpoint
from rlhf_jax.endpoint import Endpoint, EndpointError, Settings
from rlhf_jax.errors import UserError
from tests.endpoints import Reply, completion, serving

ASK = [{"role": "user", "content": "2 + 2?"}]
FOUR = Reply(completion("4"))


def client(url: str, **settings: Any) -> Endpoint:
    return Endpoint(Settings(url=url, model="m", **{"backoff": 0.01, "timeout": 2.0, **settings}))


def test_a_request_and_its_answer() -> None:
    with serving(lambda body, n: FOUR) as served:
        answer = client(served.url).chat(ASK, temperature=0.0, max_tokens=7)
    assert answer == endpoint.Answer("4", "stop", 10, 5, cached=False)
    (request,) = served.requests
    assert request["path"] == "/v1/chat/completions"
    assert request["body"] == {"model": "m", "messages": ASK, "temperature": 0.0, "max_tokens": 7}
    assert "Authorization" not in request["headers"]


PASSING = {
    "busy": Reply({"error": "slow down"}, 429), "broken": Reply(b"oops", 500), "overloaded": Reply(b"", 503),
    "late": Reply(completion("4"), delay=0.6), "torn": Reply(completion("4"), torn=True),
    "no JSON": Reply(b"<html>"), "no choices": Reply({"choices": []}),
    "another shape": Reply([1, 2]), "no text": Reply({"choices": [{"message": {"content": None}}]}),
}


@pytest.mark.parametrize("failure", PASSING)
def test_what_may_pass_is_tried_again(failure: str) -> None:
    with serving(lambda body, n: PASSING[failure] if n < 2 else FOUR) as served:
        assert client(served.url, timeout=0.3).chat(ASK).text == "4"
    assert len(served.requests) == 3


@pytest.mark.parametrize("failure", PASSING)
def test_only_as_often_as_allowed(failure: str) -> None:
    with serving(lambda body, n: PASSING[failure]) as served:
        with pytest.raises(EndpointError, match="no answer in 2 attempts; the last: "):
            client(served.url, timeout=0.3, retries=1).chat(ASK)
        assert len(served.requests) == 2


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422, 302, 307])
def test_what_will_not_pass_is_not(status: int) -> None:
    reply = Reply({"error": "wrong"}, status, {"Location": "http://127.0.0.1:9/elsewhere"})
    with serving(lambda body, n: reply) as served:
        with pytest.raises(EndpointError, match=f"refused the request, status {status}.*wrong"):
            client(served.url).chat(ASK)
        assert len(served.requests) == 1


def test_nobody_there() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(EndpointError, match="no answer in 2 attempts"):
        client(f"http://127.0.0.1:{port}/v1", retries=1).chat(ASK)


def waits(monkeypatch: pytest.MonkeyPatch, reply: Reply, **settings: Any) -> list[float]:
    """How long the client waits between attempts."""
    slept: list[float] = []
    with serving(lambda body, n: reply) as served, monkeypatch.context() as patched:
        asker = client(served.url, backoff=1.0, retries=4, **settings)
        patched.setattr(endpoint.time, "sleep", lambda seconds: slept.append(seconds) if seconds > 1e-6 else None)
        with pytest.raises(EndpointError):
            asker.chat(ASK)
    return slept


def test_waits_double_and_are_jittered_from_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    first = waits(monkeypatch, PASSING["busy"], seed=1)
    assert len(first) == 4 and all(0.5 * 2**n <= seconds <= 2**n for n, seconds in enumerate(first))
    assert first != waits(monkeypatch, PASSING["busy"], seed=2)
    assert max(waits(monkeypatch, PASSING["busy"], longest_wait=3.0)) == 3.0


def test_retry_after(monkeypatch: pytest.MonkeyPatch) -> None:
    assert waits(monkeypatch, Reply(b"", 429, {"Retry-After": "20"})) == [20.0] * 4
    assert waits(monkeypatch, Reply(b"", 429, {"Retry-After": "900"}), longest_wait=30.0) == [30.0] * 4
    moment = email.utils.formatdate(time.time() + 25, usegmt=True)
    assert all(20 < seconds <= 26 for seconds in waits(monkeypatch, Reply(b"", 503, {"Retry-After": moment})))
    assert max(waits(monkeypatch, Reply(b"", 429, {"Retry-After": "soon"}))) <= 8.0


def test_answers_are_stored(tmp_path: pathlib.Path) -> None:
    cache = str(tmp_path / "cache")
    with serving(lambda body, n: Reply(completion(f"answer {n}"))) as served:
        first = client(served.url, cache=cache).chat(ASK)
        again = client(served.url, cache=cache).chat(ASK)
        assert again.text == first.text == "answer 0" and again.cached and not first.cached
        assert client(served.url, cache=cache).chat(ASK, temperature=1.0).text == "answer 1"
        assert client(served.url, cache=cache).chat([*ASK, *ASK]).text == "answer 2"
        for path in pathlib.Path(cache).rglob("*.json"):
            path.write_text('{"text": "torn')
        assert client(served.url, cache=cache).chat(ASK).text == "answer 3"
    assert client(served.url, cache=cache).chat(ASK).text == "answer 3"  # the server is gone


def test_a_failure_is_not_stored(tmp_path: pathlib.Path) -> None:
    with serving(lambda body, n: PASSING["broken"] if n == 0 else FOUR) as served:
        asker = client(served.url, cache=str(tmp_path), retries=0)
        with pytest.raises(EndpointError):
            asker.chat(ASK)
        assert asker.chat(ASK).text == "4"


def test_usage_is_logged(tmp_path: pathlib.Path) -> None:
    log = tmp_path / "usage" / "log.jsonl"
    with serving(lambda body, n: PASSING["busy"] if n == 0 else Reply(completion("4", 1000, 200))) as served:
        asker = client(served.url, cache=str(tmp_path / "cache"), log=str(log), price_in=2.0, price_out=10.0)
        asker.chat(ASK)
        asker.chat(ASK)
    first, second = (json.loads(line) for line in log.read_text().splitlines())
    assert first["price"] == pytest.approx(0.004) and second["price"] == 0.0
    assert (first["attempts"], first["cached"], first["prompt_tokens"], first["completion_tokens"]) == (2, False, 1000, 200)
    assert (second["attempts"], second["cached"], second["request"]) == (0, True, first["request"])


def test_the_key_is_sent_and_never_written(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.setenv("TEST_KEY", "sk-hunter2")
    echo = lambda body, n: FOUR if n == 0 else Reply(b"your key sk-hunter2 is wrong", 401 if n == 1 else 500)  # noqa: E731
    with serving(echo) as served:
        asker = client(served.url, key_env="TEST_KEY", cache=str(tmp_path / "c"), log=str(tmp_path / "log"), retries=0)
        asker.chat(ASK)
        said = []
        for _ in range(2):
            with pytest.raises(EndpointError) as caught:
                asker.chat([*ASK, *ASK])
            said.append(str(caught.value))
        assert served.requests[0]["headers"]["Authorization"] == "Bearer sk-hunter2"
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert written and b"hunter2" not in written and "hunter2" not in "".join([*said, repr(asker.settings), *capfd.readouterr()])
    assert all("[key]" in sentence for sentence in said)


def test_a_key_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEST_KEY", raising=False)
    with serving(lambda body, n: FOUR) as served:
        with pytest.raises(UserError, match=r"TEST_KEY.*not set"):
            client(served.url, key_env="TEST_KEY").chat_many([ASK])
        assert not served.requests


def test_many_at_once_in_order() -> None:
    asked = [[{"role": "user", "content": str(n % 8)}] for n in range(12)]
    def answer(body: dict[str, Any], n: int) -> Reply:
        said = body["messages"][0]["content"]
        return Reply({"error": "no"}, 400) if said == "3" else Reply(completion(said), delay=0.05)

    with serving(answer) as served:
        answers = client(served.url, concurrency=3).chat_many(asked)
    assert [a.text if isinstance(a, endpoint.Answer) else "error" for a in answers] == ["error" if n % 8 == 3 else str(n % 8) for n in range(12)]
    assert served.most_at_once == 3 and len(served.requests) == 8, "equal conversations are asked once"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"url": "localhost:8000"}, "url = 'localhost:8000'"), ({"url": "ftp://a/v1"}, "url"),
        ({"url": "http://me:hunter2@a/v1"}, "url holds a user"),
        ({"model": ""}, "model = ''"), ({"timeout": 0.0}, "timeout = 0.0"), ({"retries": -1}, "retries = -1"),
        ({"concurrency": 0}, "concurrency = 0"),
        ({"price_in": float("nan")}, "price_in = nan"),
    ],
)
def test_settings(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        Settings(**{"url": "http://a/v1", "model": "m", **settings})
    assert "hunter2" not in str(caught.value)
