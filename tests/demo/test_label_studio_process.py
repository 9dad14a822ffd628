"""Installing and running Label Studio: what goes wrong is said, nothing leaks into it, nothing stays behind.

Real virtual environments, a real pip and real processes; in them a package of a few lines that bears Label Studio's name,
since these tests are about how we treat it. The real one is in ``tests/e2e``.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from backend.demo import label_studio_venv
from backend.demo.label_studio_process import LabelStudioProcess
from backend.demo.label_studio_venv import LABEL_STUDIO_VERSION, ensure_installed, installed_version
from backend.errors import LabelStudioNotStarted

# Writes down its environment and arguments, then does as a file in its folder says: die, or answer forever.
STUB_SERVER = """
import http.server, json, os, pathlib, subprocess, sys
def main():
    folder = pathlib.Path(os.environ["LABEL_STUDIO_BASE_DATA_DIR"])
    (folder / "seen.json").write_text(json.dumps({"environment": dict(os.environ), "arguments": sys.argv[1:]}))
    if sys.argv[1] == "version":
        (folder / "label_studio.sqlite3").write_text("migrated")
        return 0
    if (folder / "die").exists():
        print("the database is on fire", flush=True)
        return 3
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (folder / "child").write_text(str(child.pid))
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            known = self.headers.get("Authorization", "") == "Token " + os.environ["LABEL_STUDIO_USER_TOKEN"]
            body = json.dumps({"email": os.environ["LABEL_STUDIO_USERNAME"]}).encode()
            self.send_response(200 if known or self.path == "/health" else 401)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
    port = int(sys.argv[sys.argv.index("--port") + 1])
    http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def only_packages_from(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every pip that is started find its packages in ``folder`` and nowhere else."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))


def alive(pid: int) -> bool:
    """Whether a process runs (one that has ended and waits to be collected does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pid: int) -> None:
    """Returns when the process has ended; pytest's own timeout is the limit."""
    while alive(pid):
        time.sleep(0.02)


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a wheel of the stub under Label Studio's name and version."""
    folder = tmp_path_factory.mktemp("wheels")
    info = f"label_studio-{LABEL_STUDIO_VERSION}.dist-info"
    with zipfile.ZipFile(folder / f"label_studio-{LABEL_STUDIO_VERSION}-py3-none-any.whl", "w") as wheel:
        wheel.writestr("label_studio/__init__.py", "")
        wheel.writestr("label_studio/server.py", STUB_SERVER)
        wheel.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: label-studio\nVersion: {LABEL_STUDIO_VERSION}\n"
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    return folder


@pytest.fixture(scope="module")
def venv(wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the stub in it."""
    folder = tmp_path_factory.mktemp("venvs") / "label-studio"
    with pytest.MonkeyPatch.context() as monkeypatch:
        only_packages_from(wheels, monkeypatch)
        ensure_installed(folder)
    return folder


def test_a_failed_installation_says_why_and_the_next_one_repairs_it(
    wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "venv"
    (tmp_path / "nothing").mkdir()
    only_packages_from(tmp_path / "nothing", monkeypatch)
    with pytest.raises(
        LabelStudioNotStarted, match=f"No matching distribution found for label-studio=={LABEL_STUDIO_VERSION}"
    ):
        ensure_installed(target)
    assert (target / "pyvenv.cfg").exists() and installed_version(target) == ""

    only_packages_from(wheels, monkeypatch)
    said: list[str] = []
    ensure_installed(target, said.append)
    assert installed_version(target) == LABEL_STUDIO_VERSION
    assert said[0].startswith(f"Installing Label Studio {LABEL_STUDIO_VERSION}") and "takes minutes" in said[0]

    only_packages_from(tmp_path / "nothing", monkeypatch)
    said.clear()
    ensure_installed(target, said.append)
    assert said == [], "one that is there and right is left alone"


def test_a_folder_that_is_no_virtual_environment_is_not_touched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    assert label_studio_venv.main([str(tmp_path)]) == 1
    assert "is not empty and is not a virtual environment" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_starting_without_an_installation_says_how_to_install(tmp_path: Path) -> None:
    with pytest.raises(LabelStudioNotStarted, match=r"python -m backend\.demo\.label_studio_venv"):
        LabelStudioProcess(tmp_path / "nowhere", tmp_path / "data").start()


def test_a_taken_port_is_an_error_and_not_another_port(venv: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(LabelStudioNotStarted, match=rf"cannot listen on 127\.0\.0\.1:{port}.*choose another port"):
            LabelStudioProcess(venv, tmp_path, port).start()


def test_when_it_dies_at_start_its_last_words_are_shown(venv: Path, tmp_path: Path) -> None:
    (tmp_path / "die").touch()
    process = LabelStudioProcess(venv, tmp_path, 0)
    with pytest.raises(LabelStudioNotStarted, match=r"status 3(.|\n)*the database is on fire") as caught:
        process.start()
    assert str(process.log_path) in str(caught.value)
    assert not process.running


def test_none_of_our_environment_leaks_into_it(venv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "LABEL_STUDIO_API_KEY",
        "PYTHONPATH",
        "REDIS_URL",
        "SECRET_KEY",
        "DJANGO_DB",
        "PASSWORD",
        "http_proxy",
    ):
        monkeypatch.setenv(name, "ours")
    with LabelStudioProcess(venv, tmp_path, 0, document_root=tmp_path):
        seen = json.loads((tmp_path / "seen.json").read_text())
    assert "ours" not in seen["environment"].values()
    assert seen["environment"]["ML_BLOCK_LOCAL_IP"] == seen["environment"]["SSRF_PROTECTION_ENABLED"] == "false"
    assert seen["environment"]["COLLECT_ANALYTICS"] == "false" and seen["environment"]["SENTRY_DSN"] == ""
    assert seen["environment"]["LOCAL_FILES_DOCUMENT_ROOT"] == str(tmp_path)
    secrets = {seen["environment"][f"LABEL_STUDIO_{name}"] for name in ("PASSWORD", "USER_TOKEN")}
    assert not secrets & set(seen["arguments"]), "arguments are visible to every user of the machine"


def test_credentials_are_made_up_once_and_kept_to_the_owner(venv: Path, tmp_path: Path) -> None:
    with LabelStudioProcess(venv, tmp_path / "a", 0) as first:
        pass
    with LabelStudioProcess(venv, tmp_path / "a", 0) as again:
        assert (again.username, again.password, again.token) == (first.username, first.password, first.token)
    with LabelStudioProcess(venv, tmp_path / "b", 0) as other:
        assert other.token != first.token
    assert (tmp_path / "a" / "credentials.json").stat().st_mode & 0o777 == 0o600


def test_a_migrated_database_is_kept_and_used_for_the_next(venv: Path, tmp_path: Path) -> None:
    template = tmp_path / "templates" / f"label-studio-{LABEL_STUDIO_VERSION}.sqlite3"
    with LabelStudioProcess(venv, tmp_path / "a", 0, template_dir=template.parent):
        assert template.read_text() == "migrated"
    template.write_text("from the template")
    with LabelStudioProcess(venv, tmp_path / "b", 0, template_dir=template.parent):
        assert (tmp_path / "b" / "label_studio.sqlite3").read_text() == "from the template"


def test_stop_ends_it_and_what_it_started(venv: Path, tmp_path: Path) -> None:
    process = LabelStudioProcess(venv, tmp_path, 0)
    process.start()
    pid, child = process.pid, int((tmp_path / "child").read_text())
    assert pid is not None and alive(pid) and alive(child)
    process.stop()
    assert not alive(pid) and not process.running
    wait_until_gone(child)
    process.stop()


def test_it_ends_when_the_process_that_started_it_is_killed(venv: Path, tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from backend.demo.label_studio_process import LabelStudioProcess\n"
        "p = LabelStudioProcess(Path(sys.argv[1]), Path(sys.argv[2]), 0); p.start(); print(p.pid, flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(venv), str(tmp_path)], stdout=subprocess.PIPE) as starter:
        assert starter.stdout is not None
        pid = int(starter.stdout.readline())
        child = int((tmp_path / "child").read_text())
        assert alive(pid) and alive(child)
        starter.send_signal(signal.SIGKILL)
    wait_until_gone(pid)
    wait_until_gone(child)
