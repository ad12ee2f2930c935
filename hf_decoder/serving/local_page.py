"""Serves a Gradio page on this machine alone: to its own address, without analytics, and with nothing from outside."""

from __future__ import annotations

import html
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse

from hf_decoder.safety.terminal import printable

ADDRESS = "127.0.0.1"
NAMES = (ADDRESS, "localhost")
# The browser asks nobody else, whatever the page holds. Gradio's own scripts are inline and make functions of text.
POLICY = "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; frame-ancestors 'none'"
NARROWEST = 300  # pixels of a column; a phone shows one below the other


def escaped(text: str) -> str:
    """Text as HTML that shows it letter by letter; what would hide or reorder it is spelt out."""
    return html.escape(printable(text))


class _OwnPageOnly:
    """Answers requests under this page's own address and from its own pages, and forbids anything from elsewhere."""

    def __init__(self, app: Any, port: int):
        self.app = app
        self.hosts = {f"{name}:{port}" for name in NAMES} | (set(NAMES) if port == 80 else set())

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        if headers.get("host") not in self.hosts or (
            origin is not None and origin.removeprefix("http://") not in self.hosts
        ):
            return await PlainTextResponse("This page answers to itself only.", 403)(scope, receive, send)

        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["Content-Security-Policy"] = POLICY
            await send(message)

        return await self.app(scope, receive, send_with_policy)


def free_port(port: int) -> int:
    """`port`, or for 0 one that is free.

    Raises:
        ValueError: if it is in use, or not to be had.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((ADDRESS, port))
        except (OSError, OverflowError) as error:
            why = getattr(error, "strerror", None) or str(error)
            raise ValueError(
                f"--port {port} cannot be used ({why}); name another one, or --port 0 for any that is free"
            ) from None
        return int(probe.getsockname()[1])


def serve(page: gr.Blocks, port: int, head: str = "", said: Callable[[str], Any] = print) -> None:
    """Serves a page on 127.0.0.1 until it is interrupted.

    Raises:
        ValueError: as `free_port`.
    """
    port = free_port(port)
    page.launch(
        server_name=ADDRESS,
        server_port=port,
        share=False,
        prevent_thread_lock=True,
        quiet=True,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        theme=gr.themes.Default(
            primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
        ),
        css_paths=Path(__file__).with_name("page.css"),
        head=head,
        app_kwargs={"middleware": [Middleware(_OwnPageOnly, port=port)]},
    )
    try:
        said(f"the page is at http://{ADDRESS}:{port}/ (Ctrl-C ends it)")
        while True:
            time.sleep(3600)
    finally:
        page.close(verbose=False)
