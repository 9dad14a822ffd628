"""Predictions as JSON, written once: a heatmap's run-length codes are some 40 000 numbers, and a stored bag is asked for again and again."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

from pydantic_core import to_json

_MAX_BYTES = 64 * 2**20
MAX_ANSWERS = 256
"""How many answers are remembered, here and where they are made: one that is made anew is another object, and its old text is of no use."""


class JsonTexts:
    """JSON of the last slots of answers. A slot must not be changed once it was asked for; errors as :func:`pydantic_core.to_json`."""

    def __init__(self, max_bytes: int = _MAX_BYTES, max_answers: int = MAX_ANSWERS) -> None:
        self._max_bytes = max_bytes
        self._max_answers = max_answers
        self._held = 0
        # The slot is kept beside its text, so that its id stays its own.
        self._texts: OrderedDict[int, tuple[object, bytes]] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, slot: dict[str, Any] | list[Any]) -> bytes:
        """``slot`` as JSON."""
        if not slot:
            return b"[]"
        name = id(slot)
        with self._lock:
            if name in self._texts:
                self._texts.move_to_end(name)
                return self._texts[name][1]
        text = to_json(slot, inf_nan_mode="null")
        with self._lock:
            if name not in self._texts:
                self._texts[name] = slot, text
                self._held += len(text)
            while len(self._texts) > self._max_answers or (self._held > self._max_bytes and len(self._texts) > 1):
                self._held -= len(self._texts.popitem(last=False)[1][1])
        return text
