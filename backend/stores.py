"""Names of remote stores, Label Studio's and fsspec's, and which extra of this package brings the driver of one."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from fsspec.registry import known_implementations

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
# What fsspec also knows by a name, and what is no store elsewhere: files of this machine, and things laid over other stores.
_NO_STORES = frozenset(
    {
        *("file", "local", "asynclocal", "dir", "data", "generic", "reference", "http", "https"),
        *("zip", "tar", "libarchive", "blockcache", "cached", "filecache", "simplecache", "dask"),
    }
)


@dataclass(frozen=True)
class _Store:
    """A kind of store: all its names, the one for ``REMOTE_STORES`` first, and the extra that its driver comes with."""

    names: tuple[str, ...]
    extra: str


_STORES = (
    _Store(("s3", "s3a"), "s3"),
    _Store(("gs", "gcs"), "gcs"),
    _Store(("az", "abfs", "abfss", "azure-blob"), "azure"),
)
_LABEL_STUDIOS = {"azure-blob": "az"}  # whose `s3` and `gs` are fsspec's too


def store_name(url_or_name: str) -> str:
    """The first name of the kind of store that a URL, or another of its names, says; lower case."""
    match = _SCHEME.match(url_or_name)
    name = (match[1] if match else url_or_name).lower()
    return next((store.names[0] for store in _STORES if name in store.names), name)


def is_allowed(url: str, allowed: Collection[str]) -> bool:
    """Whether the kind of store of ``url`` is among ``allowed``, under whichever of its names."""
    return store_name(url) in {store_name(name) for name in allowed}


def how_to_allow(url: str) -> str:
    """What whoever wants to read from this store is to do."""
    name = store_name(url)
    if name in known_implementations and name not in _NO_STORES:
        return f"Add {name} to REMOTE_STORES to allow it."
    return f"There is no driver for that kind; {', '.join(s.names[0] for s in _STORES)} and others of fsspec's can be read."


def fsspec_url(url: str) -> str:
    """A store's URL as fsspec takes it, where Label Studio names the kind of store otherwise."""
    scheme, colon, rest = url.partition("://")
    return _LABEL_STUDIOS.get(scheme.lower(), scheme) + colon + rest


def driver_hint(url: str) -> str:
    """What to install where the driver of this store is not there."""
    name = store_name(url)
    extra = next((store.extra for store in _STORES if store.names[0] == name), "")
    if extra:
        return f"Install this package with the extra `{extra}`: pip install '.[{extra}]'"
    if name in known_implementations:
        return "Install the package that the message names, where backend and workers run."
    return f"Stores are {', '.join(s.names[0] for s in _STORES)}, and others that fsspec knows."
