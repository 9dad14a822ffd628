"""`import` of folders: a slide is one task, whatever it is called this time."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from annotated_studio import PROJECT, AnnotatedStudio, answering
from PIL import Image

from backend.commands.import_slides import import_slides
from backend.label_studio.services import Services
from backend.settings import Settings
from backend.slides.discover import find_slides
from backend.slides.reader import Slide
from backend.slides.thumbnails import ThumbnailStore


class ImportingStudio(AnnotatedStudio):
    """A project that takes tasks."""

    def answer(self, method: str, path: str, query: dict[str, list[str]], body: Any) -> tuple[int, Any]:
        if method == "POST" and path.strip("/") == f"api/projects/{PROJECT}/import":
            for task in body:
                self.add_task(**task["data"])
            return 201, {"task_count": len(body)}
        return super().answer(method, path, query, body)


@pytest.fixture
def studio() -> Iterator[ImportingStudio]:
    made = ImportingStudio()
    with answering(made):
        yield made


@pytest.fixture
def services(settings: Callable[..., Settings], tmp_path: Path, studio: ImportingStudio) -> Iterator[Services]:
    (tmp_path / "slides").mkdir()
    (tmp_path / "model.pt.zip").write_bytes(b"a checkpoint")  # nothing is analysed here
    services = Services(
        settings(
            model=str(tmp_path / "model.pt.zip"),
            slide_roots=(tmp_path / "slides",),
            label_studio_url=studio.url,
            label_studio_api_key="0123456789abcdef0123456789abcdef01234567",
            public_url="http://ours:1",
        )
    )
    yield services
    services.close()


def bring_in(services: Services, *paths: Path) -> tuple[list[str], list[str], list[str]]:
    """What `import` of these adds, knows and refuses."""
    done = import_slides(services, find_slides(paths).slides, project=str(PROJECT), retrieve=False)
    refused = [f"{path.name}: {error.message}" for path, error in done.refused]
    return [path.name for path in done.added], [path.name for path in done.present], refused


def photo(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (600, 400), (len(path.name), 150, 180)).save(path)
    return path


def test_a_slide_that_is_a_task_under_another_name_is_not_a_second_one(
    services: Services, studio: ImportingStudio, tmp_path: Path
) -> None:
    slides = tmp_path / "slides"
    first = photo(slides / "first.png")
    assert bring_in(services, slides) == (["first.png"], [], [])
    (slides / "alias.png").symlink_to(first)
    os.link(first, slides / "a hard link.png")
    photo(slides / "second.png")
    assert bring_in(services, slides / "alias.png") == ([], ["alias.png"], [])
    # The other name of the file comes first now; the task keeps the name that it has.
    assert bring_in(services, slides) == (["second.png"], ["a hard link.png"], [])
    assert [task["name"] for task in studio.tasks.values()] == ["first.png", "second.png"]


def test_a_dicom_slide_is_known_by_its_instance(
    services: Services, studio: ImportingStudio, tmp_path: Path, test_data: Path
) -> None:
    """The task may hold another level of it, as earlier releases took the first file by name."""
    dicom, slides = test_data / "slides" / "cmu1-dicom", tmp_path / "slides"
    shutil.copytree(dicom, slides / "case")
    studio.add_task(image="http://ours:1/thumbnail.jpg", slide=str(slides / "case" / "01.dcm"))
    assert bring_in(services, slides) == ([], ["03.dcm"], [])
    shutil.move(slides / "case", slides / "archive")
    assert bring_in(services, slides) == (["03.dcm"], [], [])
    shutil.copytree(slides / "archive", slides / "backup")
    assert bring_in(services, slides / "backup") == ([], ["03.dcm"], [])


def test_two_files_of_one_dicom_slide_that_are_given_by_name_become_one_task(
    services: Services, tmp_path: Path, test_data: Path
) -> None:
    case = tmp_path / "slides" / "case"
    shutil.copytree(test_data / "slides" / "cmu1-dicom", case)
    files = [case / "03.dcm", case / "01.dcm"]
    done = import_slides(services, files, project=str(PROJECT), retrieve=False)
    assert (done.added, done.present) == (files[:1], files[1:])


def test_one_bad_slide_stops_nothing(services: Services, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slides = tmp_path / "slides"
    names = ["a.png", "b.png", "c.svs", "d.png"]
    a, b, c, _ = (photo(slides / name.replace("svs", "png")) for name in names)
    c.rename(c.with_suffix(".svs")).write_text("version https://git-lfs.github.com/spec/v1")
    found = find_slides(slides).slides
    a.unlink()
    b.write_bytes(b.read_bytes()[:200])
    make = ThumbnailStore.make

    def of_a_library(cache: ThumbnailStore, identity: str, slide: Slide) -> Any:
        if "d.png" in identity:
            raise ZeroDivisionError("in a codec")
        return make(cache, identity, slide)

    monkeypatch.setattr(ThumbnailStore, "make", of_a_library)
    photo(slides / "e.png")
    done = import_slides(services, [*map(str, found), str(slides / "e.png")], project=str(PROJECT), retrieve=False)
    assert [path.name for path in done.added] == ["e.png"]
    assert [type(error).__name__ for _, error in done.refused] == [
        "SlideNotFound",
        "SlideUnreadable",
        "SlideUnreadable",
        "UnexpectedFailure",
    ]
