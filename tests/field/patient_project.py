"""A project of analysed slides in a small Label Studio, for what its annotations teach."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from annotated_studio import AnnotatedStudio, answering
from rich.console import Console
from rich.table import Table
from synthetic_bags import synthetic_result

from backend.commands.head_tables import stored_lines, training_lines
from backend.commands.heads import stored_versions
from backend.commands.train import train_project
from backend.jobs.redis_server import EmbeddedRedis
from backend.label_studio.services import Services
from backend.label_studio.trainer import TrainingReport, train
from backend.learning.heads import Head
from backend.results.bag import BagResult
from backend.settings import Settings

Floats = npt.NDArray[np.floating[Any]]
CLASSES = ("Tumour", "No tumour")


@dataclass
class PatientProject:
    """Its Label Studio, the backend's services, and the file of each slide."""

    studio: AnnotatedStudio
    services: Services
    folder: Path
    files: list[Path] = field(default_factory=list)

    def add(
        self, embedding: Floats, name: str = "", contents: bytes = b"", bag: BagResult | None = None, **data: Any
    ) -> int:
        """A slide with a stored result of this embedding, and a task that shows it; returns the task."""
        file = self.folder / (name or f"slide-{len(self.files):03}.svs")
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(contents or b"slide %d" % len(self.files))
        self.files.append(file)
        made = synthetic_result((900, 700), seed=len(self.files)) if bag is None else bag
        result = replace(made, slide_embedding=np.asarray(embedding, dtype=np.float32))
        self.services.store.put(self.services.key(self.services.resolver.resolve(str(file))), result)
        return self.again(len(self.files) - 1, **data)

    def again(self, slide: int, **data: Any) -> int:
        """A further task that shows a slide."""
        return self.studio.add_task(image=str(self.files[slide]), **data)

    def state(self, **priors: float) -> None:
        """State how frequent choices of the diagnosis are, in the labelling config; ``No_tumour`` is "No tumour"."""
        config = self.studio.project["label_config"]
        for name, prior in priors.items():
            value = f'<Choice value="{name.replace("_", " ")}"'
            config = config.replace(f"{value}/>", f'{value} model_prior="{prior}"/>')
        self.studio.project["label_config"] = config

    def train(self) -> TrainingReport:
        """As an event does."""
        return train(self.services, 7, lambda *_: None)

    def head(self, control: str = "diagnosis") -> Head:
        """The head in use."""
        found = self.services.versions.heads(7)
        assert found is not None
        return found.heads[control]

    def told_by_train(self) -> str:
        """What ``wsc-backend train`` prints in a wide terminal."""
        return _printed(training_lines(train_project(self.services, "7")))

    def told_by_heads(self) -> str:
        """What ``wsc-backend heads`` prints in a wide terminal."""
        return _printed(stored_lines(stored_versions(self.services, "7")))


def _printed(lines: Iterable[str | Table]) -> str:
    out = StringIO()
    console = Console(file=out, width=220)
    for line in lines:
        console.print(line, highlight=False)
    return out.getvalue()


@contextmanager
def patient_project(
    settings: Callable[..., Settings], redis: EmbeddedRedis, folder: Path, **options: Any
) -> Iterator[PatientProject]:
    """A project without slides; nothing in it loads a model."""
    slides, model = folder / "slides", folder / "model.pt.zip"
    slides.mkdir(parents=True)
    model.write_bytes(b"a checkpoint")
    with answering(AnnotatedStudio()) as studio:
        made = settings(
            model=str(model),
            model_dir=folder / "kept",
            slide_roots=(slides,),
            redis_url=redis.url,
            label_studio_url=studio.url,
            label_studio_api_key="0123456789abcdef0123456789abcdef01234567",
            public_url="http://ours:1",
            **options,
        )
        services = Services(made)
        try:
            yield PatientProject(studio, services, slides)
        finally:
            services.close()


def everything_kept(folder: Path) -> Mapping[str, bytes]:
    """Every file below a folder, by its name."""
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and not path.is_socket()}
