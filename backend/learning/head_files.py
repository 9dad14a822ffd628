"""Heads on disk, without pickle: arrays as safetensors, all else as JSON, in one folder for all heads of a version.

``heads.json`` holds ``format_version``, ``arrays_sha256`` and, for each head in order, its fields;
``arrays.safetensors`` holds the float64 arrays as ``<i>.mean``, ``<i>.scale``, ``<i>.coef``, ``<i>.intercept``,
``<i>.temperature``, ``<i>.bias`` and, for numbers, ``<i>.directions`` and ``<i>.shrinkage``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from backend.errors import HeadDamaged
from backend.learning.disk import NO_FILE, disk
from backend.learning.heads import Float64Array, Head, Spread

FORMAT_VERSION = 1
MANIFEST, ARRAYS = "heads.json", "arrays.safetensors"
_ARRAYS = ("mean", "scale", "coef", "intercept", "temperature", "bias")
# What JSON, safetensors and our own checks find wrong with contents.
_WRONG = (ValueError, LookupError, TypeError, AttributeError, RecursionError, SafetensorError)
_FIELDS = ("control", "level", "kind", "calibrated", "n_labels", "fingerprint", "tolerance")


def write_heads(heads: Sequence[Head], folder: Path, **about: Any) -> None:
    """Write ``heads`` into ``folder``, which exists and is empty; ``about`` are further JSON values of the manifest."""
    arrays: dict[str, Float64Array] = {}
    entries: list[dict[str, Any]] = []
    for i, head in enumerate(heads):
        entry: dict[str, Any] = {name: getattr(head, name) for name in _FIELDS}
        entry["classes"] = list(head.classes)
        entry["value_range"] = list(head.value_range)
        entry["label_counts"] = dict(head.label_counts)
        entry["metrics"] = dict(head.metrics)
        if head.prior is not None:
            entry |= {"prior": head.prior.tolist(), "prior_stated": list(head.prior_stated)}
        arrays |= {f"{i}.{name}": np.ascontiguousarray(getattr(head, name), dtype=np.float64) for name in _ARRAYS}
        if head.spread is not None:
            spread = head.spread
            arrays[f"{i}.directions"] = np.ascontiguousarray(spread.directions)
            arrays[f"{i}.shrinkage"] = np.ascontiguousarray(spread.shrinkage)
            entry["spread"] = {name: getattr(spread, name) for name in ("variance", "mean_leverage", "alpha")}
        entries.append(entry)
    data = save(arrays)
    manifest = {
        **about,
        "format_version": FORMAT_VERSION,
        "arrays_sha256": hashlib.sha256(data).hexdigest(),
        "heads": entries,
    }
    (folder / ARRAYS).write_bytes(data)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, allow_nan=False), encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest alone.

    Raises
    ------
    HeadDamaged
        It is missing, not JSON, or of another format version.
    StoreUnavailable
        It cannot be opened or read now, which is no damage.
    """
    try:
        with disk(_name(folder)):
            text = (folder / MANIFEST).read_text(encoding="utf-8")
        manifest = json.loads(text)
        version = manifest["format_version"]
    except (*NO_FILE, *_WRONG) as error:
        raise _damaged(folder, f"{type(error).__name__}: {error}") from error
    if version != FORMAT_VERSION:
        raise _damaged(folder, f"format version {version!r}, this release reads {FORMAT_VERSION}")
    found: dict[str, Any] = manifest
    return found


def read_heads(folder: Path) -> tuple[list[Head], dict[str, Any]]:
    """The heads of a folder, and its manifest.

    Raises
    ------
    HeadDamaged
        A file is missing, or is not what :func:`write_heads` wrote.
    StoreUnavailable
        A file cannot be opened or read now.
    """
    manifest = read_manifest(folder)
    try:
        with disk(_name(folder)):
            data = (folder / ARRAYS).read_bytes()
        if hashlib.sha256(data).hexdigest() != manifest["arrays_sha256"]:
            raise ValueError("the arrays do not match their checksum")
        arrays = load(data)
        return [_head(i, entry, arrays) for i, entry in enumerate(manifest["heads"])], manifest
    except (*NO_FILE, *_WRONG) as error:
        raise _damaged(folder, f"{type(error).__name__}: {error}") from error


def _head(i: int, entry: Mapping[str, Any], arrays: Mapping[str, Float64Array]) -> Head:
    spread = None
    if "spread" in entry:
        spread = Spread(**entry["spread"], directions=arrays[f"{i}.directions"], shrinkage=arrays[f"{i}.shrinkage"])
    low, high = entry["value_range"]
    fields: dict[str, Any] = {name: entry[name] for name in _FIELDS}
    fields |= {name: arrays[f"{i}.{name}"] for name in _ARRAYS}
    # Heads of earlier releases weigh the classes alike.
    prior = np.array(entry["prior"], dtype=np.float64) if "prior" in entry else None
    head = Head(
        **fields,
        classes=tuple(entry["classes"]),
        value_range=(float(low), float(high)),
        label_counts=entry["label_counts"],
        metrics=entry["metrics"],
        spread=spread,
        prior=prior,
        prior_stated=tuple(entry.get("prior_stated", ())),
    )
    if prior is not None and (prior.shape != (len(head.classes),) or not ((prior > 0) & (prior < 1)).all()):
        raise ValueError(f"the prior of head '{head.control}' is {entry['prior']!r:.80}")
    k, d = len(head.classes) or 1, head.dim
    shapes = {"scale": (d,), "coef": (k, d), "intercept": (k,), "temperature": (k,), "bias": (k,)}
    for name, shape in shapes.items():
        if getattr(head, name).shape != shape:
            raise ValueError(f"{name} of head '{head.control}' has shape {getattr(head, name).shape}, not {shape}")
    return head


def _name(folder: Path) -> str:
    return f"The heads in {folder.parent.name}/{folder.name}"


def _damaged(folder: Path, why: str) -> HeadDamaged:
    return HeadDamaged(f"{_name(folder)} cannot be read: {why}.", hint="Restore another version, or train again.")
