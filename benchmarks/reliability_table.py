"""Writes the tables of docs/RELIABILITY.md from what the suites recorded in build/reliability: `python benchmarks/reliability_table.py`.

Each ``SUITE.jsonl`` is one table (see ``tests/reliability_report.py``). A suite that has not been run here keeps the table it has in the document.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
RECORDS = REPOSITORY / "build" / "reliability"
DOCUMENT = REPOSITORY / "docs" / "RELIABILITY.md"
BEGIN = "<!-- reliability tables: begin -->"
END = "<!-- reliability tables: end -->"

# Suites in the order of the document; one that is not named here comes last, under its own name.
TITLES = {
    "faults": "Faults",
    "sources": "Locations of slides",
    "mutants": "Damaged images",
    "results": "Files in the store of results",
    "pickles": "Checkpoints that try to run code",
    "http": "HTTP",
    "jobs": "Jobs put into Redis by somebody else",
    "secrets": "Secrets",
    "machines": "Many machines",
    "load": "Load",
}


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of one suite, each as last recorded, in the order in which they were first recorded."""
    rows: dict[str, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        rows[row["row"]] = row
    return list(rows.values())


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table of rows; a column for every count that any of them has."""
    columns = list(dict.fromkeys(name for row in rows for name in row if name != "row"))
    lines = ["| | " + " | ".join(name.replace("_", " ") for name in columns) + " |"]
    lines.append("|---|" + "|".join("---:" for _ in columns) + "|")
    for row in rows:
        lines.append(f"| {_cell(row['row'])} | " + " | ".join(_cell(row.get(name, "")) for name in columns) + " |")
    return "\n".join(lines)


def _cell(value: object) -> str:
    if isinstance(value, int):
        return f"{value:,}".replace(",", " ")
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def existing_tables(text: str) -> dict[str, str]:
    """Title → table of what stands between the marks now."""
    parts = re.split(r"^### (.+)$", text, flags=re.MULTILINE)
    return {title.strip(): body.strip() for title, body in zip(parts[1::2], parts[2::2], strict=True)}


def render(document: str, suites: dict[str, list[dict[str, Any]]]) -> str:
    """The document with the suites' tables between its two marks; tables of suites that are not given stay.

    Raises
    ------
    ValueError
        The document has no marks.
    """
    head, begin, rest = document.partition(BEGIN)
    between, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the document lacks the marks {BEGIN} and {END}")
    tables = existing_tables(between)
    tables.update({TITLES.get(suite, suite): table(rows) for suite, rows in suites.items() if rows})
    known = list(TITLES.values())
    order = sorted(tables, key=lambda title: (known.index(title) if title in known else len(known), title))
    body = "\n\n".join(f"### {title}\n\n{tables[title]}" for title in order)
    return f"{head}{BEGIN}\n\n{body}\n\n{END}{tail}"


def main() -> int:
    """Rewrite the document; say which tables are new."""
    suites = {path.stem: read_rows(path) for path in sorted(RECORDS.glob("*.jsonl"))}
    if not suites:
        print("Nothing is recorded: run tests/hostile or tests/faults first.", file=sys.stderr)
        return 1
    DOCUMENT.write_text(render(DOCUMENT.read_text(encoding="utf-8"), suites), encoding="utf-8")
    print(f"{DOCUMENT.relative_to(REPOSITORY)}: {', '.join(sorted(suites))}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
