"""What a run says: one table, one JSON, both with the machine in them."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.table import Table

from backend import __version__
from backend.bench.measure import Figure
from backend.results.export import write_json


def machine(device: str) -> dict[str, Any]:
    """What figures depend on: processor, cores, load, memory, device and its driver, releases, date."""
    import torch

    facts: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "backend": __version__,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_before": round(os.getloadavg()[0], 2),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cpu": torch.backends.cpu.get_cpu_capability(),
        "device": device,
    }
    if torch.device(device).type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
        facts["cuda"] = torch.version.cuda
        version = Path("/proc/driver/nvidia/version")
        facts["driver"] = version.read_text().splitlines()[0] if version.exists() else "unknown"
    return facts


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def table(figures: Sequence[Figure], facts: dict[str, Any]) -> Table:
    """All figures, with the machine as the caption."""
    shown = Table(
        title="wsc-backend bench",
        caption=", ".join(f"{name} {value}" for name, value in facts.items()),
        caption_justify="left",
    )
    for heading in ("benchmark", "figure"):
        shown.add_column(heading)
    shown.add_column("value", justify="right", no_wrap=True)
    for heading in ("target", "", "note"):
        shown.add_column(heading)
    before = ""
    for figure in figures:
        if before and figure.benchmark != before:
            shown.add_section()
        verdict = {True: "[green]met[/]", False: "[red]missed[/]", None: ""}[figure.met]
        name = figure.benchmark if figure.benchmark != before else ""
        value = "–" if figure.value is None else f"{written(figure.value)} {figure.unit}".strip()
        shown.add_row(name, figure.name, value, figure.target, verdict, figure.note)
        before = figure.benchmark
    return shown


def written(value: float) -> str:
    """A number with as many digits as mean something: four, and more where it is close to one."""
    if 0.99 < value < 1:
        return f"{value:.6f}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def save(path: Path, figures: Sequence[Figure], facts: dict[str, Any], failed: Mapping[str, str] | None = None) -> None:
    """The same as JSON: ``{"machine": {…}, "figures": [{…}, …], "failed": {benchmark: its error}}``."""
    content = {"machine": facts, "figures": [asdict(figure) for figure in figures], "failed": dict(failed or {})}
    write_json(path, json.loads(json.dumps(content)))
