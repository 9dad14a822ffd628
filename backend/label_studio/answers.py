"""From a stored bag to the prediction of one task: the picture's size, the regions, the last check."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from backend.addresses import thumbnail_of
from backend.errors import MppUnknown, SlideNotFound, SlideUnreadable
from backend.label_studio.check import check_prediction
from backend.label_studio.drawn_area import DrawnArea
from backend.label_studio.json_texts import MAX_ANSWERS
from backend.label_studio.labeling_config import LabelingConfig, parse_config
from backend.label_studio.learnt import NOTHING_LEARNT, fitting_tile_heads, learnt_of
from backend.label_studio.regions import predict_regions
from backend.label_studio.services import Services
from backend.label_studio.task_values import look_up
from backend.results.bag import BagResult, digest
from backend.slides.images import image_size
from backend.slides.names import slide_path
from backend.slides.source import SlideRef

TaskData = Mapping[str, Any]


def slide_ref(services: Services, config: LabelingConfig, data: TaskData) -> SlideRef:
    """Where a task's slide is; errors as :class:`~backend.slides.source.SourceResolver` and the config have them."""
    location = config.slide_location(data)
    value = list(location) if isinstance(location, tuple) else location
    mpp = _task_mpp(data)
    override = _task_override(data, mpp)
    return services.resolver.resolve(value, mpp=mpp, mpp_override=override, tissue=_task_tissue(data))


def _task_tissue(data: TaskData) -> str | None:
    """Where the task's field ``tissue`` says that a mask lies. Others use that name for an organ: "lung/left" is no mask."""
    value = data.get("tissue")
    named = isinstance(value, str) and slide_path(value.strip()).lower().endswith((".geojson", ".json", ".png"))
    return value if named else None


def _task_mpp(data: TaskData) -> float | None:
    value = data.get("mpp")
    if value is None or value == "":
        return None
    try:
        if isinstance(value, bool):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise SlideUnreadable(
            f"The task's field 'mpp' holds {value!r:.40}, which is no number.",
            hint="It must be the slide's µm per pixel, such as 0.25; remove it where the slide states its own.",
        ) from None


# As spreadsheets and CSV files write them.
_YES, _NO = ("true", "1", "1.0", "yes"), ("false", "0", "0.0", "no", "")


def _task_override(data: TaskData, mpp: float | None) -> bool:
    """Whether the task's ``mpp`` holds even where the slide states another."""
    value = data.get("mpp_override")
    text = "" if value is None else str(value).strip().lower()
    if text not in _YES + _NO:
        raise MppUnknown(
            f"The task's field 'mpp_override' holds {value!r:.40}, which is neither true nor false.",
            hint="true: the task's `mpp` holds whatever the slide states. Remove it where the slide is right.",
        )
    if text in _YES and mpp is None:
        raise MppUnknown(
            "The task has 'mpp_override', and no 'mpp' that could hold.",
            hint="Add `mpp`, the slide's µm per pixel, such as 0.25; or remove `mpp_override`.",
        )
    return text in _YES


class Answers:
    """Makes predictions from stored bags, and remembers the last few: a prediction of one bag, config and picture never changes."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._made: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self._sizes: OrderedDict[str, tuple[int, int]] = OrderedDict()
        self._lock = threading.Lock()

    def prediction(
        self, key: str, data: TaskData, config_xml: str, *, project: int | None, area: DrawnArea | None = None
    ) -> dict[str, Any] | None:
        """The checked prediction for a task of ``project``, ``None`` if nothing is stored under ``key``.

        Raises
        ------
        InvalidPrediction
            Our own regions failed the check: nothing is sent.
        """
        config = parse_config(config_xml)
        picture = look_up(data, config.image.field) if config.image.field else None
        versions = self._services.versions
        heads, snapshot = versions.heads(project), versions.snapshot(project)
        version = heads.version if heads is not None else self._services.model.model_version
        name = digest(
            {
                "key": key,
                "config": config_xml,
                "picture": str(picture),
                "area": area.key if area else None,
                "project": project,
                "version": version,
                "trained": snapshot.about.get("created_at") if snapshot else None,
                "top_k": self._services.settings.top_k,
            }
        )
        with self._lock:
            if name in self._made:
                self._made.move_to_end(name)
                return self._made[name]
        tile_heads = fitting_tile_heads(heads, config) if heads is not None and area is None else []
        result = self._services.store.get(key, latents=bool(tile_heads))
        if result is None:
            return None
        learnt = NOTHING_LEARNT
        if area is None:
            similar = snapshot.neighbours(key, result.slide_embedding) if snapshot is not None else []
            learnt = learnt_of(result, config, heads, tuple(similar))
        size = self.image_size(config, data, result)
        prediction = predict_regions(
            result,
            config,
            image_size=size,
            model_version=version,
            settings_top_k=self._services.settings.top_k,
            learnt=learnt,
            area=area,
        )
        check_prediction(prediction, config_xml, image_size=size, may_be_empty=area is not None)
        with self._lock:
            self._made[name] = prediction
            while len(self._made) > MAX_ANSWERS:
                self._made.popitem(last=False)
        return prediction

    def image_size(self, config: LabelingConfig, data: TaskData, result: BagResult) -> tuple[int, int] | None:
        """Width and height, in pixels, of the picture that Label Studio shows for this task; ``None`` for a bag of patches.

        The editor copies a brush mask into a canvas of exactly this size, so a guess would shear the heatmap.
        """
        if result.bag.kind == "patches" or config.image.field is None:
            return None
        picture = look_up(data, config.image.field)
        if not isinstance(picture, str):
            return None
        if config.slide_location(data) == picture:
            return result.bag.slide_size  # the slide is a plain image, shown as it is
        with self._lock:
            if picture in self._sizes:
                return self._sizes[picture]
        size = self._measure(picture)
        with self._lock:
            self._sizes[picture] = size
            while len(self._sizes) > 10_000:
                self._sizes.popitem(last=False)
        return size

    def _measure(self, picture: str) -> tuple[int, int]:
        ours = thumbnail_of(picture)
        if ours:
            thumbnail = self._services.thumbnails.get(ours)
            if thumbnail is None:
                raise SlideNotFound(
                    f"The picture {picture} is not among this backend's thumbnails.",
                    hint="Run `wsc-backend import` again, with the same MODEL_DIR.",
                )
            return thumbnail.width, thumbnail.height
        (path,) = self._services.resolver.fetch(self._services.resolver.resolve(picture))
        return image_size(path, self._services.settings)  # as a browser turns it
