"""Values of a labelling config that name fields of a task, read as Label Studio's editor reads them. Pure functions.

``$image`` is a field; ``$slide.picture`` and ``$slides[0].picture`` are parts of one. A field whose own name is the whole
path wins over a part of another (as lodash' ``get``, which the editor uses, has it).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

MISSING: Final = object()
"""What :func:`look_up` gives where a task does not have the field."""

_FIELD = re.compile(r"\$([^$,\s]+)")
_STEP = re.compile(r"[^.\[\]]+")


def field_of(value: str) -> str | None:
    """The path in a value that is nothing but ``$path``; ``None`` for text, also for text with fields in it."""
    found = _FIELD.fullmatch(value.strip())
    return found.group(1) if found else None


def look_up(data: Mapping[str, Any], path: str) -> Any:
    """What a task has at ``path`` (``a``, ``a.b``, ``a[0].b``), or :data:`MISSING`."""
    if path in data:
        return data[path]
    here: Any = data
    for step in _STEP.findall(path):
        if isinstance(here, Mapping) and step in here:
            here = here[step]
        elif _is_list(here) and step.isascii() and step.isdecimal() and len(step) < 10 and int(step) < len(here):
            here = here[int(step)]
        else:
            return MISSING
    return MISSING if here is data else here


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)
