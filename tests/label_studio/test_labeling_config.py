"""Which controls a project has for us, and what a user is told when there is none."""

from __future__ import annotations

import pytest
from label_studio_sdk.label_interface import LabelInterface

from backend.errors import LabelConfigUnsupported, TaskFieldMissing
from backend.label_studio.labeling_config import EXAMPLE, load_template, parse_config

IMAGE = '<Image name="image" value="$image"/>'
BRUSH = '<BrushLabels name="heat" toName="image"><Label value="Attention"/></BrushLabels>'


def view(*parts: str) -> str:
    return f"<View>{''.join(parts)}</View>"


@pytest.mark.parametrize("name", ["triage", "regions", "plain", "bands", "patches"])
def test_every_template_is_understood_by_us_as_label_studios_own_parser_understands_it(name):
    xml = load_template(name)
    ours, theirs = parse_config(xml), LabelInterface(xml)
    assert {c.name: list(c.labels) for c in ours.controls} == {c.name: list(c.labels) for c in theirs.controls}
    assert ours.image.name in [o.name for o in theirs.objects]
    assert ours.image.pages == (name == "patches")
    assert ours.active("BrushLabels"), "a template without a heatmap is no use"


@pytest.mark.parametrize("name", ["triage", "plain"])
def test_the_annotators_polygons_are_left_to_them(name):
    config = parse_config(load_template(name))
    assert config.control("findings").skip
    assert config.active("PolygonLabels") == ()


def test_the_class_map_of_the_regions_template_offers_what_is_drawn():
    config = parse_config(load_template("regions"))
    drawn, said = config.control("tiles"), config.control("classes")
    assert said.labels == drawn.labels and drawn.skip
    assert (said.heatmap, config.control("attention").heatmap) == ("classes", "alpha")


def test_an_unknown_template_is_named_with_those_that_exist():
    with pytest.raises(LabelConfigUnsupported, match=r"'pretty'.*bands, patches, plain, regions, triage"):
        load_template("pretty")


def test_controls_are_found_in_nested_views_with_their_attributes():
    config = parse_config(
        view(
            f"<View><View>{IMAGE}</View></View>",
            '<View><RectangleLabels name="r" toName="image" smart="true" model_top_k="3" model_score_threshold="0.5">'
            '<View><Label value="Hot tile" alias="hot"/></View></RectangleLabels></View>',
            '<BrushLabels name="b" toName="image" model_heatmap="alpha"><Label value="low"/><Label value="high"/></BrushLabels>',
            '<TextArea name="t" toName="image" model_skip="true"/>',
        )
    )
    rectangle, brush, text = config.controls
    assert (rectangle.top_k, rectangle.score_threshold, rectangle.smart) == (3, 0.5, True)
    assert rectangle.labels == ("hot",), "regions carry a label's alias"
    assert (brush.labels, brush.heatmap) == (("low", "high"), "alpha")
    assert text.skip
    assert config.active("TextArea") == ()


def test_controls_of_other_objects_and_of_single_regions_are_not_ours():
    config = parse_config(
        view(
            IMAGE,
            '<Text name="report" value="$report"/>',
            '<Image name="second" value="http://backend/heatmap?id=$slide_id"/>',
            BRUSH,
            '<Choices name="of_text" toName="report"><Choice value="a"/></Choices>',
            '<RectangleLabels name="on_second" toName="second"><Label value="a"/></RectangleLabels>',
            '<TextArea name="note" toName="image" perRegion="true"/>',
            '<Choices name="of_page" toName="image" perItem="true"><Choice value="a"/></Choices>',
        )
    )
    assert config.image.name == "image"
    assert [control.name for control in config.controls] == ["heat"]


@pytest.mark.parametrize(
    ("data", "location"),
    [
        ({"image": "/a.jpg"}, "/a.jpg"),
        ({"image": "/a.jpg", "slide": "s3://b/a.svs"}, "s3://b/a.svs"),
        ({"image": ["/1.png", "/2.png"]}, ("/1.png", "/2.png")),
        ({"image": "/a.jpg", "slide": ["/1.png"]}, ("/1.png",)),
    ],
)
def test_the_slide_is_the_field_slide_or_else_the_image_and_a_list_is_a_bag_of_patches(data, location):
    assert parse_config(view(IMAGE, BRUSH)).slide_location(data) == location


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"picture": "/a.jpg"}, r"no field 'image' \(it has: picture\)"),
        ({}, "no fields at all"),
        ({"image": "/a.jpg", "slide": None}, "'slide' holds None"),
        ({"image": "  "}, "'image' holds"),
        ({"image": []}, "'image' holds"),
        ({"image": ["/a.png", 3]}, "'image' holds"),
        ({"image": {"url": "/a.png"}}, "'image' holds"),
    ],
)
def test_a_task_without_a_slide_is_told_which_field_is_missing(data, says):
    with pytest.raises(TaskFieldMissing, match=says):
        parse_config(view(IMAGE, BRUSH)).slide_location(data)


def test_an_image_whose_address_is_composed_needs_the_field_slide():
    config = parse_config(view('<Image name="image" value="http://backend/thumbnail?id=$id"/>', BRUSH))
    assert config.slide_location({"id": "7", "slide": "/a.svs"}) == "/a.svs"
    with pytest.raises(TaskFieldMissing, match="Add a field 'slide'"):
        config.slide_location({"id": "7"})


@pytest.mark.parametrize(
    ("xml", "says"),
    [
        (view(BRUSH), "no <Image"),
        (view(IMAGE), "no control that this backend can fill"),
        (view(IMAGE, '<EllipseLabels name="e" toName="image"><Label value="a"/></EllipseLabels>'), "no control"),
        (view(IMAGE, BRUSH.replace("toName", 'model_skip="true" toName')), "model_skip"),
        ("<View>", "not XML"),
        ("", "not XML"),
        ("{}", "not XML"),
    ],
)
def test_a_config_with_nothing_for_us_is_answered_with_an_example_that_works(xml, says):
    with pytest.raises(LabelConfigUnsupported, match=says) as caught:
        parse_config(xml)
    assert EXAMPLE in caught.value.hint
    assert parse_config(EXAMPLE).active("BrushLabels")


@pytest.mark.parametrize(
    ("tag", "attribute", "value"),
    [
        ("RectangleLabels", "model_top_k", "abc"),
        ("RectangleLabels", "model_top_k", "0"),
        ("RectangleLabels", "model_top_k", "401"),
        ("BrushLabels", "model_top_k", "5"),
        ("BrushLabels", "model_heatmap", "x"),
        ("RectangleLabels", "model_heatmap", "alpha"),
        ("RectangleLabels", "model_score_threshold", "1.5"),
        ("RectangleLabels", "model_score_threshold", "nan"),
        ("RectangleLabels", "model_skip", "perhaps"),
    ],
)
def test_an_attribute_that_cannot_be_used_is_named_with_its_value_and_control(tag, attribute, value):
    xml = view(IMAGE, f'<{tag} name="c" toName="image" {attribute}="{value}"><Label value="a"/></{tag}>')
    with pytest.raises(LabelConfigUnsupported) as caught:
        parse_config(xml)
    assert attribute in str(caught.value)
    assert value in str(caught.value)
    assert "'c'" in str(caught.value)


def test_bands_with_a_single_label_and_controls_without_labels_are_refused():
    with pytest.raises(LabelConfigUnsupported, match="one label"):
        parse_config(view(IMAGE, BRUSH.replace("toName", 'model_heatmap="bands" toName')))
    with pytest.raises(LabelConfigUnsupported, match="'b'> takes its labels from each task"):
        parse_config(view(IMAGE, '<BrushLabels name="b" toName="image" value="$labels"/>'))
    with pytest.raises(LabelConfigUnsupported, match="two controls named 'heat'"):
        parse_config(view(IMAGE, BRUSH, BRUSH))


def test_entities_are_refused_before_they_are_expanded():
    bomb = (
        '<!DOCTYPE v [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;"><!ENTITY c "&b;&b;&b;&b;&b;">]>'
        f"<View>&c;{IMAGE}{BRUSH}</View>"
    )
    with pytest.raises(LabelConfigUnsupported, match="DOCTYPE"):
        parse_config(bomb)
