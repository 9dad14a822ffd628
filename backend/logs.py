"""How every process of ours writes its log: one line an event, to standard error."""

from __future__ import annotations

import logging
import sys


def configure_logging(level: str, process: str) -> None:
    """Send the log of this process to standard error, ``process`` naming it in each line."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"%(asctime)s {process} %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    # A line for each request or job of a library says less than ours do.
    for chatty in ("httpx", "httpcore", "PIL", "tifffile", "rq"):
        logging.getLogger(chatty).setLevel(max(logging.WARNING, root.level))
