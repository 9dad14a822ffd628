"""An S3 on loopback: moto's server, which speaks the protocol that s3fs speaks with a real one."""

from __future__ import annotations

import itertools
import socket
import subprocess
import sys
import time

import httpx
import pytest


class S3:
    """A server of buckets in memory, a process of its own, and the variables by which this process and its children find it."""

    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        self._server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while not _listens(port):
            assert self._server.poll() is None and time.monotonic() < deadline, "moto's server did not start"
            time.sleep(0.05)
        self._buckets = itertools.count(1)
        self._patch = pytest.MonkeyPatch()
        # s3fs gives a connection that the collector finds a tenth of a second to close; on a busy machine that is not enough, and
        # Python complains. `forget_connections` closes them in time.
        self._patch.setattr("s3fs.S3FileSystem.close_session", staticmethod(lambda *_: None))
        self.endpoint = f"http://127.0.0.1:{port}"
        variables = {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        for name, value in variables.items():
            self._patch.setenv(name, value)

    def bucket(self) -> str:
        """A new bucket, as a URL."""
        name = f"bucket-{next(self._buckets)}"
        httpx.put(f"{self.endpoint}/{name}", trust_env=False).raise_for_status()
        return f"s3://{name}"

    def stop(self) -> None:
        """End the server."""
        forget_connections()
        self._patch.undo()
        self._server.terminate()
        self._server.wait(10)


def forget_connections() -> None:
    """Close what s3fs keeps open for the next who wants the same store: Python complains of it whenever it comes to clear up."""
    from fsspec.asyn import get_loop, sync
    from s3fs import S3FileSystem

    for fs in S3FileSystem._cache.values():
        if fs._s3 is not None:
            sync(get_loop(), fs._s3.close)
    S3FileSystem.clear_instance_cache()


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True
