"""What one slide of many may do to a command: be named, and stop nothing else."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from backend.errors import BackendError, UnexpectedFailure

log = logging.getLogger(__name__)


@contextmanager
def failures_named(slide: Path) -> Iterator[None]:
    """Whatever a library raises over ``slide`` as :class:`~backend.errors.UnexpectedFailure`, with the traceback in the
    log.
    """
    try:
        yield
    except BackendError:
        raise
    except OSError as error:
        raise UnexpectedFailure(
            f"{slide.name}: {error.strerror or error}.", hint="Is its disk or share there?"
        ) from error
    except Exception as error:
        log.exception("%s failed", slide)
        raise UnexpectedFailure(
            f"{slide.name}: {type(error).__name__}: {error}.", hint="The log has the traceback; the other slides go on."
        ) from error
