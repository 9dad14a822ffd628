"""What Label Studio's answers, and the lack of them, mean as errors of ours."""

from __future__ import annotations

from collections.abc import Mapping

import httpx
from label_studio_sdk.core.api_error import ApiError

from backend.errors import LabelStudioError, LabelStudioUnreachable
from backend.reasons import network_reason
from backend.redaction import shown_address


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
    url = shown_address(url)
    text, hint = type(error).__name__, "Check LABEL_STUDIO_URL and that Label Studio runs."
    if isinstance(error, httpx.ProxyError):
        text, hint = f"the proxy in between refuses ({error})", "Check HTTP_PROXY, HTTPS_PROXY and NO_PROXY."
    elif (why := network_reason(error)) is not None:
        text, hint = why.text, f"{why.hint} The address is LABEL_STUDIO_URL."
    return LabelStudioUnreachable(
        f"Label Studio at {url} does not answer: {text}.", hint=f"{hint} It is tried again by itself."
    )


def something_else(url: str, what: str) -> LabelStudioUnreachable:
    """What answers is not Label Studio. That may pass: something in front of it says so while it starts."""
    return LabelStudioUnreachable(
        f"At {shown_address(url)} something else answers than Label Studio ({what}).",
        hint="It is tried again by itself; check LABEL_STUDIO_URL (host, port and path) and that Label Studio runs.",
    )


def typed(error: ApiError, url: str) -> LabelStudioError:
    """What an answer that is an error means."""
    status, in_json = error.status_code or 0, isinstance(error.body, Mapping)
    url = shown_address(url)
    if status == 407:
        return LabelStudioUnreachable(
            f"A proxy on the way to Label Studio at {url} wants a password (407).",
            hint="Write it into HTTP_PROXY and HTTPS_PROXY, or name Label Studio's host in NO_PROXY.",
        )
    if status in (502, 503, 504) and not in_json:
        return LabelStudioUnreachable(
            f"The proxy in front of Label Studio at {url} answers {status}: Label Studio behind it does not.",
            hint="It is tried again by itself. Does Label Studio run, and do the proxies on the way know where?",
        )
    if status >= 500 or status == 429:
        return LabelStudioUnreachable(f"Label Studio at {url} answers {status}.", hint="It is tried again by itself.")
    if status < 400 or (status == 404 and not in_json):
        return something_else(url, f"{status}, no JSON")
    if status in (401, 403):
        return TokenRefused(
            f"Label Studio at {url} refuses the token ({status}).",
            hint="Set LABEL_STUDIO_API_KEY to a current token of a user who may edit the project.",
        )
    if status == 404:
        return TaskGone(f"Label Studio at {url} does not know this any more (404).")
    return LabelStudioError(f"Label Studio at {url} refuses the request ({status}): {str(error.body)[:300]}")
