"""Signed references to slides: what stands in the address of a panel, its tiles and its overlays.

Whoever holds such an address may look at that one slide, and nobody can make one up. The key is made once, kept in ``MODEL_DIR`` and never
leaves it, so `import` and the server must share that folder.

A token is ``PAYLOAD.SIGNATURE``, both base64url without padding (RFC 4648, 5). The payload is zlib-compressed JSON: ``slide``, a
:class:`~backend.slides.source.SlideRef`, and ``project``, the Label Studio project that the address was made for, if any. The
signature is the HMAC-SHA256 of the payload's text (RFC 2104) under that key.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import zlib
from dataclasses import dataclass
from pathlib import Path

from backend.errors import SignatureInvalid, SourceError
from backend.kept_key import kept_key
from backend.slides.source import SlideRef

MAX_TOKEN_CHARS = 8192
_PURPOSE = b"wsc-backend slide 1\0"  # another use of the same key must never give the same signature


@dataclass(frozen=True)
class SignedSlide:
    """What a token says: the slide, and the Label Studio project it was made for (``None``: not for one)."""

    ref: SlideRef
    project: int | None = None


class SlideSigner:
    """Makes and reads tokens. The key is ``model_dir/signing.key``, made when it is first needed."""

    def __init__(self, model_dir: Path) -> None:
        self._path = model_dir / "signing.key"
        self._key = b""

    def token(self, ref: SlideRef, project: int | None = None) -> str:
        """The token of a slide.

        Raises
        ------
        SourceError
            It is a bag of patches, which has no slide to look at.
        """
        if ref.kind == "patches":
            raise SourceError(
                "A bag of patches has no slide to look at.", hint="Its patches are the pages of the task."
            )
        content = {"slide": ref.to_json(), "project": project}
        packed = zlib.compress(json.dumps(content, separators=(",", ":")).encode(), 9)
        payload = _encode(packed)
        return f"{payload}.{_encode(self._sign(payload))}"

    def read(self, token: str) -> SignedSlide:
        """What a token says.

        Raises
        ------
        SignatureInvalid
            It is not one that this backend made.
        """
        payload, _, signature = token.partition(".")
        # The signature is looked at first: nothing of a forged payload is decompressed or parsed.
        if len(token) > MAX_TOKEN_CHARS or not hmac.compare_digest(_decode(signature), self._sign(payload)):
            raise SignatureInvalid(
                "This address was not made by this backend, or it was changed.",
                hint="Open the slide from Label Studio again; if MODEL_DIR was replaced, run `wsc-backend import` into a new project.",
            )
        content = json.loads(zlib.decompress(_decode(payload)))
        project = content["project"]
        return SignedSlide(SlideRef.from_json(content["slide"]), None if project is None else int(project))

    def panel_url(self, base_url: str, ref: SlideRef, project: int | None = None) -> str:
        """Address of a slide's panel below ``base_url``."""
        return f"{base_url}/panel?slide={self.token(ref, project)}"

    def load(self) -> None:
        """Read the key, or make it; otherwise that happens when it is first needed."""
        if not self._key:
            self._key = kept_key(self._path)

    def _sign(self, payload: str) -> bytes:
        self.load()
        return hmac.new(self._key, _PURPOSE + payload.encode(), hashlib.sha256).digest()


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _decode(text: str) -> bytes:
    """The bytes of base64url text; empty for what is none, which no signature equals."""
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        return b""
