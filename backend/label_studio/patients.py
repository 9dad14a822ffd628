"""Whose slide a task shows: by a field of the task, else as far as the settings allow by the slide's file.

Two slides are of one patient where their names are the same but for case and white space. What identifies a person stays where it was: only a hash of it is
stored with heads and snapshots, or exported, unless it is the task's own field.
"""

from __future__ import annotations

import hashlib
import math
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from backend.errors import SlideUnreadable
from backend.settings import Settings
from backend.slides.companions import is_dicom
from backend.slides.dicom_header import read_header
from backend.slides.source import SlideRef

# Project, tissue source site, participant: the part of a TCGA barcode that names a patient.
_TCGA = re.compile(r"(?<![A-Za-z0-9])TCGA-[A-Za-z0-9]{2}-[A-Za-z0-9]{4}(?![A-Za-z0-9])", re.IGNORECASE)
_KEPT = 100_000


@dataclass(frozen=True)
class Patient:
    """``key`` is the same for slides of one patient, and tells nobody who that is; ``name`` is what may be shown and exported."""

    key: str
    name: str


class PatientField(ValueError):
    """The task's field holds what is no name; the text says so."""


class PatientLookup:
    """Says whose slide a task shows. Headers that were read are remembered; threads may share one."""

    def __init__(self, settings: Settings) -> None:
        self._field = settings.patient_field
        self._from = settings.patient_from
        self._headers: dict[str, str] = {}
        self._lock = threading.Lock()

    def of(self, data: Mapping[str, Any], ref: SlideRef) -> Patient | None:
        """The patient of a task's slide, ``None`` if nothing says whose it is.

        Raises
        ------
        PatientField
            The field holds neither text nor a whole number.
        OSError
            The slide's file cannot be read now.
        """
        named = _field(self._field, data.get(self._field)) if self._field else ""
        if named:
            return Patient(_key(named), named)
        for source in self._from:
            found = self._dicom(ref) if source == "dicom" else _barcode(ref)
            if found:
                return Patient(_key(found), f"sha256:{_key(found)}")
        return None

    def _dicom(self, ref: SlideRef) -> str:
        """The Patient ID (0010,0020) of a slide on this machine; one that lies elsewhere is not downloaded for it."""
        if ref.kind != "file":
            return ""
        with self._lock:
            known = self._headers.get(ref.identity)
        if known is not None:
            return known
        found = _patient_id(Path(ref.locations[0]))
        with self._lock:
            if len(self._headers) >= _KEPT:
                self._headers.clear()
            self._headers[ref.identity] = found
        return found


def _field(name: str, value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        value = int(value)  # as a table exports whole numbers
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise PatientField(f"its field '{name}' holds {value!r:.40}, which is no name of a patient")
    return str(value).strip()


def _key(name: str) -> str:
    return hashlib.sha256(" ".join(name.split()).casefold().encode()).hexdigest()[:16]


def _barcode(ref: SlideRef) -> str:
    found = _TCGA.search(unquote(urlsplit(ref.locations[0]).path).rstrip("/").rsplit("/", 1)[-1])
    return found.group().upper() if found else ""


def _patient_id(path: Path) -> str:
    files = sorted(entry for entry in path.iterdir() if entry.is_file()) if path.is_dir() else [path]
    for file in files:
        if not is_dicom(file):
            continue
        try:
            return read_header(file).patient_id.strip()
        except SlideUnreadable:
            return ""  # what its analysis says too; here it is a slide whose patient is unknown
    return ""
