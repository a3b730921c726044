"""What stands between visitors and the page: small requests only, and nothing from elsewhere."""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

MOST_BYTES = 1 << 16
"""Of a request; a prompt and some numbers are a few thousand."""

CONTENT = "; ".join(
    [
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
    ]
)
"""What a browser may load: nothing from another host (the header Content-Security-Policy)."""


class Guard:
    """ASGI middleware: refuses files and large requests, and has the browser ask no other host."""

    def __init__(self, app: App):
        self._app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = _refusal(scope)
        if status is not None:
            await send({"type": "http.response.start", "status": status, "headers": []})
            await send({"type": "http.response.body", "body": b""})
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                header = (b"content-security-policy", CONTENT.encode())
                message["headers"] = [*message.get("headers", []), header]
            await send(message)

        await self._app(scope, receive, guarded)


def _refusal(scope: Message) -> int | None:
    """The status of a request that is refused; None for others."""
    if scope["method"] in ("GET", "HEAD", "OPTIONS"):
        return None
    if scope["path"].rstrip("/").endswith("/upload"):
        return 403
    headers = dict(scope["headers"])
    length = headers.get(b"content-length", b"")
    if not length.isdigit():
        return 411  # a length is required
    return 413 if int(length) > MOST_BYTES else None
