"""A real HTTP server on this machine that answers as a script says: what the client of LLM endpoints is tested against."""

from __future__ import annotations

import contextlib
import dataclasses
import http.server
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any


def completion(text: str, prompt_tokens: int = 10, completion_tokens: int = 5) -> dict[str, Any]:
    """A chat completion's body."""
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
    return {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}], "usage": usage}


@dataclasses.dataclass
class Reply:
    """What one request gets."""

    body: Any  # a dict is sent as JSON, bytes as they are
    status: int = 200
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    delay: float = 0.0  # seconds before it is sent
    torn: bool = False  # the connection is cut in the middle


@dataclasses.dataclass
class Served:
    """A running server."""

    url: str
    requests: list[dict[str, Any]]  # path, headers and body of each request so far
    most_at_once: int = 0
    at_once: int = 0


@contextlib.contextmanager
def serving(answer: Callable[[dict[str, Any], int], Reply]) -> Iterator[Served]:
    """A server whose `answer(body, number)` says what request `number` gets."""
    served, lock = Served("", []), threading.Lock()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(served.requests)
                served.requests.append({"path": self.path, "headers": dict(self.headers), "body": body})
                served.at_once += 1
                served.most_at_once = max(served.most_at_once, served.at_once)
            reply = answer(body, number)
            time.sleep(reply.delay)
            with lock:
                served.at_once -= 1
            content = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
            with contextlib.suppress(OSError):
                self.send_response(reply.status)
                for name, value in reply.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[: len(content) // 2] if reply.torn else content)

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    served.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
