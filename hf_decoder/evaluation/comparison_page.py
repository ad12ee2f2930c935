"""Serves a local web page for blind judgments: one pair at a time, side by side, with no model named."""

from __future__ import annotations

import html
import secrets
import threading
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs

from hf_decoder.evaluation.blind_comparison import CHOICES, JudgmentFile, Pair

ADDRESS = "127.0.0.1"
LONGEST_FORM = 10_000  # bytes

STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem}"
    "pre{white-space:pre-wrap;overflow-wrap:anywhere;background:#f4f4f4;padding:1rem;margin:0;color:#111}"
    ".two{display:grid;grid-template-columns:1fr 1fr;gap:1rem;margin:1rem 0}"
    "button{font:inherit;padding:.6rem 1.2rem;margin-right:.5rem}"
)
SCRIPT = (
    "addEventListener('keydown',e=>{const b={'1':'left','2':'right','t':'tie','0':'tie'}[e.key];"
    "if(b&&!e.ctrlKey&&!e.metaKey&&!e.altKey)document.getElementById(b)?.click()})"
)
LABELS = {"left": "Left is better (1)", "right": "Right is better (2)", "tie": "Tie (t)"}


class JudgmentServer(ThreadingHTTPServer):
    """Serves the pairs of a `JudgmentFile` on 127.0.0.1 until all are judged; `port` 0 takes any that is free.

    Only forms that carry this server's own token are accepted, and only under a local host name, so no other page
    that the browser has open can judge.
    """

    daemon_threads = True

    def __init__(self, file: JudgmentFile, pairs: Sequence[Pair], port: int = 0):
        super().__init__((ADDRESS, port), _Handler)
        self.file = file
        self.pairs = list(pairs)
        self.token = secrets.token_urlsafe(16)
        self.lock = threading.Lock()
        self.finished = threading.Event()

    @property
    def address(self) -> str:
        return f"http://{ADDRESS}:{self.server_address[1]}/"

    def serve(self, said: Callable[[str], Any] = print) -> None:
        """Serves until every pair is judged, or until interrupted."""
        said(f"judge at {self.address} (Ctrl-C stops; nothing judged is lost)")
        thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
        thread.start()
        try:
            while not self.finished.wait(0.2):
                pass
        finally:
            self.shutdown()
            self.server_close()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: JudgmentServer

    def do_GET(self) -> None:
        if not self._is_local():
            return self._send(403, "<p>This page answers to its own address only.</p>")
        if self.path != "/":
            return self._send(404, "<p>There is nothing here.</p>")
        self._show_next()

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not length.isdigit() or int(length) > LONGEST_FORM:
            return self._send(400, "<p>This is not a judgment.</p>")
        form = parse_qs(self.rfile.read(int(length)).decode("utf-8", "replace"))
        token, key, choice = (form.get(name, [""])[0] for name in ("token", "key", "choice"))
        if not self._is_local() or not secrets.compare_digest(token.encode(), self.server.token.encode()):
            return self._send(403, "<p>This form is not from this page; load it again.</p>")
        pair = next((pair for pair in self.server.pairs if pair.key == key), None)
        if pair is None or choice not in CHOICES:
            return self._send(400, "<p>This is not a judgment.</p>")
        with self.server.lock:
            self.server.file.add(pair, choice)
        self.send_response(303)
        self.send_header("Location", "/")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _is_local(self) -> bool:
        port = self.server.server_address[1]
        return self.headers.get("Host") in (f"{ADDRESS}:{port}", f"localhost:{port}")

    def _show_next(self) -> None:
        with self.server.lock:
            left = self.server.file.remaining(self.server.pairs)
        if not left:
            self._send(200, "<p>Every pair is judged. The result is in the terminal; this page can be closed.</p>")
            self.server.finished.set()
            return
        done, pair = len(self.server.pairs) - len(left), left[0]
        buttons = "".join(
            f'<button id="{choice}" name="choice" value="{choice}">{LABELS[choice]}</button>' for choice in CHOICES
        )
        self._send(
            200,
            f"<p>{done + 1} of {len(self.server.pairs)}</p><pre>{html.escape(pair.prompt)}</pre>"
            f'<div class="two"><pre>{html.escape(pair.left)}</pre><pre>{html.escape(pair.right)}</pre></div>'
            f'<form method="post" action="/"><input type="hidden" name="token" value="{self.server.token}">'
            f'<input type="hidden" name="key" value="{pair.key}">{buttons}</form><script>{SCRIPT}</script>',
        )

    def _send(self, status: int, body: str) -> None:
        page = (
            '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Which answer is better?</title>'
            f"<style>{STYLE}</style></head><body>{body}</body></html>"
        ).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(page)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(page)

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are no news."""
