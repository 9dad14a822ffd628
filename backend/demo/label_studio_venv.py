"""Label Studio's own virtual environment: its pins clash with `label-studio-ml`, so it is installed beside the backend.

``python -m backend.demo.label_studio_venv VENV`` installs it into ``VENV`` and does nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from backend.errors import BackendError, LabelStudioNotStarted

LABEL_STUDIO_VERSION = "1.23.2"
LOG_LINES_SHOWN = 15

Progress = Callable[[str], None]

# Complete means that pip has written its list of files, which it does last.
_VERSION_PROBE = """
import importlib.metadata
found = importlib.metadata.distribution("label-studio")
print(found.version if found.read_text("RECORD") is not None else "")
"""


def quiet(_: str) -> None:
    """The progress callback of those who want none."""


def installed_version(venv: Path) -> str:
    """The version of Label Studio that is completely installed in ``venv``; empty if there is none."""
    python = python_of(venv)
    if not python.exists():
        return ""
    done = subprocess.run([str(python), "-I", "-c", _VERSION_PROBE], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def ensure_installed(venv: Path, on_progress: Progress = quiet) -> None:
    """Make a virtual environment with Label Studio in it, unless it is there and right; one that is half made is repaired.

    Two processes asking at the same time wait for each other. The log of the installation is ``VENV.log``.

    Raises
    ------
    LabelStudioNotStarted
        ``venv`` is a folder with something else in it, or the installation failed (with pip's last lines).
    """
    venv = venv.absolute()
    if installed_version(venv) == LABEL_STUDIO_VERSION:
        return
    venv.parent.mkdir(parents=True, exist_ok=True)
    log_path = venv.with_name(venv.name + ".log")
    with _locked(venv.with_name(venv.name + ".lock")):
        if installed_version(venv) == LABEL_STUDIO_VERSION:
            return
        if venv.exists() and any(venv.iterdir()) and not (venv / "pyvenv.cfg").exists():
            raise LabelStudioNotStarted(
                f"{venv} is not empty and is not a virtual environment.",
                hint="Choose another folder, or remove this one.",
            )
        on_progress(
            f"Installing Label Studio {LABEL_STUDIO_VERSION} into {venv} (about 1 GB; takes minutes, only once)"
        )
        log_path.unlink(missing_ok=True)
        _run_logged([sys.executable, "-m", "venv", "--clear", str(venv)], log_path, on_progress)
        requirement = f"label-studio=={LABEL_STUDIO_VERSION}"
        _run_logged(
            [str(python_of(venv)), "-m", "pip", "install", "--progress-bar", "off", requirement], log_path, on_progress
        )
        if installed_version(venv) != LABEL_STUDIO_VERSION:
            raise LabelStudioNotStarted(f"pip ended well, yet {requirement} is not in {venv}.", hint=f"See {log_path}.")
        on_progress(f"Label Studio {LABEL_STUDIO_VERSION} is installed")


def python_of(venv: Path) -> Path:
    """The interpreter of a virtual environment, whether it is there or not."""
    return venv / "bin" / "python"


def _run_logged(command: list[str], log_path: Path, on_progress: Progress) -> None:
    """Run a command to its end, its output in ``log_path``, the lines that tell how far pip is to ``on_progress``."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    with (
        log_path.open("a") as log,
        subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        ) as process,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                log.write(line)
                if re.match(r"\s*(Downloading|Building|Installing) ", line):
                    shown = line.strip()
                    on_progress(shown if len(shown) <= 100 else shown[:99] + "…")
        except BaseException:
            process.kill()
            raise
    if process.returncode != 0:
        tail = "\n".join(log_path.read_text(errors="replace").splitlines()[-LOG_LINES_SHOWN:])
        raise LabelStudioNotStarted(
            f"Installing Label Studio failed (status {process.returncode}). The end of its log:\n{tail}",
            hint=f"\nThe whole log: {log_path}. Running the same command again starts afresh.",
        )


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main(arguments: list[str] | None = None) -> int:
    """Install Label Studio into the folder named on the command line; 0, or 1 with the reason on standard error."""
    parser = argparse.ArgumentParser(
        description=f"Install Label Studio {LABEL_STUDIO_VERSION} into a folder of its own."
    )
    parser.add_argument("venv", type=Path, help="folder of the virtual environment")
    venv: Path = parser.parse_args(arguments).venv
    try:
        ensure_installed(venv, lambda message: print(message, flush=True))
    except BackendError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
