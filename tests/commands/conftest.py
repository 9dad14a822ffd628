"""A project with a dozen analysed slides of two kinds, a stand-in for its Label Studio, and the command as a person types it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from annotated_studio import AnnotatedStudio, answering
from synthetic_bags import synthetic_result

from backend.jobs.pool import settings_environ
from backend.jobs.redis_server import EmbeddedRedis
from backend.label_studio.services import Services
from backend.settings import Settings

SLIDES = 12


@dataclass
class Project:
    """The project: its Label Studio, the backend's services, and the numbers of its tasks, even ones with tumours."""

    studio: AnnotatedStudio
    services: Services
    tasks: list[int]
    embeddings: dict[int, np.ndarray[Any, Any]]

    def label(self, *which: int, by: int = 1) -> None:
        """Somebody says what these of the slides (0 …) show."""
        for i in which:
            self.studio.annotate(self.tasks[i], by, diagnosis="No tumour" if i % 2 else "Tumour")

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, **settings_environ(self.services.settings), "COLUMNS": "220", "OMP_NUM_THREADS": "1"}

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """``wsc-backend …`` in a wide terminal."""
        line = [sys.executable, "-m", "backend", *arguments]
        return subprocess.run(line, capture_output=True, text=True, env=self.environment, timeout=300)

    def pushes(self) -> int:
        """How many tasks wait for their prediction to be pushed."""
        return sum(len(self.services.queue.waiting(slide)) for slide in set(self.keys.values()))

    @property
    def keys(self) -> dict[int, str]:
        resolve = self.services.resolver.resolve
        return {task: self.services.key(resolve(self.studio.tasks[task]["image"])) for task in self.tasks}


@pytest.fixture
def project(
    settings: Callable[..., Settings], embedded_redis: EmbeddedRedis, redis: Any, tmp_path: Path
) -> Iterator[Project]:
    slides = tmp_path / "slides"
    slides.mkdir()
    # Nothing here loads the model: learning works on stored embeddings, and needs to know only whose they are.
    model = tmp_path / "model.pt.zip"
    model.write_bytes(b"a checkpoint")
    with answering(AnnotatedStudio()) as studio:
        made = settings(
            model=str(model),
            slide_roots=(slides,),
            redis_url=embedded_redis.url,
            label_studio_url=studio.url,
            label_studio_api_key="0123456789abcdef0123456789abcdef01234567",
            public_url="http://ours:1",
        )
        services = Services(made)
        kinds = np.random.default_rng(1).normal(size=(2, 768))
        found = Project(studio, services, [], {})
        for i in range(SLIDES):
            file = slides / f"slide-{i:02}.svs"
            file.write_bytes(b"slide %d" % i)
            vector = kinds[i % 2] + 0.3 * np.random.default_rng(100 + i).normal(size=768)
            result = replace(synthetic_result((2000, 1500), seed=i), slide_embedding=vector.astype(np.float32))
            task = studio.add_task(image=str(file))
            found.tasks.append(task)
            found.embeddings[task] = result.slide_embedding
            services.store.put(services.key(services.resolver.resolve(str(file))), result)
        yield found
        services.close()
