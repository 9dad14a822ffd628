"""Slides kept open between requests, within limits of number and memory; threads share them, and none of them waits for a download."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import openslide

from backend.settings import Settings
from backend.slides.reader import ImageSlide, Slide, open_slide
from backend.slides.source import SlideRef, SourceResolver
from backend.slides.underway import without_waiting

MAX_OPEN = 32
MAX_IMAGE_BYTES = 1_000_000_000
"""Memory for plain images, which are held decoded; the one in use stays open whatever its size."""
SHARED_CACHE_BYTES = 256 * 2**20
"""OpenSlide's decoded tiles, of all slides together."""


@dataclass
class _Entry:
    """One open slide. It is closed once it is retired and nobody uses it."""

    opening: threading.Lock = field(default_factory=threading.Lock)
    slide: Slide | None = None
    users: int = 0
    retired: bool = False

    @property
    def image_bytes(self) -> int:
        """What a plain image holds in memory, its reduced copies included (1 + 1/16 + 1/256); 0 for other slides."""
        if not isinstance(self.slide, ImageSlide):
            return 0
        width, height = self.slide.size
        return width * height * 3 * 273 // 256


class SlideCache:
    """The slides that were looked at last, open."""

    def __init__(
        self,
        settings: Settings,
        resolver: SourceResolver,
        *,
        max_open: int = MAX_OPEN,
        max_image_bytes: int = MAX_IMAGE_BYTES,
    ) -> None:
        self._settings = settings
        self._resolver = resolver
        self._max_open = max_open
        self._max_image_bytes = max_image_bytes
        self._decoded = openslide.OpenSlideCache(SHARED_CACHE_BYTES)
        self._entries: OrderedDict[SlideRef, _Entry] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    @contextmanager
    def slide(self, ref: SlideRef) -> Iterator[Slide]:
        """The slide of ``ref``, opened if need be, and open for as long as the context lasts.

        Raises
        ------
        DownloadUnderWay
            It is not on this machine yet, and is being downloaded in the background.
        SourceError, SlideError
            It is gone, has changed since, may not be read, or cannot be opened (nothing is kept then).
        """
        entry = self._acquire(ref)
        try:
            with entry.opening:  # several tiles of one slide are asked for at once: it is opened once
                if entry.slide is None:
                    with without_waiting():
                        (path,) = self._resolver.fetch(ref)
                    entry.slide = open_slide(path, self._settings, cache=self._decoded)
            self._trim(ref)
            yield entry.slide
        except BaseException:
            if entry.slide is None:
                self._forget(ref, entry)
            raise
        finally:
            self._release(entry)

    def check(self, ref: SlideRef) -> None:
        """Raise what :meth:`slide` would raise if the slide's file is gone or was replaced; close what was open of it."""
        try:
            with without_waiting():
                self._resolver.fetch(ref)
        except BaseException:
            with self._lock:
                entry = self._entries.get(ref)
            if entry is not None:
                self._forget(ref, entry)
            raise

    def close(self) -> None:
        """Close every slide (those in use when their users are done)."""
        with self._lock:
            entries = list(self._entries.items())
        for ref, entry in entries:
            self._forget(ref, entry)

    def _acquire(self, ref: SlideRef) -> _Entry:
        with self._lock:
            entry = self._entries.setdefault(ref, _Entry())
            self._entries.move_to_end(ref)
            entry.users += 1
            return entry

    def _release(self, entry: _Entry) -> None:
        with self._lock:
            entry.users -= 1
            done = entry.retired and entry.users == 0
        if done:
            _close(entry)

    def _forget(self, ref: SlideRef, entry: _Entry) -> None:
        with self._lock:
            if self._entries.get(ref) is entry:
                del self._entries[ref]
            entry.retired = True
            idle = entry.users == 0
        if idle:
            _close(entry)

    def _trim(self, current: SlideRef) -> None:
        with self._lock:
            surplus = len(self._entries) - self._max_open
            over = sum(entry.image_bytes for entry in self._entries.values()) - self._max_image_bytes
            oldest = []
            for ref, entry in self._entries.items():
                if surplus <= 0 and over <= 0:
                    break
                if ref != current and (surplus > 0 or entry.image_bytes):
                    oldest.append((ref, entry))
                    surplus -= 1
                    over -= entry.image_bytes
        for ref, entry in oldest:
            self._forget(ref, entry)


def _close(entry: _Entry) -> None:
    slide, entry.slide = entry.slide, None
    if slide is not None:
        slide.close()
