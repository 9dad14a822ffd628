"""Running the application under uvicorn, in the foreground or in a thread of the demo."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI

from backend.errors import SettingsError
from backend.label_studio.services import Services
from backend.web.app import create_app


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one.

    Raises
    ------
    SettingsError
        The address is taken, or not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol by name: asyncio switches Nagle's algorithm off only for sockets that say TCP, and with it on, every answer waits 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise SettingsError(
            f"Cannot listen on {host}:{port}: {error.strerror}.",
            hint="Something else uses the port; choose another with PORT, or end that.",
        ) from error
    return listener


class _Server(uvicorn.Server):
    """Ends the panels' event streams first: uvicorn would wait for them, and they for what happens next."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._app.state.panel.hub.close()
        if self._on_shutdown is not None:
            self._on_shutdown()
        await super().shutdown(sockets)

    def __init__(self, app: FastAPI, config: uvicorn.Config, on_shutdown: Callable[[], None] | None) -> None:
        super().__init__(config)
        self._app = app
        self._on_shutdown = on_shutdown


def make_server(services: Services, on_shutdown: Callable[[], None] | None = None) -> uvicorn.Server:
    """A uvicorn server for the application; it logs through the root logger, without a line for each request.

    ``on_shutdown`` is called when it is told to end, before it waits for the answers that are under way. After a signal, uvicorn raises that
    signal again: whoever has to clean up needs a handler for it.
    """
    app = create_app(services)
    return _Server(
        app,
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=5,
            timeout_keep_alive=75,
            server_header=False,
        ),
        on_shutdown,
    )


class ServerThread:
    """The server in a thread, for processes that do other things too."""

    def __init__(self, services: Services, listener: socket.socket) -> None:
        self._server = make_server(services)
        self._thread = threading.Thread(target=self._server.run, args=([listener],), name="http", daemon=True)

    def start(self, timeout_s: float = 60.0) -> None:
        """Start, and return once requests are answered; raises RuntimeError if that does not happen."""
        self._thread.start()
        deadline = time.monotonic() + timeout_s
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > deadline:
                raise RuntimeError("the HTTP server did not start; its log says why")
            time.sleep(0.02)

    def stop(self) -> None:
        """Answer what is being answered, then end."""
        self._server.should_exit = True
        self._thread.join(10)
