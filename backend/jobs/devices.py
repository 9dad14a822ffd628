"""Which devices there are, without torch, and how a process is tied to one of them before torch is imported."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import subprocess
import sys
from collections.abc import MutableMapping
from pathlib import Path

from backend.errors import DeviceUnavailable, SettingsError

log = logging.getLogger(__name__)

VISIBLE = "CUDA_VISIBLE_DEVICES"
_DRIVER_GPUS = Path("/proc/driver/nvidia/gpus")


def memory_in_use() -> dict[str, int]:
    """Bytes that this process holds: ``memory_bytes`` of main memory, ``device_memory_bytes`` of the CUDA device it works on.

    What cannot be known is left out. Torch is asked only where it is at work already: this imports nothing.
    """
    found: dict[str, int] = {}
    with contextlib.suppress(OSError, ValueError, IndexError):
        # Second field: pages in memory (proc(5)).
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        found["memory_bytes"] = pages * os.sysconf("SC_PAGE_SIZE")
    torch = sys.modules.get("torch")
    cuda = getattr(torch, "cuda", None)
    if cuda is not None and cuda.is_initialized():
        found["device_memory_bytes"] = int(cuda.memory_reserved())
    return found


def devices_from(setting: str) -> list[str]:
    """The devices that ``DEVICES`` means: ``auto`` is every CUDA device, else the CPU. What was found is logged."""
    devices, found = find_devices(setting)
    log.info("devices: %s (%s)", ", ".join(devices), found)
    return devices


def find_devices(setting: str) -> tuple[list[str], str]:
    """Like :func:`devices_from`, with the words for how they were found.

    ``auto`` counts what ``CUDA_VISIBLE_DEVICES`` lists, else what ``nvidia-smi`` or the kernel's driver lists. ``cuda:N`` is the N-th of these.

    Raises
    ------
    SettingsError
        ``setting`` is neither ``auto`` nor a list of ``cpu`` and ``cuda:N``, or names a device twice.
    """
    if setting.strip() == "auto":
        count, found = count_cuda()
        return ([f"cuda:{i}" for i in range(count)], found) if count else (["cpu"], f"{found}, so the CPU is used")
    devices = [name.strip() for name in setting.split(",")]
    if not all(re.fullmatch(r"cpu|cuda:\d+", name) for name in devices) or len(set(devices)) < len(devices):
        raise SettingsError(
            f"DEVICES: {setting!r} is not a list of different devices.", hint="Write auto, cpu, or cuda:0,cuda:1."
        )
    return devices, "as asked for"


def count_cuda() -> tuple[int, str]:
    """How many CUDA devices there are, without asking CUDA, and the words for how that was found."""
    visible = os.environ.get(VISIBLE)
    if visible is not None:
        return len(_visible_entries(visible)), f"{VISIBLE}={visible!r}"
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=True).stdout
        names = re.findall(r"^GPU \d+: (.*?)(?: \(UUID.*)?$", listing, re.MULTILINE)
        return len(names), f"nvidia-smi lists {', '.join(names) or 'no device'}"
    except FileNotFoundError:
        said = "no nvidia-smi here"
    except (subprocess.SubprocessError, OSError) as error:
        said = f"nvidia-smi failed: {error}"
    count = len(list(_DRIVER_GPUS.iterdir())) if _DRIVER_GPUS.is_dir() else 0
    return count, f"{said}; the NVIDIA driver lists {count} devices"


def _visible_entries(visible: str) -> list[str]:
    entries = []
    for entry in visible.split(","):
        # CUDA's own rule: the first entry that names no device hides all after it.
        if not entry.strip() or entry.strip() == "-1":
            break
        entries.append(entry.strip())
    return entries


def pin_device(device: str, environ: MutableMapping[str, str]) -> str:
    """Let this process see one device only; returns that device's name in this process (``cpu`` or ``cuda:0``).

    To be called before torch is imported. ``cuda:3`` is the fourth entry of a ``CUDA_VISIBLE_DEVICES`` that is set already.
    Thread counts that the user has set are kept.

    Raises
    ------
    DeviceUnavailable
        ``CUDA_VISIBLE_DEVICES`` has no such entry.
    """
    if environ is os.environ and "torch" in sys.modules:
        raise RuntimeError("torch was imported before the device was chosen: it may see, and occupy, the others")
    environ.setdefault("OMP_NUM_THREADS", str(available_cores()))
    if device == "cpu":
        environ[VISIBLE] = ""
        return "cpu"
    number = int(device.removeprefix("cuda:"))
    entry = str(number)
    if VISIBLE in environ:
        entries = _visible_entries(environ[VISIBLE])
        if number >= len(entries):
            raise DeviceUnavailable(
                f"{device} was asked for, but {VISIBLE}={environ[VISIBLE]!r} shows {len(entries)} devices.",
                hint="Set DEVICES to devices that are there, or to auto.",
            )
        entry = entries[number]
    environ[VISIBLE] = entry
    environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # nvidia-smi's order, by which they were counted
    return "cuda:0"


def available_cores() -> int:
    """CPU cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
