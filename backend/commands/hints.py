"""What a person at the command line can do about an error: the hints of the slides' errors speak of a task's fields,
which a command has not.
"""

from __future__ import annotations

from backend.errors import BackendError, MppUnknown, SlideTooSmall

_HINTS: dict[type[BackendError], str] = {
    MppUnknown: "Give it as --mpp (µm per pixel, such as --mpp 0.5); DEFAULT_MPP sets one scale for all your slides.",
    SlideTooSmall: "If this is a thumbnail, give the slide itself; if its scale is another, give that as --mpp.",
}


def hint_for(error: BackendError) -> str:
    """The hint in terms of the command's options; the error's own where that names none of a task's fields."""
    return _HINTS.get(type(error), error.hint)


def explain(error: BackendError) -> str:
    """Message and hint of an error, for a line or a cell of a table."""
    return f"{error.message} {hint_for(error)}".strip()
