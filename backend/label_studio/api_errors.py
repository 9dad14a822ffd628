"""What Label Studio's answers, and the lack of them, mean as errors of ours."""

from __future__ import annotations

from collections.abc import Mapping

import httpx
from label_studio_sdk.core.api_error import ApiError

from backend.certificates import untrusted
from backend.errors import LabelStudioError, LabelStudioUnreachable


class TokenRefused(LabelStudioUnreachable):
    """The token is not accepted (any more). An operator can change that, and then what waits goes on."""

    code = "token_refused"


class RedirectRefused(LabelStudioUnreachable):
    """A redirect from ``LABEL_STUDIO_URL`` to another scheme, host or port. An operator can change the setting, and then what waits goes on."""

    code = "redirect_refused"


class TaskGone(LabelStudioError):
    """The task or project was deleted in Label Studio: there is nothing to push to."""

    code = "task_gone"


def was_sent(cause: BaseException | None) -> bool:
    """Whether a request that failed of ``cause`` may have reached Label Studio all the same."""
    if isinstance(cause, ApiError):
        return (cause.status_code or 0) >= 500  # a proxy's time-out, for one
    return not isinstance(cause, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout)


def unreachable(error: httpx.HTTPError, url: str) -> LabelStudioUnreachable:
    """What a request that got no answer failed of, as far as the system says."""
    if (refused := untrusted(error)) is not None:
        reason, hint = refused
        return LabelStudioUnreachable(f"The certificate of Label Studio at {url} is not trusted: {reason}.", hint=hint)
    return LabelStudioUnreachable(
        f"Label Studio at {url} does not answer ({type(error).__name__}).",
        hint="It is tried again by itself; check LABEL_STUDIO_URL and that Label Studio runs.",
    )


def typed(error: ApiError, url: str) -> LabelStudioError:
    status = error.status_code or 0
    if status >= 500 or status == 429:
        return LabelStudioUnreachable(f"Label Studio at {url} answers {status}.", hint="It is tried again by itself.")
    if status < 400 or (status == 404 and not isinstance(error.body, Mapping)):
        # Label Studio says so in JSON. Text is of something in front of it, which says that while Label Studio starts.
        return LabelStudioUnreachable(
            f"At {url} something else answers than Label Studio ({status}, no JSON).",
            hint="It is tried again by itself; check LABEL_STUDIO_URL and that Label Studio runs.",
        )
    if status in (401, 403):
        return TokenRefused(
            f"Label Studio at {url} refuses the token ({status}).",
            hint="Set LABEL_STUDIO_API_KEY to a current token of a user who may edit the project.",
        )
    if status == 404:
        return TaskGone(f"Label Studio at {url} does not know this any more (404).")
    return LabelStudioError(f"Label Studio at {url} refuses the request ({status}): {str(error.body)[:300]}")
