"""Which checkpoint is used, where its file is, and what it is called. Imports neither torch nor mmm: the HTTP process uses it."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

import httpx

from backend.errors import CheckpointRefused, CheckpointUnreadable, LicenceNotAccepted
from backend.inference.bounded_zip import checked_zip
from backend.paths import StrPath
from backend.reasons import network_reason
from backend.redaction import shown_address
from backend.results.bag import digest
from backend.settings import Settings, licence_accepted

WSC = "wsc-mtl-tiny"
# The address that mmm 1.6.3 lists for Whole Slide Concepts (mmm.api.M3Model.M3_MODELS). Access asks for the licence to be accepted there.
MMM_MODELS: dict[str, str] = {
    WSC: "https://huggingface.co/FraunhoferMEVIS/WholeSlideConcepts/resolve/main/WSC-MTL-tiny.pt.zip?download=true",
}
STAND_IN_FILE = "stand-in.pt.zip"
STAND_IN_MARKER = "STAND-IN.txt"
MMM_DISTRIBUTION = "medicalmultitaskmodeling"


@dataclass(frozen=True)
class ModelIdentity:
    """What tells one model's results from another's.

    Attributes
    ----------
    name
        File name without its endings, ``stand-in`` for the stand-in model.
    sha256
        SHA-256 of the checkpoint file, hexadecimal.
    mmm_release
        Installed release of ``medicalmultitaskmodeling``: releases compute different latents from the same weights.
    precision
        ``float32``, ``bfloat16`` or ``float16``.
    stand_in
        Whether this is the stand-in model, whose results have no medical meaning.
    """

    name: str
    sha256: str
    mmm_release: str
    precision: str
    stand_in: bool

    @property
    def fingerprint(self) -> str:
        """40 hexadecimal digits over checkpoint, release and precision."""
        return digest({"sha256": self.sha256, "mmm_release": self.mmm_release, "precision": self.precision})

    @property
    def model_version(self) -> str:
        """The string that Label Studio shows and compares, such as ``wsc-3f2a1c`` or ``stand-in-3f2a1c``."""
        return f"{'stand-in' if self.stand_in else 'wsc'}-{self.fingerprint[:6]}"


def mmm_release() -> str:
    """The installed release of mmm, without importing it (an import takes seconds and asks for the licence)."""
    try:
        return importlib.metadata.version(MMM_DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        raise CheckpointUnreadable(
            "medicalmultitaskmodeling is not installed.",
            hint="Install this package with its dependencies: pip install .",
        ) from None


def model_identity(settings: Settings) -> ModelIdentity:
    """The identity of the configured model; fetches or builds the checkpoint where that was not done yet."""
    path = ensure_checkpoint(settings)
    sha256 = file_sha256(path)
    check_pin(path, sha256, settings.model_sha256)
    return ModelIdentity(_stem(path), sha256, mmm_release(), settings.precision, is_stand_in(path))


def identity_without_fetching(settings: Settings) -> ModelIdentity | None:
    """As :func:`model_identity`; ``None`` where the checkpoint would first have to be downloaded or built. Errors as :func:`locate`."""
    path = settings.model_dir / "cache" / "models" / STAND_IN_FILE
    if settings.model in MMM_MODELS or settings.model.startswith(("http://", "https://")):
        path = _cached(MMM_MODELS.get(settings.model, settings.model), settings.model_dir / "cache" / "models")
    elif settings.model:
        return model_identity(settings)
    return model_identity(settings) if path.exists() else None


def is_stand_in(path: StrPath) -> bool:
    """Whether a checkpoint is the stand-in model, wherever it was copied to: it carries a marker."""
    path = Path(path)
    try:
        with checked_zip(path, path.name) as archive:
            return STAND_IN_MARKER in archive.namelist()
    except (zipfile.BadZipFile, CheckpointRefused):
        return False  # what is wrong with it is said where it is loaded


def ensure_checkpoint(settings: Settings) -> Path:
    """The local path of the configured checkpoint. Downloads a URL once; builds the stand-in once (in a process of its own)."""
    if settings.model:
        return locate(settings.model, settings.model_dir / "cache" / "models")
    path = settings.model_dir / "cache" / "models" / STAND_IN_FILE
    if not path.exists():
        _need_licence()
        with _file_lock(path):
            if not path.exists():
                _build_stand_in(path)
    return path


def locate(path_or_url: StrPath, cache: StrPath | None = None) -> Path:
    """The local file for a path, ``file://`` URL or http(s) URL; a URL is downloaded into ``cache`` once.

    Raises
    ------
    CheckpointUnreadable
        No such file, wrong ending, or the download failed.
    LicenceNotAccepted
        It would have to be downloaded: the licence is asked for first.
    """
    path_or_url = os.fspath(path_or_url)
    if path_or_url in MMM_MODELS:
        path_or_url = MMM_MODELS[path_or_url]
    parts = urlsplit(path_or_url)
    if parts.scheme in ("http", "https"):
        target = _cached(path_or_url, Path(cache) if cache else Path.home() / ".cache" / "wsc-backend" / "models")
        if not target.exists():
            _need_licence()
            with _file_lock(target):
                if not target.exists():
                    _download(path_or_url, target)
        return target
    path = Path(unquote(parts.path) if parts.scheme == "file" else path_or_url).expanduser()
    if not path.is_file():
        raise CheckpointUnreadable(
            f"There is no checkpoint at {shown_address(str(path_or_url))}.",
            hint="Set MODEL to the .pt.zip file that you downloaded.",
        )
    if path.suffix != ".zip":
        raise CheckpointUnreadable(
            f"{path.name} is no .zip or .pt.zip file.", hint="MODEL must be the zip as published."
        )
    return path


def _cached(url: str, cache: Path) -> Path:
    name = Path(unquote(urlsplit(url).path)).name or "checkpoint.pt.zip"
    return cache / f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{name}"


def check_pin(path: StrPath, sha256: str, pinned: str) -> None:
    """Compare a checkpoint's SHA-256 with ``MODEL_SHA256``; raises :class:`CheckpointUnreadable` if they differ."""
    if pinned and sha256 != pinned:
        raise CheckpointUnreadable(
            f"{Path(path).name} has SHA-256 {sha256}, but MODEL_SHA256 is {pinned}.",
            hint="Use the file that the pin was made for, or change the pin if you trust this one.",
        )


def file_sha256(path: StrPath) -> str:
    """SHA-256 of a file, hexadecimal; remembered until its size or modification time changes."""
    stat = Path(path).stat()
    return _sha256_of(str(path), stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=32)
def _sha256_of(path: str, _size: int, _mtime_ns: int) -> str:
    state = hashlib.sha256()
    with Path(path).open("rb") as file:
        while chunk := file.read(1 << 20):
            state.update(chunk)
    return state.hexdigest()


def _stem(path: Path) -> str:
    name = path.name
    for ending in (".zip", ".pt"):
        name = name.removesuffix(ending)
    return name


def _need_licence() -> None:
    if not licence_accepted():
        raise LicenceNotAccepted


def _build_stand_in(path: Path) -> None:
    # A process of its own: building needs torch and mmm, which this process may not import.
    command = [sys.executable, "-m", "backend.inference.standin", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0 or not path.exists():
        raise CheckpointUnreadable(
            f"The stand-in model could not be built: {done.stderr.strip().splitlines()[-1:] or 'no message'}",
            hint='It needs MMM_LICENSE_ACCEPTED="i accept" (read the licence first), or give your own checkpoint in MODEL.',
        )


def _download(url: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with (
            os.fdopen(descriptor, "wb") as file,
            httpx.stream("GET", url, follow_redirects=True, timeout=60.0) as response,
        ):
            response.raise_for_status()
            for chunk in response.iter_bytes():
                file.write(chunk)
        Path(temporary).replace(target)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise CheckpointUnreadable(
            f"The checkpoint could not be downloaded from {shown_address(url)}: {_why(error)}.",
            hint="Download it in a browser (its page asks for the licence to be accepted) and set MODEL to the file's path.",
        ) from error
    finally:
        Path(temporary).unlink(missing_ok=True)


def _why(error: Exception) -> str:
    """Without the address, whose query may hold a token."""
    if isinstance(error, httpx.HTTPStatusError):
        return f"its server answers {error.response.status_code}"
    reason = network_reason(error)
    return type(error).__name__ if reason is None else reason.text


@contextlib.contextmanager
def _file_lock(target: Path) -> Iterator[None]:
    """Hold an exclusive lock beside ``target``, so that several processes make it once."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / f".{target.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)
