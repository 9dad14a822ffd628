"""Labelling configs as people write them: what can be used is used, and what cannot is named."""

from __future__ import annotations

import logging

import pytest
from synthetic_bags import synthetic_result

from backend.errors import LabelConfigUnsupported, TaskFieldMissing
from backend.label_studio.check import check_prediction
from backend.label_studio.labeling_config import parse_config
from backend.label_studio.learnt import HeadSuggestion, Learnt
from backend.label_studio.predictor import Predictor
from backend.label_studio.regions import predict_regions
from backend.label_studio.services import Services

IMAGE = '<Image name="image" value="$image"/>'
HEAT = '<BrushLabels name="heat" toName="image"><Label value="Attention"/></BrushLabels>'


def view(*parts):
    return f"<View>{''.join(parts)}</View>"


def reasons(config):
    return {control.name: control.reason for control in config.unused}


@pytest.mark.parametrize(
    ("value", "data"),
    [
        ("$slide.picture", {"slide.picture": "/a.svs"}),
        ("$case.picture", {"case": {"picture": "/a.svs"}}),
        ("$cases[0].picture", {"cases": [{"picture": "/a.svs"}]}),
        ("$cases[1]", {"cases": ["/b.svs", "/a.svs"]}),
        ("$case.list[0][1]", {"case": {"list": [["/b.svs", "/a.svs"]]}}),
        ("$a.b", {"a.b": "/a.svs", "a": {"b": "/b.svs"}}),
    ],
)
def test_nested_and_indexed_fields_are_found_where_the_editor_finds_them(value, data):
    config = parse_config(view(IMAGE.replace("$image", value), HEAT))
    assert config.slide_location(data) == "/a.svs"


@pytest.mark.parametrize("data", [{"cases": []}, {"cases": "text"}, {"cases": [{"other": 1}]}, {}])
def test_a_nested_field_that_a_task_lacks_is_named_whole(data):
    config = parse_config(view(IMAGE.replace("$image", "$cases[0].picture"), HEAT))
    with pytest.raises(TaskFieldMissing, match=r"cases\[0\]\.picture"):
        config.slide_location(data)


@pytest.mark.parametrize(
    ("control", "says"),
    [
        ('<BrushLabels name="c" toName="image" value="$labels"/>', r"labels from each task \(\$labels\)"),
        ('<Choices name="c" toName="image" value="$choices"/>', "labels from each task"),
        (
            '<Repeater on="$parts" indexFlag="{{i}}"><Choices name="c" toName="image"><Choice value="a"/></Choices></Repeater>',
            "<Repeater>",
        ),
        ('<Choices name="c" toName="image" perRegion="true"><Choice value="a"/></Choices>', "single regions"),
        ('<TextArea name="c" toName="image" perItem="true"/>', "single pages"),
        ('<Taxonomy name="c" toName="image"><Choice value="a"/></Taxonomy>', "neither filled nor learnt"),
        ('<RectangleLabels name="c" toName="image" model_top_k="many"><Label value="a"/></RectangleLabels>', "many"),
        ('<BrushLabels name="c" toName="image" model_heatmap="bands"><Label value="a"/></BrushLabels>', "one label"),
        ('<PolygonLabels name="c" toName="image"/>', "no <Label>"),
        ('<Image name="ihc" value="$ihc"/><Choices name="c" toName="ihc"><Choice value="a"/></Choices>', "'ihc'"),
        (
            '<View visibleWhen="region-selected"><Choices name="c" toName="image"><Choice value="a"/></Choices></View>',
            "shown only at times",
        ),
    ],
)
def test_a_control_that_cannot_be_used_is_named_and_takes_no_other_down(control, says):
    config = parse_config(view(IMAGE, HEAT, control))
    assert [c.name for c in config.controls] == ["heat"]
    assert list(reasons(config)) == ["c"]
    assert says.replace("\\", "") in reasons(config)["c"]
    prediction = predict_regions(
        synthetic_result(), config, image_size=None, model_version="wsc-000000", settings_top_k=5
    )
    assert [region["from_name"] for region in prediction["result"]] == ["heat"]


def test_a_config_of_unusable_controls_alone_is_refused_with_their_reasons():
    with pytest.raises(LabelConfigUnsupported, match=r"'a'> takes its labels .*'b'> asks about single regions"):
        parse_config(
            view(
                IMAGE,
                '<BrushLabels name="a" toName="image" value="$labels"/>',
                '<Choices name="b" toName="image" perRegion="true"><Choice value="x"/></Choices>',
            )
        )
    with pytest.raises(LabelConfigUnsupported, match="stands in a <Repeater>"):
        parse_config(view(f'<Repeater on="$parts">{IMAGE}{HEAT}</Repeater>'))


def test_two_images_of_one_picture_are_both_filled():
    beside = '<Image name="beside" value="$image"/><RectangleLabels name="hot" toName="beside"><Label value="a"/></RectangleLabels>'
    xml = view(IMAGE, HEAT, beside)
    prediction = predict_regions(
        synthetic_result(), parse_config(xml), image_size=None, model_version="wsc-000000", settings_top_k=1
    )
    assert {(r["from_name"], r["to_name"]) for r in prediction["result"]} == {("heat", "image"), ("hot", "beside")}
    check_prediction(prediction, xml, image_size=None)


GRADE = '<Choices name="grade" toName="image"><Choice value="G1"/></Choices>'
DIAGNOSIS = '<Choices name="diagnosis" toName="image"><Choice value="Tumour"/><Choice value="None"/></Choices>'


@pytest.mark.parametrize(
    ("condition", "diagnosis", "shown"),
    [
        ('visibleWhen="choice-selected" whenTagName="diagnosis" whenChoiceValue="Tumour"', "Tumour", True),
        ('visibleWhen="choice-selected" whenTagName="diagnosis" whenChoiceValue="Tumour"', "None", False),
        ('visibleWhen="choice-selected" whenTagName="diagnosis" whenChoiceValue="Tumour,None"', "None", True),
        ('visibleWhen="choice-selected" whenTagName="diagnosis"', None, False),
        ('visibleWhen="choice-unselected" whenTagName="diagnosis" whenChoiceValue="Tumour"', "None", True),
        ('visibleWhen="no-region-selected"', None, True),
    ],
)
def test_a_suggestion_that_the_editor_would_hide_is_not_made(condition, diagnosis, shown):
    said = [HeadSuggestion("grade", "G1", 0.8)]
    if diagnosis:
        said.append(HeadSuggestion("diagnosis", diagnosis, 0.9))
    for xml in (
        view(IMAGE, HEAT, DIAGNOSIS, f"<View {condition}>{GRADE}</View>"),
        view(IMAGE, HEAT, DIAGNOSIS, GRADE.replace("<Choices", f"<Choices {condition}")),
    ):
        prediction = predict_regions(
            synthetic_result(),
            parse_config(xml),
            image_size=None,
            model_version="wsc-000000",
            settings_top_k=1,
            learnt=Learnt(tuple(said)),
        )
        assert ("grade" in {region["from_name"] for region in prediction["result"]}) == shown


def test_a_smart_tool_that_attention_cannot_be_pooled_over_is_answered_at_once_and_takes_no_claim(caplog):
    """Neither Redis nor the store is asked: there are none here."""

    class NoServices:
        class settings:
            predict_wait_s = predict_batch_budget_s = 3.0

    caplog.set_level(logging.INFO)
    answers = {"type": "choices", "to_name": "image", "from_name": "diagnosis", "value": {"choices": ["Tumour"]}}
    for drawn in ([], [answers], [{"type": "vector", "value": {}}]):
        task = {"id": 1, "data": {"image": "/a.svs"}}
        slots = Predictor(NoServices()).predict(
            [task], project=1, label_config=view(IMAGE, HEAT), context={"result": drawn}
        )
        assert slots == [[]]
    assert "no answer" in caplog.text


def test_the_config_that_came_last_with_a_question_counts_however_the_project_was_connected(settings, redis, stand_in):
    """No event with our secret ever comes: the project was connected in Label Studio's settings."""
    services = Services(settings(model=str(stand_in)), redis)
    first, renamed = view(IMAGE, HEAT, DIAGNOSIS), view(IMAGE, HEAT, DIAGNOSIS.replace("diagnosis", "findings"))
    for config in (first, first):
        Predictor(services).predict([], project=7, label_config=config)
        assert services.training.state(7) is None
    predictor = Predictor(services)
    for config in (renamed, renamed):
        predictor.predict([], project=7, label_config=config)
    assert services.training.state(7) is not None
    assert not services.training.config_changed(7, renamed)
