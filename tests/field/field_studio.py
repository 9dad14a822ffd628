"""A real Label Studio below a path of a reverse proxy, with a folder of local files: for the tests of addresses and of task data."""

from __future__ import annotations

import json
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from reverse_proxy import Behind, ReverseProxy
from studio import REPOSITORY, Studio

from backend.demo.label_studio_process import LabelStudioProcess


class _BelowAPath(LabelStudioProcess):
    """One that is told the address which browsers know, as operators do behind a proxy."""

    public_url = ""

    def environment(self) -> dict[str, str]:
        return super().environment() | {"LABEL_STUDIO_HOST": self.public_url}


class StudioBelow(Studio):
    """A Label Studio that is at ``public_url``, ``secure_url`` and, for services beside it, at ``base_url``.

    Attributes
    ----------
    proxy, tls
        The proxies in front of it, by HTTP and HTTPS.
    certificate
        File of the latter's certificate, which signed itself.
    documents
        Folder of its local files.
    """

    def __init__(self, process: LabelStudioProcess, proxy: ReverseProxy, tls: ReverseProxy, certificate: Path) -> None:
        super().__init__(process)
        assert process.document_root is not None
        self.proxy, self.tls, self.certificate, self.documents = proxy, tls, certificate, process.document_root
        self.public_url, self.secure_url = proxy.url("/ls"), tls.url("/ls", "localhost")

    def stored(self, project: int) -> dict[int, dict[str, Any]]:
        """The data of a project's tasks as they lie in the database: no answer of Label Studio's shows all of it."""
        with closing(sqlite3.connect(self.process.data_dir / "label_studio.sqlite3", timeout=30)) as database:
            rows = database.execute("SELECT id, data FROM task WHERE project_id = ? ORDER BY id", (project,)).fetchall()
        return {int(number): json.loads(data) for number, data in rows}

    def connect_storage(self, project: int, kind: str, **fields: Any) -> None:
        """Add a source storage, and have its objects become tasks."""
        made = self.call("POST", f"/api/storages/{kind}", json={"project": project, "regex_filter": ".*", **fields})
        synced = self.call("POST", f"/api/storages/{kind}/{made['id']}/sync")
        assert synced["status"] == "completed", synced


def self_signed(folder: Path) -> tuple[Path, Path]:
    """A certificate for this machine that signed itself, and its key."""
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    names = "subjectAltName=DNS:localhost,IP:127.0.0.1"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    subprocess.run(
        [*command, "-addext", names, "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True
    )
    return certificate, key


@contextmanager
def studio_below_a_path(venv: Path, folder: Path) -> Iterator[StudioBelow]:
    """One for the run."""
    documents = folder / "documents"
    documents.mkdir(parents=True)
    pair = self_signed(folder)
    proxy, tls = ReverseProxy(), ReverseProxy(pair)
    process = _BelowAPath(
        venv, folder / "data", port=0, document_root=documents, template_dir=REPOSITORY / "build" / "label-studio"
    )
    process.public_url = proxy.url("/ls")
    try:
        process.start(print)
        for one in (proxy, tls):
            one.routes["/ls"] = Behind(process.base_url)
        with StudioBelow(process, proxy, tls, pair[0]) as studio:
            yield studio
    finally:
        process.stop()
        proxy.stop()
        tls.stop()
