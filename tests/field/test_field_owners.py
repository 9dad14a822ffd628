"""Heads belong to a project of a Label Studio, not to its number."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from backend.inference.checkpoint import ModelIdentity
from backend.label_studio.predictor import project_created
from backend.label_studio.versions import ProjectVersions
from backend.learning.heads import Head
from backend.learning.project_owner import Owner

MODEL = ModelIdentity("model", "3f2a1c" + "0" * 58, "1.0", "float32", False)
FIRST = Owner(1_795_461_014, "http://one.example", "Lymph nodes")
SECOND = Owner(1_800_000_000, "http://two.example", "Kidneys")


def head() -> Head:
    one = np.ones(1)
    return Head(
        "diagnosis", "slide", "choice", ("Tumour", "None"), one, one, np.ones((2, 1)), np.zeros(2), np.ones(2), np.zeros(2),
        False, 4, {"Tumour": 2, "None": 2}, MODEL.fingerprint,
    )  # fmt: skip


@pytest.fixture
def learnt(tmp_path):
    """The folder of heads after project 2 of the first Label Studio has been trained."""
    versions = ProjectVersions(tmp_path, MODEL, FIRST.label_studio)
    versions.take_over(2, FIRST)
    versions.registry.add(2, [head()], model_version=MODEL.model_version)
    return tmp_path


def test_project_2_of_another_label_studio_has_no_heads_of_the_first_ones_project_2(learnt, caplog):
    asked = ProjectVersions(learnt, MODEL, SECOND.label_studio)
    asked.note_created(2, SECOND.created)
    assert (asked.heads(2), asked.version(2), asked.versions(2)) == (None, MODEL.model_version, [MODEL.model_version])
    assert "those of “Lymph nodes” of http://one.example" in caplog.text
    unasked = ProjectVersions(learnt, MODEL, SECOND.label_studio)
    assert unasked.heads(2) is None, "its address says so before it has asked for anything"


def test_an_emptied_label_studio_at_the_same_address_has_none_either(learnt):
    versions = ProjectVersions(learnt, MODEL, FIRST.label_studio)
    versions.note_created(2, FIRST.created + 1)
    assert versions.heads(2) is None


def test_a_label_studio_that_has_moved_and_a_project_with_a_new_title_keep_their_heads(learnt):
    moved = ProjectVersions(learnt, MODEL, "https://moved.example")
    moved.note_created(2, FIRST.created)
    assert moved.version(2) == MODEL.model_version + "-h1"
    assert moved.take_over(2, Owner(FIRST.created, "https://moved.example", "Renamed")) is None
    assert moved.version(2) == MODEL.model_version + "-h1"


def test_a_training_sets_the_other_projects_heads_aside_and_they_come_back(learnt, caplog):
    caplog.set_level(logging.WARNING)
    versions = ProjectVersions(learnt, MODEL, SECOND.label_studio)
    assert versions.take_over(2, SECOND) == FIRST
    assert "set aside" in caplog.text
    versions.registry.add(2, [head()], model_version=MODEL.model_version)
    versions.registry.add(2, [head()], model_version=MODEL.model_version)
    assert versions.version(2) == MODEL.model_version + "-h2"
    again = ProjectVersions(learnt, MODEL, FIRST.label_studio)
    assert again.take_over(2, FIRST) == SECOND
    assert again.version(2) == MODEL.model_version + "-h1"


def test_heads_of_before_there_were_owners_go_to_the_project_that_trains_first(tmp_path):
    versions = ProjectVersions(tmp_path, MODEL, FIRST.label_studio)
    versions.registry.add(2, [head()], model_version=MODEL.model_version)
    versions.note_created(2, FIRST.created)
    assert versions.version(2) == MODEL.model_version + "-h1"
    assert versions.take_over(2, FIRST) is None
    assert versions.version(2) == MODEL.model_version + "-h1"


@pytest.mark.parametrize(
    ("project", "created"), [("2.1795461014", 1_795_461_014), ("2", None), (2, None), (None, None)]
)
def test_label_studio_says_with_each_question_when_the_project_was_created(project, created):
    assert project_created(project) == created
