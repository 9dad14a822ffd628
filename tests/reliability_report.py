"""What the suites for faults and hostile input count, kept as lines of JSON; `benchmarks/reliability_table.py` makes tables of them.

from reliability_report import record

record("pickles", "names that run code", tried=40, refused=40)
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "build" / "reliability"


def record(suite: str, row: str, **counts: int | float | str) -> None:
    """Write down one row of a suite's table: it takes the place of an earlier row of the same name.

    Parameters
    ----------
    suite
        Letters, digits, ``-`` and ``_``: also the file's name.
    row
        What was tried, as a reader of the table understands it.
    counts
        The columns, in the order in which the table shows them.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+", suite):
        raise ValueError(f"{suite!r} cannot be the name of a suite")
    FOLDER.mkdir(parents=True, exist_ok=True)
    line = json.dumps({"row": row, **counts}, ensure_ascii=False) + "\n"
    # Opened for appending and written at once: processes that record at the same time do not mix their lines.
    descriptor = os.open(FOLDER / f"{suite}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)
