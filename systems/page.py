"""One page and one function behind it, for the browser of a person and for nobody else's.

Any page that a browser shows may send requests to addresses on the same machine. What is refused:

    a Host that is not this machine's name   DNS rebinding: a foreign name that points here
    an Origin that is not the page's, or a body that is not JSON     forged requests (CSRF)
    no token, where the address is not a loopback one                everybody else on the network
    more than LIMIT bytes, or a request that stalls

The page may run no script but its own, whose hash the header names, and load nothing from anywhere:
even if text of a model became HTML by a mistake, it could do nothing.
"""
import base64
import contextlib
import hashlib
import hmac
import json
import re
import sys
import traceback
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from common.errors import InputError

LOOPBACK = ("127.0.0.1", "localhost")
LIMIT = 2 ** 18                    # bytes of a request


def policy(page: str) -> str:
    """The Content-Security-Policy of a page: its own inline script and style by their hashes."""
    def hashes(tag: str) -> str:
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = [hashlib.sha256(text.encode()).digest() for text in found]
        return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
    return (f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; "
            f"connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
            f"frame-ancestors 'none'")


def refusal(headers, token: str) -> tuple[int, str] | None:
    """Why a request is not answered, as (status, words); None where it is. headers: of the request.
    token: what it must know; "" at a loopback address."""
    host, origin, size = (headers.get(name, "") for name in ("Host", "Origin", "Content-Length"))
    if not re.fullmatch(r"[0-9]{1,15}", size):
        return 411, "expected a Content-Length"
    if int(size) > LIMIT:
        return 413, f"{int(size):,} bytes: at most {LIMIT:,} are read; write less"
    if not token and host.partition(":")[0] not in LOOPBACK:
        return 403, f"Host {host!r:.80}: this page is at 127.0.0.1 or localhost"
    if origin and origin.partition("://")[2] != host:
        return 403, f"Origin {origin!r:.80}: only the page itself may ask"
    if headers.get("Content-Type", "").split(";")[0].strip() != "application/json":
        return 415, "expected Content-Type: application/json"
    given = headers.get("Authorization", "").removeprefix("Bearer ")
    if token and not hmac.compare_digest(given.encode(), token.encode()):
        return 401, "this address needs its token: open the link that the server has printed"
    return None


def server(page: str, act: Callable[[dict], tuple[int, dict]], host: str, port: int,
           token: str = "") -> ThreadingHTTPServer:
    """A server, not yet serving, of the page at / and of `act` behind it: a request's JSON object →
    (status, answer). port 0: any free one. InputError where the address cannot be had."""
    content_policy = policy(page)

    class Handler(BaseHTTPRequestHandler):
        timeout = 30               # seconds that a request may stall

        def do_GET(self) -> None:
            name = self.headers.get("Host", "").partition(":")[0]
            if self.path != "/" or not token and name not in LOOPBACK:
                return self.reply(404, b"nothing here", "text/plain")
            self.reply(200, page.encode(), "text/html; charset=utf-8")

        def do_POST(self) -> None:
            status, answer = self.answer()
            self.reply(status, json.dumps(answer).encode(), "application/json")

        def answer(self) -> tuple[int, dict]:
            refused = refusal(self.headers, token)
            if not refused or refused[0] not in (411, 413):
                # What is left unread when a connection ends takes the answer with it.
                body = self.rfile.read(int(self.headers["Content-Length"]))
            if refused:
                return refused[0], {"error": refused[1]}
            try:
                request = json.loads(body)
            except (ValueError, RecursionError):
                return 400, {"error": "expected JSON"}
            if not isinstance(request, dict):
                return 400, {"error": "expected a JSON object"}
            try:
                return act(request)
            except Exception as error:         # one request's fault ends no server
                traceback.print_exc(file=sys.stderr)
                return 500, {"error": f"{type(error).__name__}: {error}"}

        def reply(self, status: int, body: bytes, kind: str) -> None:
            self.send_response(status)
            for name, value in {
                    "Content-Type": kind, "Content-Length": str(len(body)),
                    "Content-Security-Policy": content_policy, "Cache-Control": "no-store",
                    "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}.items():
                self.send_header(name, value)
            with contextlib.suppress(ConnectionError):      # the browser has gone elsewhere
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, *_) -> None:
            """Nothing: what people do is not written down but by `act`."""

    try:
        return ThreadingHTTPServer((host, port), Handler)
    except OSError as error:
        raise InputError(f"--host {host} --port {port}: {error.strerror or error}; name another "
                         f"port, or an address of this machine") from error
