"""Which labelled slides are most like one, as a page: behind the password, since it names other slides and leads to them."""

from __future__ import annotations

import html
import json
import threading
from collections import OrderedDict
from dataclasses import dataclass

from backend.label_studio.services import Services
from backend.learning.snapshot import Neighbour
from backend.results.bag import SLIDE_REF
from backend.slides.source import SlideRef
from backend.web.signing import SlideSigner

PICTURE_PX = 144
_KEPT_PLACES = 4096


@dataclass(frozen=True)
class _Place:
    """Where the slide of a stored bag lies, and its width and height in level-0 pixels."""

    ref: SlideRef
    size: tuple[int, int]


class Neighbours:
    """The nearest labelled slides of stored bags, as HTML; threads may share one."""

    def __init__(self, services: Services, signer: SlideSigner) -> None:
        self._services = services
        self._signer = signer
        self._places: OrderedDict[str, _Place] = OrderedDict()
        self._lock = threading.Lock()

    def page(self, key: str, project: int, assets: str) -> str:
        """The page of a bag under ``/slides/KEY/similar``; its addresses are relative, so that it may lie below any path.

        ``assets`` is where the style sheet lies, relative to it.

        Raises
        ------
        ResultNotFound
            The bag has no result.
        """
        result = self._services.store.need(key, latents=False)
        snapshot = self._services.versions.snapshot(project)
        found = [] if snapshot is None else snapshot.neighbours(key, result.slide_embedding)
        name = html.escape(str(result.provenance.get("slide", key)))
        rows = "".join(self._row(neighbour, project) for neighbour in found)
        shown = f"<ol>{rows}</ol>" if rows else "<p>None is known until the next training.</p>"
        return (
            '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="color-scheme" content="light dark">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<title>Slides like {name}</title><link rel="stylesheet" href="{assets}/overview.css"></head>'
            f"<body><main><h1>Labelled slides most like {name}</h1>{shown}<p>Research use only.</p></main></body></html>"
        )

    def _row(self, neighbour: Neighbour, project: int) -> str:
        name, label = html.escape(neighbour.name), html.escape(neighbour.label)
        about = f"<b>{label}</b>, similarity {neighbour.similarity:.2f}"
        if neighbour.same_patient:
            about += ", same patient: no second opinion"
        place = self._place(neighbour.key)
        if place is None or place.ref.kind == "patches":  # deleted since, or nothing that a panel could show
            return f"<li>{name}: {about}</li>"
        picture = self._picture(place, project)
        image = (
            f'<img src="../../{picture}" alt="" width="{PICTURE_PX}" height="{PICTURE_PX}" loading="lazy"> '
            if picture
            else ""
        )
        return f'<li><a href="../{neighbour.key}?project={project}">{image}{name}</a>: {about}</li>'

    def _picture(self, place: _Place, project: int) -> str:
        thumbnail = self._services.thumbnails.get(self._services.thumbnails.id_for(place.ref.identity))
        if thumbnail is not None:
            return f"thumbnails/{thumbnail.id}.jpg"
        if place.ref.kind != "file":
            return ""  # a slide that lies elsewhere would be downloaded whole for a picture of this size
        edge = max(place.size)
        left, top = (place.size[0] - edge) // 2, (place.size[1] - edge) // 2
        token = self._signer.token(place.ref, project)
        return f"deepzoom/{token}/region.jpg?x={left}&amp;y={top}&amp;size={edge}&amp;px={PICTURE_PX}"

    def _place(self, key: str) -> _Place | None:
        with self._lock:
            found = self._places.get(key)
            if found is not None:
                self._places.move_to_end(key)
                return found
        result = self._services.store.get(key, latents=False)
        text = result.provenance.get(SLIDE_REF) if result is not None else None
        if result is None or not isinstance(text, str):
            return None
        found = _Place(SlideRef.from_json(json.loads(text)), result.bag.slide_size)
        with self._lock:
            self._places[key] = found
            while len(self._places) > _KEPT_PLACES:
                self._places.popitem(last=False)
        return found
