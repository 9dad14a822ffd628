"""When a transfer is hopeless: a server that sends a byte now and then never falls silent, and would hold who reads it for days."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Mapping
from typing import Any

from backend.errors import DownloadFailed

MIN_BYTES_PER_S = 50_000
"""What comes slower is given up: at this rate a slide of 200 MB takes more than an hour."""

_LOOK_EVERY_S = 1.0


class Watch:
    """Looks at one transfer from a thread of its own, and cuts its connection once it is hopeless.

    From outside, because whoever reads is inside a read that ends only with the silence, one byte after the other: in a TLS handshake,
    a header or a body alike.

    Parameters
    ----------
    what
        The location, as messages show it.
    silence_s
        Twice as long may the connection and the header of one request take. Of a body, at least ``MIN_BYTES_PER_S * silence_s`` bytes
        must come within each ``silence_s`` seconds, one after the other: that is noticed after at most twice as long.
    longest_s
        Seconds after which the whole body must be there.
    """

    def __init__(self, what: str, *, silence_s: float, longest_s: float) -> None:
        self._what = what
        self.silence_s = silence_s
        self._longest_s = longest_s
        self._bytes = 0
        self._started: float | None = None  # of the body
        self._window = (0.0, 0)  # when it began, and the bytes that had come by then
        self._header_by = time.monotonic() + 2 * silence_s
        self._connection: socket.socket | None = None
        self._verdict: tuple[str, str] | None = None
        self._over = threading.Event()
        self._lock = threading.Lock()

    def __enter__(self) -> Watch:
        threading.Thread(target=self._look, name="download watch", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def connected(self, event: str, about: Mapping[str, Any]) -> None:
        """For httpx' extension ``trace``: remembers the connection that is to be cut."""
        if not event.endswith("connect_tcp.complete"):
            return
        # A copy of the handle: TLS takes the first one away from its owner, and this one stays good for every phase.
        connection = about["return_value"].get_extra_info("socket").dup()
        with self._lock:
            if self._connection is not None:
                self._connection.close()
            self._connection = connection
        if self._verdict is not None or self._over.is_set():
            self._cut()

    def expect_header(self) -> None:
        """A request is about to be sent: its header has its time from now on."""
        with self._lock:
            self._header_by = time.monotonic() + 2 * self.silence_s

    def expect_body(self) -> None:
        """The header has come: from now on the pace of the body counts."""
        with self._lock:
            self._started = time.monotonic()
            self._window = (self._started, 0)

    def came(self, count: int) -> None:
        """So many bytes of the body have come; as :meth:`check`."""
        self._bytes += count
        self.check()

    def check(self) -> None:
        """Raise what is wrong with the transfer, if something is.

        Raises
        ------
        DownloadFailed
            It is hopeless; its connection is cut.
        """
        if self._verdict is not None:
            message, hint = self._verdict
            raise DownloadFailed(message, hint=hint)

    def _look(self) -> None:
        while not self._over.wait(min(_LOOK_EVERY_S, self.silence_s / 4)):
            with self._lock:
                self._verdict = self._judge(time.monotonic())
            if self._verdict is not None:
                self._cut()
                return

    def _judge(self, now: float) -> tuple[str, str] | None:
        if self._started is None:
            if now < self._header_by:
                return None
            return f"{self._what} did not answer in time ({2 * self.silence_s:g} s without a complete header).", ""
        came = self._bytes
        if now - self._started > self._longest_s:
            message = f"{self._what} is not complete after {self._longest_s:g} s: {came / 1e6:.1f} MB have come."
            return message, "Raise JOB_TIMEOUT_S, or copy the slide to this machine, below SLIDE_ROOTS."
        began, before = self._window
        # Where nothing comes at all, the silence is noticed by who reads; if not, what comes is no part of the body.
        if now - began < self.silence_s * (1 if came > before else 2):
            return None
        rate = (came - before) / (now - began)
        if rate >= MIN_BYTES_PER_S:
            self._window = (now, came)
            return None
        message = (
            f"{self._what} comes too slowly: {rate / 1000:.2g} kB/s over the last {now - began:.3g} s, after "
            f"{came / 1e6:.1f} MB, and {MIN_BYTES_PER_S // 1000} kB/s are the least."
        )
        return message, "Try again when its server is faster, or copy the slide to this machine, below SLIDE_ROOTS."

    def _cut(self) -> None:
        """End the connection under whoever reads from it: the read ends at once, as if the server had hung up."""
        with self._lock:
            if self._connection is not None:
                # The plain socket's way, which does not ask TLS first.
                with contextlib.suppress(OSError):
                    self._connection.shutdown(socket.SHUT_RDWR)
