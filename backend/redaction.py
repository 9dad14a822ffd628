"""What may be shown of addresses and texts in which a secret may stand. Nothing here asks whether an address is a good one.

A password that was not percent-encoded (``/``, ``@``, ``#`` as ``openssl rand -base64`` gives them) moves to where a parser sees a path, a port or a
fragment. So no parser decides here what is shown: what stands before an ``@`` or after a ``?`` or ``#`` is not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any
from urllib.parse import quote, quote_plus, unquote

from pydantic import SecretStr

from backend.settings import HOW_TO_ENCODE, Settings

HIDDEN = "…"
ENCODE_HINT = f"In an address, {HOW_TO_ENCODE}."
_LEAST_CHARS = 4
"""A shorter secret is in any text by chance: replacing it would tell it rather than hide it."""
# fsspec chains stores: filecache::https://…
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.:-]*://")
_HOST = re.compile(r"(?:\[[0-9A-Fa-f:.%]+\]|[^\s:\[\]@?#/]*)(?::\d{1,5})?")
# Options of Redis' client that are words (`none`) and paths: hidden, they would be missing from sentences that have nothing to do with them.
_PLAIN = re.compile(r"db|protocol|ssl_(?!password).*")
_PROXIES = ("http_proxy", "https_proxy", "all_proxy", "ftp_proxy")


def shown_address(address: str) -> str:
    """``address`` without user, password, query and fragment, whether it parses or not. A path is shown as it is.

    >>> shown_address("redis://:pa/ss@word@host:6379/0")
    'redis://…@host:6379/0'
    """
    address = address.strip()
    scheme = _SCHEME.match(address)
    if scheme is None:
        if address.startswith(("/", ".", "~")):
            return address
        return HIDDEN if set("@?#") & set(address) else address
    rest = address[scheme.end() :]
    before, at, _ = rest.rpartition("@")
    if at and set("?#") & set(before):
        return (
            scheme[0] + HIDDEN
        )  # a query with an @, or a password with a ? or #: either way it cannot be told where it ends
    place = rest[len(before) + 1 :] if at else rest
    place = re.split(r"[?#]", place, maxsplit=1)[0]
    host = place.split("/", 1)[0]
    if not _HOST.fullmatch(host):
        return scheme[0] + HIDDEN
    return f"{scheme[0]}{HIDDEN + '@' if at else ''}{place}"


class Redactor:
    """Takes secrets out of texts that others have written: errors of libraries, their log lines."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        found = {form for secret in secrets for form in _forms(secret) if len(form) >= _LEAST_CHARS}
        # The longest first, so that none is left over of one that holds another.
        self._pattern = re.compile("|".join(map(re.escape, sorted(found, key=len, reverse=True)))) if found else None

    def __call__(self, text: str) -> str:
        """``text`` with :data:`HIDDEN` in place of each secret."""
        return text if self._pattern is None else self._pattern.sub(HIDDEN, text)

    def within(self, value: Any) -> Any:
        """JSON with every text in it redacted."""
        if isinstance(value, str):
            return self(value)
        if isinstance(value, Mapping):
            return {name: self.within(part) for name, part in value.items()}
        return [self.within(part) for part in value] if isinstance(value, list | tuple) else value


def redactor_for(*addresses: str) -> Redactor:
    """For what these addresses keep secret."""
    return Redactor(secret for address in addresses for secret in _secrets_of(address))


def redactor_of(settings: Settings, environ: Mapping[str, str]) -> Redactor:
    """For all that the settings and the proxies of the environment keep secret."""
    return _redactor(settings, tuple(value for name, value in environ.items() if name.lower() in _PROXIES))


@lru_cache(maxsize=4)
def _redactor(settings: Settings, proxies: tuple[str, ...]) -> Redactor:
    secrets: list[str] = []
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if isinstance(value, SecretStr) and name != "redis_url":
            secrets.append(value.get_secret_value())
    for address in (settings.redis_url.get_secret_value(), settings.results_url, settings.model, *proxies):
        secrets += _secrets_of(address)
    for address in (settings.label_studio_url, *settings.label_studio_public_url, *settings.public_url):
        secrets += _secrets_of(address)
    return Redactor(secrets)


def _secrets_of(address: str) -> list[str]:
    """What :func:`shown_address` leaves out: user and password, together and alone, and each value of the query."""
    scheme = _SCHEME.match(address)
    if scheme is None:
        return []
    rest = address[scheme.end() :]
    before, at, after = rest.rpartition("@")
    found: list[str] = []
    if at:
        _, colon, password = before.partition(":")
        found += [password] if colon else [before]
    query = re.split(r"[?#]", after if at else rest, maxsplit=1)
    if len(query) > 1:
        found.append(query[1])
        parts = [part.partition("=") for part in re.split("[&;]", query[1])]
        found += [value for name, _, value in parts if not _PLAIN.fullmatch(name)]
    return found


def _forms(secret: str) -> set[str]:
    return {secret, unquote(secret), quote(secret, safe=""), quote(secret), quote_plus(secret)}
