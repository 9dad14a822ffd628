"""Pictures of slides for the labelling canvas: JPEG, long side at most 2000 px (beyond that the editor becomes slow)."""

from __future__ import annotations

import hashlib
import hmac
import io
import json
import re
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image

from backend.errors import SlideNotFound
from backend.kept_key import kept_key
from backend.slides.reader import Slide
from backend.slides.render import SHOWN_MAX_PX

_ID = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Thumbnail:
    """A stored picture: its id, and its width and height in pixels."""

    id: str
    width: int
    height: int


class ThumbnailStore:
    """Thumbnails below ``model_dir/thumbnails``.

    An id is an HMAC of the slide's identity under a key that is made once and kept beside the pictures: whoever has not been given
    the address of a thumbnail cannot guess it.
    """

    def __init__(self, model_dir: Path) -> None:
        self._folder = model_dir / "thumbnails"

    def id_for(self, identity: str) -> str:
        """The id of a slide's thumbnail: 40 hexadecimal digits."""
        return hmac.new(kept_key(self._folder / "key"), identity.encode(), hashlib.sha256).hexdigest()[:40]

    def make(self, identity: str, slide: Slide) -> Thumbnail:
        """Render and store the thumbnail of ``slide`` unless it is there already."""
        name = self.id_for(identity)
        present = self.get(name)
        if present is not None:
            return present
        pixels = slide.overview(SHOWN_MAX_PX)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=88, optimize=True)
        thumbnail = Thumbnail(name, pixels.shape[1], pixels.shape[0])
        # The picture first: whoever sees the JSON finds the picture too.
        _write_atomically(self.path(name), buffer.getvalue())
        _write_atomically(self._folder / f"{name}.json", json.dumps(asdict(thumbnail)).encode())
        return thumbnail

    def get(self, name: str) -> Thumbnail | None:
        """The thumbnail of this id, or ``None``."""
        if not _ID.fullmatch(name):
            return None
        try:
            return Thumbnail(**json.loads((self._folder / f"{name}.json").read_text()))
        except FileNotFoundError:
            return None

    def path(self, name: str) -> Path:
        """The JPEG file of this id; raises :class:`SlideNotFound` for what is no id."""
        if not _ID.fullmatch(name):
            raise SlideNotFound("There is no such thumbnail.")
        return self._folder / f"{name}.jpg"


def _write_atomically(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
