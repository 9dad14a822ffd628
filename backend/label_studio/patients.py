"""Whose slide a task shows: by a field of the task, else as far as the settings allow by the slide's file.

Two slides are of one patient where their names are the same but for case and white space. What identifies a person
stays where it was: only a hash of it is stored with heads and snapshots, or exported, unless it is the task's own
field.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backend.kept_key import kept_key
from backend.settings import Settings
from backend.slides.dicom_series import header_of
from backend.slides.names import slide_path
from backend.slides.source import SlideRef

# Project, tissue source site, participant: the part of a TCGA barcode that names a patient.
_TCGA = re.compile(r"(?<![A-Za-z0-9])TCGA-[A-Za-z0-9]{2}-[A-Za-z0-9]{4}(?![A-Za-z0-9])", re.IGNORECASE)


@dataclass(frozen=True)
class Patient:
    """``key`` is the same for slides of one patient, and tells nobody who that is; ``name`` is what may be shown and
    exported."""

    key: str
    name: str


class PatientField(ValueError):
    """The task's field holds what is no name; the text says so."""


def patient_of(data: Mapping[str, Any], ref: SlideRef, settings: Settings) -> Patient | None:
    """The patient of a task's slide, ``None`` if nothing says whose it is.

    Parameters
    ----------
    data
        Of the task.
    ref
        Its slide: one on another machine is not downloaded for its Patient ID.

    Raises
    ------
    PatientField
        The task's field holds neither text nor a whole number.
    OSError
        The slide's file cannot be read now.
    """
    named = _field(settings.patient_field, data.get(settings.patient_field)) if settings.patient_field else ""
    if named:
        return Patient(_key(named, settings), named)
    for source in settings.patient_from:
        found = _dicom(ref) if source == "dicom" else _barcode(ref)
        if found:
            key = _key(found, settings)
            return Patient(key, f"hmac:{key}")
    return None


def _field(name: str, value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        value = int(value)  # as a table exports whole numbers
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise PatientField(f"its field '{name}' holds {value!r:.40}, which is no name of a patient")
    return str(value).strip()


def _key(name: str, settings: Settings) -> str:
    """Under a key of this MODEL_DIR: of numbers that hospitals give, a plain hash is found out by trying them."""
    secret = kept_key(settings.model_dir / "patients.key")
    return hmac.new(secret, " ".join(name.split()).casefold().encode(), hashlib.sha256).hexdigest()[:16]


def _barcode(ref: SlideRef) -> str:
    found = _TCGA.search(slide_path(ref.locations[0]).rstrip("/").rsplit("/", 1)[-1])
    return found.group().upper() if found else ""


def _dicom(ref: SlideRef) -> str:
    """The Patient ID (0010,0020); '' of what is no DICOM, or has a damaged header, which its analysis says."""
    path = Path(ref.locations[0])
    header = header_of(path) if ref.kind == "file" and path.is_file() else None
    return header.patient_id.strip() if header is not None else ""
