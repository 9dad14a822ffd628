"""The panel's own files: HTML, modules, style sheets, and what npm brought, under an address that changes with their content."""

from __future__ import annotations

import hashlib
import html
import re
from importlib import resources
from pathlib import Path

from fastapi import APIRouter, HTTPException, Response
from fastapi.responses import FileResponse, HTMLResponse

from backend.errors import PanelNotBuilt
from backend.settings import Settings

_TYPES = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
_VENDOR = "vendor/openseadragon.min.js"
_LOOPBACK = re.compile(r"(https?)://(?:localhost|127\.0\.0\.1)(:\d+)?$")


class PanelAssets:
    """The files below ``backend/web/panel``, read once."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder or Path(str(resources.files("backend.web") / "panel"))
        files = sorted(
            path for path in self._folder.rglob("*") if path.suffix in _TYPES and "node_modules" not in path.parts
        )
        self._files = {path.relative_to(self._folder).as_posix(): path for path in files}
        content = hashlib.sha256()
        for name, path in self._files.items():
            content.update(name.encode() + b"\0" + path.read_bytes())
        self.version = content.hexdigest()[:16]

    def page(self, name: str, prefix: str = "") -> str:
        """A page's HTML, its ``{prefix}`` replaced by what the browser has in front of our paths, ``{assets}`` by where the assets are.

        Raises
        ------
        PanelNotBuilt
            OpenSeadragon is not there.
        """
        if _VENDOR not in self._files:
            raise PanelNotBuilt(
                "OpenSeadragon, which shows the slide, is not installed.", hint="Run `make panel`, and start again."
            )
        text = (self._folder / name).read_text(encoding="utf-8")
        prefix = html.escape(prefix)
        return text.replace("{assets}", f"{prefix}/assets/{self.version}").replace("{prefix}", prefix)

    def router(self) -> APIRouter:
        """``/assets/VERSION/NAME``. Open to all: there is nothing secret in them."""
        router = APIRouter(include_in_schema=False)

        @router.get("/assets/{version}/{name:path}")
        def asset(version: str, name: str) -> Response:
            path = self._files.get(name)
            if path is None:
                raise HTTPException(404, "There is no such file.")
            # Under another version's address the content is not what was asked for: it must not be kept there.
            fresh = version == self.version
            kept = "public, max-age=31536000, immutable" if fresh else "no-store"
            return FileResponse(path, media_type=_TYPES[path.suffix], headers={"Cache-Control": kept})

        return router


def page_headers(settings: Settings) -> dict[str, str]:
    """Headers of every page: it loads only what is ours, and only the configured Label Studio may frame it.

    No ``X-Frame-Options``: it knows no list of sites, and a browser that obeys it would refuse Label Studio's frame.
    """
    ancestors = " ".join(["'self'", *framers(settings)])
    policy = (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
        f"base-uri 'none'; form-action 'none'; frame-ancestors {ancestors}"
    )
    return {
        "Content-Security-Policy": policy,
        "Cache-Control": "no-store",
        "Referrer-Policy": "same-origin",
    }


def framers(settings: Settings) -> list[str]:
    """Origins whose pages may frame ours. On this machine ``localhost`` and ``127.0.0.1`` are one place with two names."""
    found: dict[str, None] = {}
    for url in settings.label_studio_public_url or (settings.label_studio_url,):
        match = re.match(r"https?://[^/\s;,']+", url)
        if match is None:
            continue
        loopback = _LOOPBACK.fullmatch(match[0])
        hosts = ("localhost", "127.0.0.1") if loopback else ()
        found |= dict.fromkeys(
            [f"{loopback[1]}://{host}{loopback[2] or ''}" for host in hosts] if loopback else [match[0]]
        )
    return list(found)


def message_page(title: str, message: str, hint: str, status: int, settings: Settings) -> HTMLResponse:
    """A page that says what is wrong, for a person who followed a link."""
    body = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="color-scheme" content="light dark">'
        f"<title>{html.escape(title)}</title></head><body><main><h1>{html.escape(title)}</h1>"
        f"<p>{html.escape(message)}</p><p>{html.escape(hint)}</p></main></body></html>"
    )
    return HTMLResponse(body, status, page_headers(settings))
