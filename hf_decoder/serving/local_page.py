"""Serves a Gradio page on this machine alone: to its own address, without analytics, and with nothing from outside."""

from __future__ import annotations

import html
import os
import socket
import time
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse

from hf_decoder.safety.terminal import printable

ADDRESS = "127.0.0.1"
NAMES = (ADDRESS, "localhost")
CLOSED = ("/file=", "/file/", "/proxy=", "/upload")
# The browser asks nobody else, whatever the page holds. Gradio's own scripts are inline and make functions of text.
POLICY = "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; frame-ancestors 'none'"
NARROWEST = 300  # pixels of a column; a phone shows one below the other


def escaped(text: str) -> str:
    """Text as HTML that shows it letter by letter; what would hide or reorder it is spelt out."""
    return html.escape(printable(text))


class _OwnPageOnly:
    """Answers requests under this page's own address and from its own pages, and forbids anything from elsewhere.

    Gradio's routes that read files and fetch from other servers are closed: the page holds nothing but text.
    """

    def __init__(self, app: Any, port: int):
        self.app = app
        self.hosts = {f"{name}:{port}" for name in NAMES} | (set(NAMES) if port == 80 else set())

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        is_own = headers.get("host") in self.hosts
        is_own &= origin is None or origin.removeprefix("http://") in self.hosts
        if not is_own or any(route in scope["path"] for route in CLOSED):
            return await PlainTextResponse("This page answers to itself only.", 403)(scope, receive, send)

        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["Content-Security-Policy"] = POLICY
            await send(message)

        return await self.app(scope, receive, send_with_policy)


def free_port(port: int) -> int:
    """`port`, or for 0 one that is free.

    Raises:
        ValueError: if it is in use, or cannot be had.
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


def serve(page: gr.Blocks, port: int, head: str = "") -> None:
    """Serves a page on 127.0.0.1 until it is interrupted.

    Raises:
        ValueError: as `free_port`.
    """
    port = free_port(port)
    # Gradio asks its own page whether it is there; a proxy of this machine cannot tell.
    others = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    os.environ["no_proxy"] = f"{others},{ADDRESS}" if others else ADDRESS
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
        print(f"the page is at http://{ADDRESS}:{port}/ (Ctrl-C ends it)", flush=True)
        while True:
            time.sleep(3600)
    finally:
        page.close(verbose=False)
