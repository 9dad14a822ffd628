"""Nothing leaves that the editor could not digest."""

from __future__ import annotations

from copy import deepcopy

import pytest
from synthetic_bags import synthetic_result

from backend.errors import InvalidPrediction, LabelConfigUnsupported
from backend.label_studio.check import check_prediction
from backend.label_studio.labeling_config import parse_config
from backend.label_studio.learnt import HeadSuggestion, Learnt
from backend.label_studio.regions import predict_regions

XML = """<View><Image name="image" value="$image"/>
  <BrushLabels name="brush" toName="image"><Label value="Attention"/></BrushLabels>
  <RectangleLabels name="rectangle" toName="image"><Label value="Hot"/></RectangleLabels>
  <PolygonLabels name="polygon" toName="image"><Label value="Area"/></PolygonLabels>
  <KeyPointLabels name="keypoint" toName="image"><Label value="Peak"/></KeyPointLabels>
  <Choices name="choice" toName="image"><Choice value="Tumour"/></Choices>
</View>"""
SIZE = (400, 300)


@pytest.fixture(scope="module")
def good():
    result = synthetic_result(planted=(3, 3, 6, 6))
    suggestion = HeadSuggestion("choice", "Tumour", 0.9)
    return predict_regions(
        result,
        parse_config(XML),
        image_size=SIZE,
        model_version="WSC test 1",
        settings_top_k=3,
        learnt=Learnt((suggestion,)),
    )


def first(prediction, kind):
    return next(region for region in prediction["result"] if region["type"] == kind)


def test_a_good_prediction_passes_unchanged(good):
    before = deepcopy(good)
    check_prediction(good, XML, SIZE)
    assert good == before


def _set(path, value):
    def change(prediction):
        kind, *keys = path
        place = first(prediction, kind) if kind else prediction
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value

    return change


def _twice(prediction):
    prediction["result"].append(deepcopy(prediction["result"][0]))


def _without(kind, *keys):
    def change(prediction):
        place = first(prediction, kind)
        for key in keys[:-1]:
            place = place[key]
        del place[keys[-1]]

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_set(("", "model_version"), None), "model_version is None"),
        (_set(("", "model_version"), " "), "model_version"),
        (_set(("", "score"), None), "score is None.*leave it out"),
        (_set(("", "score"), 1.2), "score is 1.2"),
        (_set(("", "score"), float("nan")), "score is nan"),
        (_set(("", "score"), True), "score is True"),
        (_set(("", "result"), []), "result is empty"),
        (_set(("", "result"), None), "not a list"),
        (_set(("", "result"), [{"foo": "bar"}]), "ids are missing"),
        (_twice, "not unique"),
        (_set(("brushlabels", "from_name"), "brsuh"), "'brsuh'"),
        (_set(("brushlabels", "to_name"), "img"), "'img'"),
        (_set(("brushlabels", "type"), "rectanglelabels"), "does not fit"),
        (_set(("brushlabels", "value", "brushlabels"), ["Other"]), "not among those"),
        (_set(("brushlabels", "value", "brushlabels"), []), "not among those"),
        (_without("brushlabels", "value"), "value is missing"),
        (_without("brushlabels", "value", "rle"), "rle"),
        (_set(("brushlabels", "value", "rle"), [1, 2, 3] * 9), "rle"),
        (_set(("brushlabels", "value", "rle"), ["a"] * 30), "rle"),
        (_set(("brushlabels", "original_width"), 401), "an image of 401×300 px, and 400×300 px is shown"),
        (_set(("brushlabels", "original_height"), 0), "not pixels"),
        (_set(("rectanglelabels", "value", "x"), float("inf")), "finite"),
        (_set(("rectanglelabels", "value", "x"), None), "value.x holds None"),
        (_set(("rectanglelabels", "value", "x"), -1.0), "not percentages"),
        (_set(("rectanglelabels", "value", "width"), 99.9), "leaves the image"),
        (_set(("rectanglelabels", "value", "height"), 0.0), "is empty"),
        (_set(("rectanglelabels", "score"), 1.01), "score is 1.01"),
        (_set(("rectanglelabels", "meta", "attention"), float("nan")), "meta.attention holds nan"),
        (_set(("polygonlabels", "value", "points"), [[0, 0], [1, 1]]), "three or more"),
        (_set(("polygonlabels", "value", "points"), [[0, 0], [1, 1], [101, 3]]), "outside 0 to 100"),
        (_set(("polygonlabels", "value", "points"), [[0, 0], [1, float("nan")], [1, 3]]), "finite"),
        (_without("keypointlabels", "value", "width"), "x, y, width"),
        (_set(("choices", "value", "choices"), ["Benign"]), "not among those"),
        (_set(("choices", "meta", "embedding"), [1.0, float("-inf")]), "meta.embedding"),
    ],
)
def test_what_would_break_the_editor_is_refused_by_name(good, change, says):
    bad = deepcopy(good)
    change(bad)
    with pytest.raises(InvalidPrediction, match=says):
        check_prediction(bad, XML, SIZE)


def test_a_mask_of_another_size_is_refused_even_if_the_region_agrees_with_it(good):
    bad = deepcopy(good)
    for region in bad["result"]:
        if "original_width" in region:
            region["original_width"], region["original_height"] = 300, 401
    with pytest.raises(InvalidPrediction, match="decodes to 480000 bytes, not to 481200"):
        check_prediction(bad, XML, (300, 401))


def test_a_page_must_be_stated_where_the_image_has_pages(good):
    with pytest.raises(InvalidPrediction, match="item_index is missing"):
        check_prediction(good, XML.replace('value="$image"', 'valueList="$pages"'), SIZE)


def test_what_only_the_sdk_knows_is_refused_with_its_words(good):
    xml = XML.replace("</View>", '<Number name="n" toName="image"/></View>')
    bad = deepcopy(good)
    bad["result"].append(
        {"id": "n1", "from_name": "n", "to_name": "image", "type": "number", "value": {"number": "many"}}
    )
    with pytest.raises(InvalidPrediction, match="Invalid value for control 'n'"):
        check_prediction(bad, xml, SIZE)


def test_only_the_answer_to_a_smart_tool_may_be_empty():
    check_prediction({"model_version": "v", "result": []}, XML, SIZE, may_be_empty=True)
    with pytest.raises(InvalidPrediction, match="empty"):
        check_prediction({"model_version": "v", "result": []}, XML, SIZE)


def test_a_config_that_would_expand_entities_never_reaches_the_sdk(good):
    with pytest.raises(LabelConfigUnsupported, match="DOCTYPE"):
        check_prediction(good, '<!DOCTYPE v [<!ENTITY a "b">]>' + XML, SIZE)
