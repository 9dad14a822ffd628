"""From the value in a task's field to a file on this machine, by the rules of :mod:`backend.slides.places` and no others.

``resolve`` says what the slide is (that goes into the bag key) without downloading it; ``fetch`` gives the file, and applies every rule again, because
a reference may come out of a queue that others can write to.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast, get_args

from backend.errors import MppUnknown, SlideNotFound, SourceError, SourceRefused, TaskFieldMissing
from backend.paths import StrPath
from backend.results.bag import digest
from backend.settings import Settings
from backend.slides.companions import check_companions, companion_files
from backend.slides.download import DownloadCache, fsspec_identity, http_identity
from backend.slides.places import Place, allowed_file, classify, shown
from backend.slides.tissue_file import places_beside, tissue_file_beside

SlideKind = Literal["file", "label_studio", "fsspec", "http", "patches"]

MAX_PATCHES = 20_000
_REMEMBER_S = 60.0
_REMEMBERED = 20_000
_PARALLEL = 8
# Slides that are a folder beside a small file: there is nothing to open once they are copied alone.
_MANY_FILES = (".mrxs", ".vms", ".vmu")


@dataclass(frozen=True)
class SlideRef:
    """What a task's slide is and where it lies.

    Attributes
    ----------
    kind
        Where it comes from; ``"patches"`` if the task gives a list of images.
    locations
        Real paths or full URLs, one unless there are patches.
    identity
        Text that changes when the content does: part of the bag key.
    mpp
        µm per pixel as the task states it, if it does.
    mpp_override
        Whether the task's ``mpp`` holds even where the slide states another.
    tissue
        Where the mask of its tissue lies that somebody gave: a real path or a full URL; ``None``: tissue is looked for.
    tissue_identity
        As ``identity``, of that mask.
    """

    kind: SlideKind
    locations: tuple[str, ...]
    identity: str
    mpp: float | None = None
    mpp_override: bool = False
    tissue: str | None = None
    tissue_identity: str | None = None

    def to_json(self) -> dict[str, object]:
        """JSON values only, for :meth:`from_json`."""
        mask = {} if self.tissue is None else {"tissue": self.tissue, "tissue_identity": self.tissue_identity}
        return {
            "kind": self.kind,
            "locations": list(self.locations),
            "identity": self.identity,
            "mpp": self.mpp,
            "mpp_override": self.mpp_override,
            **mask,
        }

    @classmethod
    def from_json(cls, value: object) -> SlideRef:
        """The reference that :meth:`to_json` wrote; anything else is a :class:`~backend.errors.SourceError`."""
        if not isinstance(value, Mapping):
            raise SourceError(f"A slide reference must be an object, not {type(value).__name__}.")
        kind, locations, identity, mpp = (value.get(name) for name in ("kind", "locations", "identity", "mpp"))
        if kind not in get_args(SlideKind):
            raise SourceError(f"A slide reference has the unknown kind {kind!r}.")
        if (
            not isinstance(locations, list | tuple)
            or not locations
            or not all(isinstance(location, str) for location in locations)
            or (kind != "patches" and len(locations) != 1)
            or len(locations) > MAX_PATCHES
        ):
            raise SourceError("A slide reference's locations must be a list of text, one unless it is of patches.")
        if not isinstance(identity, str) or not identity:
            raise SourceError("A slide reference has no identity.")
        if mpp is not None and (isinstance(mpp, bool) or not isinstance(mpp, int | float) or not math.isfinite(mpp)):
            raise SourceError(f"A slide reference's mpp must be a number, not {mpp!r}.")
        override = value.get("mpp_override", False)
        if not isinstance(override, bool):
            raise SourceError(f"A slide reference's mpp_override must be true or false, not {override!r}.")
        tissue, tissue_identity = value.get("tissue"), value.get("tissue_identity")
        if not (tissue is None and tissue_identity is None) and not (
            isinstance(tissue, str) and tissue and isinstance(tissue_identity, str) and tissue_identity
        ):
            raise SourceError("A slide reference's tissue mask must have a location and an identity, both text.")
        return cls(
            cast(SlideKind, kind),
            tuple(locations),
            identity,
            None if mpp is None else float(mpp),
            override,
            tissue,
            tissue_identity,
        )


class SourceResolver:
    """Resolves and fetches slides by the settings' rules. May be shared by threads.

    Parameters
    ----------
    settings
        Roots, hosts, protocols, limits.
    label_studio_headers
        Gives the header that opens Label Studio's own files; it is sent to nothing else.
    """

    def __init__(
        self, settings: Settings, *, label_studio_headers: Callable[[], Mapping[str, str]] | None = None
    ) -> None:
        self._settings = settings
        self._headers = label_studio_headers or dict
        self._cache = DownloadCache(settings, self._headers)
        self._asked: dict[str, tuple[float, str]] = {}
        self._lock = threading.Lock()

    def resolve(
        self,
        value: StrPath | Sequence[StrPath],
        *,
        mpp: float | None = None,
        mpp_override: bool = False,
        tissue: StrPath | None = None,
    ) -> SlideRef:
        """What the value of a task's field is. Downloads nothing; asks the server about http and Label Studio local files.

        Parameters
        ----------
        value
            A path, a URL, or a list of them (a bag of patches).
        mpp
            The task's µm per pixel.
        mpp_override
            Whether it holds even where the slide states another.
        tissue
            Where the mask of its tissue lies, by the same rules; ``None``: beside a slide that is a file here, if one
            lies there.

        Raises
        ------
        TaskFieldMissing, SourceRefused, SlideNotFound, SourceError
            As :func:`backend.slides.places.classify`.
        DownloadFailed
            The server that has the slide does not answer.
        MppUnknown
            ``mpp`` is not a finite number.
        """
        if mpp is not None and not math.isfinite(mpp):
            raise MppUnknown(f"The task says mpp = {mpp}, which is no number.", hint="Correct the task's `mpp`.")
        if isinstance(value, list | tuple):
            return self._resolve_patches([os.fspath(v) if isinstance(v, os.PathLike) else v for v in value], mpp)
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        place = classify(value, self._settings)
        ref = SlideRef(place.kind, (place.location,), self._identity(place), mpp, mpp_override and mpp is not None)
        if tissue is None:
            return self.with_tissue_beside(ref)
        return self._with_tissue(ref, classify(os.fspath(tissue), self._settings))

    def with_tissue_beside(self, ref: SlideRef) -> SlideRef:
        """``ref`` with the mask that lies beside its slide now, or without one; a mask given by its task stays."""
        if ref.kind != "file":
            return ref
        slide = Path(ref.locations[0])
        if ref.tissue is not None and ref.tissue not in map(os.path.realpath, places_beside(slide)):
            return ref
        mask = tissue_file_beside(slide)
        if mask is None:
            return replace(ref, tissue=None, tissue_identity=None)
        return self._with_tissue(ref, Place("file", str(allowed_file(str(mask), self._settings))))

    def _with_tissue(self, ref: SlideRef, place: Place) -> SlideRef:
        return replace(ref, tissue=place.location, tissue_identity=self._identity(place))

    def fetch(self, ref: SlideRef) -> tuple[Path, ...]:
        """The slide as local files, downloaded if need be: one, or one for each patch.

        They stay until this thread fetches another slide, and longer unless the cache is full.

        Raises
        ------
        SourceRefused, SlideNotFound, DownloadFailed
            As :meth:`resolve`; all rules are applied again.
        SourceError
            A file has changed since it was resolved, so that its result would be kept under the wrong key.
        """
        places = [self._classify_again(location) for location in ref.locations]
        kinds = {place.kind for place in places}
        if ref.kind != "patches" and kinds != {ref.kind}:
            raise SourceRefused(f"The slide reference says {ref.kind}, and {shown(ref.locations[0])} is not.")
        if kinds == {"file"}:
            identity = self._patches_identity(places) if ref.kind == "patches" else self._identity(places[0])
            if identity != ref.identity:
                raise SourceError(
                    f"{shown(ref.locations[0])} has changed since it was asked for.",
                    hint="Ask again; if it is still being copied, when that is done.",
                )
        paths = []
        for place in places:
            # A patch is kept under its own identity, so that a list with one more does not download all again.
            if place.kind != "file":
                identity = self._identity(place) if ref.kind == "patches" else ref.identity
                paths.append(self._cache.get(place, identity))
            else:
                paths.append(Path(place.location))
            check_companions(paths[-1], self._settings)
        self._cache.hold(tuple(paths))
        return tuple(paths)

    def fetch_with_tissue(self, ref: SlideRef) -> tuple[tuple[Path, ...], Path | None]:
        """As :meth:`fetch`, and the mask of the slide's tissue if one was given, by the same rules."""
        paths = self.fetch(ref)
        if ref.tissue is None or ref.tissue_identity is None or ref.kind == "patches":
            return paths, None
        place = self._classify_again(ref.tissue)
        if place.kind != "file":
            mask = self._cache.get(place, ref.tissue_identity)
        elif self._identity(place) == ref.tissue_identity:
            mask = Path(place.location)
        else:
            raise SourceError(
                f"The tissue mask {shown(ref.tissue)} has changed since it was asked for.", hint="Ask again."
            )
        self._cache.hold((*paths, mask))
        return paths, mask

    def _resolve_patches(self, values: Sequence[object], mpp: float | None) -> SlideRef:
        if not values:
            raise TaskFieldMissing("The task's list of patches is empty.", hint="Give at least one image.")
        if len(values) > MAX_PATCHES:
            raise SourceRefused(f"The task lists {len(values)} patches; {MAX_PATCHES} are the most.")
        places = [classify(value, self._settings) for value in values]
        return SlideRef("patches", tuple(place.location for place in places), self._patches_identity(places), mpp)

    def _patches_identity(self, places: Sequence[Place]) -> str:
        remote = [place for place in places if place.kind != "file" and not place.is_upload]
        if len(remote) > 1:
            with ThreadPoolExecutor(min(_PARALLEL, len(remote))) as pool:
                list(pool.map(self._identity, remote))  # remembered for the next line
        return digest({"patches": [self._identity(place) for place in places]})

    def _classify_again(self, location: str) -> Place:
        if location.startswith("/"):
            # A path that was resolved is real and absolute; a link that now stands in its place leads elsewhere.
            real = allowed_file(location, self._settings)
            if str(real) != location:
                raise SourceRefused(f"{shown(location)} is not the file that it was.")
            return Place("file", location)
        return classify(location, self._settings)

    def _identity(self, place: Place) -> str:
        if place.kind == "file":
            return self._file_identity(Path(place.location))
        if place.location.split("?", 1)[0].lower().endswith(_MANY_FILES):
            raise SourceRefused(
                f"{shown(place.location)} is a slide of many files, which cannot be downloaded as one.",
                hint="Put it, with its folder, below SLIDE_ROOTS.",
            )
        if place.is_upload:
            return place.location  # Label Studio gives each upload a name of its own
        now = time.monotonic()
        with self._lock:
            asked = self._asked.get(place.location)
        if asked is not None and now - asked[0] < _REMEMBER_S:
            return asked[1]
        ask = fsspec_identity if place.kind == "fsspec" else self._ask_http
        identity = ask(place)
        with self._lock:
            self._asked[place.location] = (now, identity)
            while len(self._asked) > _REMEMBERED:
                del self._asked[next(iter(self._asked))]
        return identity

    def _file_identity(self, path: Path) -> str:
        folder = path.with_suffix("")
        if path.suffix.lower() == ".mrxs" and folder.is_dir():
            real = Path(os.path.realpath(folder))
            if not any(real.is_relative_to(root) for root in self._settings.slide_roots):
                raise SourceRefused(f"The folder of {shown(str(path))} leads outside the allowed folders.")
        return file_identity(path)

    def _ask_http(self, place: Place) -> str:
        return http_identity(place, self._settings, self._headers)


def file_identity(path: StrPath) -> str:
    """Path, size and modification time of a slide's file, and of the files that are read with it
    (:func:`~backend.slides.companions.companion_files`) and of no others: a second slide in its folder changes nothing.

    Raises
    ------
    SlideNotFound
        There is no such file.
    SourceRefused
        This process may not read it, or it is a folder.
    """
    path = Path(path)
    try:
        parts = [str(path), *_stamps([path, *companion_files(path)])]
    except FileNotFoundError as error:
        raise SlideNotFound(f"There is no file {shown(str(path))}.") from error
    except IsADirectoryError as error:
        raise SourceRefused(f"{shown(str(path))} is a folder.", hint="It must be one file.") from error
    except PermissionError as error:
        raise SourceRefused(
            f"{shown(str(path))} cannot be read: {error.strerror}.",
            hint="Give the account that runs this the right to read it.",
        ) from error
    return parts[0] + "|" + parts[1] if len(parts) == 2 else digest({"files": parts})


def _stamps(paths: Iterable[Path]) -> list[str]:
    stamps = []
    for path in paths:
        status = path.stat()
        stamps.append(f"{path.name}|{status.st_size}|{status.st_mtime_ns}")
    return stamps
