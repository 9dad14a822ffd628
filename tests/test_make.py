"""`make` says what it can do and, before it installs anything, what is missing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What make reads of a fresh clone."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(REPOSITORY / name, tmp_path)
    return tmp_path


def make(folder: Path, *arguments: str, licence: str = "") -> subprocess.CompletedProcess[str]:
    """Run make as from a shell of its own, also when these tests run under make."""
    inherited = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "MMM_LICENSE_ACCEPTED", "LABEL_STUDIO_VENV", "PYTHON")
    environment = {k: v for k, v in os.environ.items() if k not in inherited}
    if licence:
        environment["MMM_LICENSE_ACCEPTED"] = licence
    command = ["make", "--no-print-directory", "-C", str(folder), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_make_alone_lists_the_targets(clone: Path) -> None:
    listed = {line.split()[0] for line in make(clone).stdout.splitlines()[1:]}
    assert listed == {"help", "install", "demo", "test", "test-faults", "lint", "bench"}


@pytest.mark.parametrize("target", ["demo", "test", "test-faults"])
@pytest.mark.parametrize("answer", ["", "yes"])
def test_without_the_licence_one_message_says_what_to_read_and_set(clone: Path, target: str, answer: str) -> None:
    done = make(clone, target, licence=answer)
    assert done.returncode != 0
    assert "licence of medicalmultitaskmodeling" in done.stderr and "has not been accepted" in done.stderr
    assert "Read it" in done.stderr and "non-commercial research only" in done.stderr
    assert f'MMM_LICENSE_ACCEPTED="i accept" make {target}' in done.stderr
    assert done.stdout == "" and not (clone / ".venv").exists(), "nothing is installed first"


def test_an_old_python_is_named_before_anything_is_installed(clone: Path) -> None:
    old = clone / "python3.8"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.8.1 && exit 0\nexit 1\n')
    old.chmod(0o755)
    done = make(clone, "install", f"PYTHON={old}")
    assert done.returncode != 0
    assert "Python 3.10 or newer is needed" in done.stderr and "Python 3.8.1" in done.stderr
    assert not (clone / ".venv").exists()


def test_what_npm_fetches_is_pinned_by_content_and_not_by_address() -> None:
    lock = json.loads((REPOSITORY / "backend/web/panel/package-lock.json").read_text())
    packages = {name: package for name, package in lock["packages"].items() if name}
    assert packages and all(package["integrity"].startswith("sha512-") for package in packages.values())
    assert "://" not in json.dumps(lock)


def test_the_licence_is_never_accepted_by_the_makefile() -> None:
    lines = (REPOSITORY / "Makefile").read_text().splitlines()
    mentions = [line for line in lines if "MMM_LICENSE_ACCEPTED" in line]
    assert mentions and all("echo" in line or "$$MMM_LICENSE_ACCEPTED" in line for line in mentions)
