"""What Label Studio is given to draw: is it where the attention is, and does it survive there?"""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from label_studio_sdk.converter.brush import decode_rle
from skimage.measure import points_in_poly
from synthetic_bags import grid_of, synthetic_patches, synthetic_result

from backend.errors import HeadMismatch, LabelConfigUnsupported, RequestInvalid
from backend.label_studio import rle
from backend.label_studio.check import check_prediction
from backend.label_studio.drawn_area import DrawnArea, area_from_context
from backend.label_studio.labeling_config import load_template, parse_config
from backend.label_studio.learnt import HeadSuggestion, Learnt, TileClasses
from backend.label_studio.regions import predict_regions
from backend.slides.geojson import to_geojson
from backend.slides.render import shown_size

IMAGE = '<Image name="image" value="$image"/>'
EVERY_KIND = f"""<View>{IMAGE}
  <BrushLabels name="brush" toName="image"><Label value="Attention"/></BrushLabels>
  <RectangleLabels name="rectangle" toName="image"><Label value="Hot"/><Label value="Other"/></RectangleLabels>
  <PolygonLabels name="polygon" toName="image"><Label value="Area"/></PolygonLabels>
  <KeyPointLabels name="keypoint" toName="image"><Label value="Peak"/></KeyPointLabels>
  <TextArea name="summary" toName="image"/>
  <Choices name="diagnosis" toName="image"><Choice value="Tumour"/><Choice value="No tumour"/></Choices>
</View>"""


def config_with(tag, labels=("Attention",), attributes=""):
    children = "".join(f'<Label value="{label}"/>' for label in labels)
    return f'<View>{IMAGE}<{tag} name="c" toName="image" {attributes}>{children}</{tag}></View>'


def predict(result, xml=EVERY_KIND, **given_):
    options = {"image_size": None, "model_version": "WSC test 1", "settings_top_k": 10, **given_}
    return predict_regions(result, parse_config(xml), **options)


def by_type(prediction, kind):
    return [region for region in prediction["result"] if region["type"] == kind]


def alpha_of(region):
    width, height = region["original_width"], region["original_height"]
    return rle.decode(region["value"]["rle"]).reshape(height, width, 4)[..., 3]


# --- geometry ---------------------------------------------------------------------------------------------------


@st.composite
def slides(draw):
    """A slide of any size and scale, with a planted block of at most a tenth of its tiles."""
    mpp = draw(st.floats(0.05, 5.0))
    edge = 224 * 0.5 / mpp
    columns, rows = draw(st.integers(6, 40)), draw(st.integers(6, 40))
    size = int(columns * edge + draw(st.floats(1, edge - 1))), int(rows * edge + draw(st.floats(1, edge - 1)))
    columns, rows, _ = grid_of(size, mpp)
    wide, high = draw(st.integers(2, 5)), draw(st.integers(2, 5))
    assume(wide * high <= round(0.1 * columns * rows))
    c0, r0 = draw(st.integers(0, columns - wide)), draw(st.integers(0, rows - high))
    return size, mpp, (c0, r0, c0 + wide, r0 + high)


@settings(deadline=None, max_examples=40)
@given(slides())
def test_the_planted_region_lies_where_brush_rectangles_polygon_keypoint_and_geojson_say(drawn):
    size, mpp, planted = drawn
    c0, r0, c1, r1 = planted
    edge = 224 * 0.5 / mpp
    result = synthetic_result(size, mpp, planted=planted)
    tiles = (c1 - c0) * (r1 - r0)
    prediction = predict(result, settings_top_k=tiles)
    check_prediction(prediction, EVERY_KIND, shown_size(size))

    to_level0 = np.array(size) / 100
    corners = {(c * edge, r * edge) for c in range(c0, c1) for r in range(r0, r1)}
    centres = np.array(sorted(corners)) + edge / 2

    rectangles = by_type(prediction, "rectanglelabels")
    found = np.array([[r["value"]["x"], r["value"]["y"]] for r in rectangles]) * to_level0
    assert sorted(map(tuple, np.rint(found).astype(int))) == sorted((round(x), round(y)) for x, y in corners)
    extent = np.array([[r["value"]["width"], r["value"]["height"]] for r in rectangles]) * to_level0
    assert np.allclose(extent, edge, atol=0.51), "only the slide's border may shorten a tile"

    (brush,) = by_type(prediction, "brushlabels")
    alpha = alpha_of(brush)
    height, width = alpha.shape
    pixel_x, pixel_y = (np.arange(width) + 0.5) * size[0] / width, (np.arange(height) + 0.5) * size[1] / height
    inside = ((pixel_x >= c0 * edge) & (pixel_x < c1 * edge))[None] & ((pixel_y >= r0 * edge) & (pixel_y < r1 * edge))[
        :, None
    ]
    if inside.any():
        assert alpha[inside].min() >= alpha[~inside].max()
        assert alpha[inside].min() > alpha[~inside].mean()

    polygon = np.array(by_type(prediction, "polygonlabels")[0]["value"]["points"]) * to_level0
    assert points_in_poly(centres, polygon).all()
    peak = by_type(prediction, "keypointlabels")[0]["value"]
    x, y = np.array([peak["x"], peak["y"]]) * to_level0
    assert c0 * edge - 1 <= x <= c1 * edge + 1
    assert r0 * edge - 1 <= y <= r1 * edge + 1

    features = to_geojson(result, "s")["features"]
    hottest = sorted(features, key=lambda f: -f["properties"]["measurements"]["Attention"])[:tiles]
    assert {tuple(f["geometry"]["coordinates"][0][0]) for f in hottest} == {(round(x), round(y)) for x, y in corners}


@settings(deadline=None, max_examples=30)
@given(
    st.floats(0.05, 5), st.integers(1, 30), st.integers(1, 30), st.integers(1, 90), st.integers(1, 90), st.floats(0, 1)
)
def test_each_pixel_of_the_brush_has_the_colour_of_the_tile_that_holds_its_centre(
    mpp, columns, rows, width, height, tissue
):
    edge = 224 * 0.5 / mpp
    size = int(np.ceil((columns + 0.4) * edge)), int(np.ceil((rows + 0.7) * edge))
    result = synthetic_result(size, mpp, tissue=tissue)
    (region,) = predict(result, config_with("BrushLabels"), image_size=(width, height))["result"]
    alpha = alpha_of(region)
    assert alpha.shape == (height, width)
    assert np.array_equal(decode_rle(region["value"]["rle"]).reshape(height, width, 4)[..., 3], alpha)

    number = {tuple(cell): i for i, cell in enumerate(result.bag.grid.tolist())}
    seen: dict[int, int] = {}
    for y in range(height):
        for x in range(width):
            at_x, at_y = (x + 0.5) * size[0] / width / edge, (y + 0.5) * size[1] / height / edge
            if min(abs(at_x - round(at_x)), abs(at_y - round(at_y))) < 1e-9:
                continue  # a pixel whose centre is on the line between two tiles may go to either
            tile = number.get((int(at_x), int(at_y)))
            if tile is None:
                assert alpha[y, x] == 0, "glass is not painted"
            else:
                assert alpha[y, x] > 0
                assert seen.setdefault(tile, alpha[y, x]) == alpha[y, x], "a tile has one colour"
    by_attention = sorted(seen, key=lambda tile: result.mean_attention[tile])
    assert [seen[tile] for tile in by_attention] == sorted(seen.values()), "more attention is never fainter"


def test_the_alpha_map_uses_sixteen_levels_up_to_opaque():
    (region,) = predict(synthetic_result(), config_with("BrushLabels"))["result"]
    levels = np.unique(alpha_of(region))
    assert len(levels[levels > 0]) == 16
    assert levels.max() == 255


def test_bands_share_out_the_tiles_from_low_to_high():
    result = synthetic_result()
    labels = ("low", "middle", "high")
    regions = predict(result, config_with("BrushLabels", labels), image_size=(1000, 750))["result"]
    assert [region["value"]["brushlabels"] for region in regions] == [["low"], ["middle"], ["high"]]
    painted = np.array([alpha_of(region) > 0 for region in regions])
    assert painted.sum(axis=0).max() == 1, "no tile is in two bands"
    (whole,) = predict(result, config_with("BrushLabels"), image_size=(1000, 750))["result"]
    assert np.array_equal(painted.any(axis=0), alpha_of(whole) > 0)
    strength = [alpha_of(whole)[band].min() for band in painted]
    assert strength == sorted(strength)
    shares = painted.sum(axis=(1, 2)) / painted.sum()
    assert shares == pytest.approx([0.5, 0.25, 0.25], abs=0.02)


def test_model_heatmap_overrules_the_number_of_labels():
    xml = config_with("BrushLabels", ("one", "two"), 'model_heatmap="alpha"')
    (region,) = predict(synthetic_result(), xml)["result"]
    assert region["value"]["brushlabels"] == ["one"]
    assert len(np.unique(alpha_of(region))) > 10


# --- scores, limits, attributes -----------------------------------------------------------------------------------


def test_rectangles_come_hottest_first_with_relative_scores_and_the_weights_in_meta():
    result = synthetic_result(planted=(3, 3, 5, 5))
    regions = by_type(predict(result), "rectanglelabels")
    scores = [region["score"] for region in regions]
    assert len(regions) == 10
    assert scores[0] == 1.0
    assert scores == sorted(scores, reverse=True)
    order = np.argsort(-result.mean_attention)
    for rank, region in enumerate(regions, start=1):
        tile, meta = order[rank - 1], region["meta"]
        assert meta["rank"] == rank
        assert meta["attention"] == pytest.approx(result.mean_attention[tile])
        assert [meta["x"], meta["y"]] == result.bag.coords[tile].tolist()
        assert region["value"]["rectanglelabels"] == ["Hot"], "the first label is used"


@pytest.mark.parametrize("tag", ["RectangleLabels", "KeyPointLabels", "PolygonLabels"])
def test_model_top_k_and_model_score_threshold_limit_what_is_shown(tag):
    result = synthetic_result((40_000, 30_000), planted=(3, 3, 5, 5))
    every = predict(result, config_with(tag), settings_top_k=400)["result"]
    assert len(every) > 5
    few = predict(result, config_with(tag, attributes='model_top_k="3"'), settings_top_k=400)["result"]
    assert [r["value"] for r in few] == [r["value"] for r in every[:3]]
    strong = predict(result, config_with(tag, attributes='model_score_threshold="0.5"'), settings_top_k=400)["result"]
    assert 0 < len(strong) < len(every)
    assert min(region["score"] for region in strong) >= 0.5


def test_a_brush_with_a_threshold_leaves_weak_tiles_unpainted():
    result = synthetic_result(planted=(3, 3, 5, 5))
    (region,) = predict(result, config_with("BrushLabels", attributes='model_score_threshold="0.2"'))["result"]
    columns, rows = result.bag.grid_size
    share_of_four_tiles = 4 * (result.bag.tile_size_level0**2) / (20_000 * 15_000)
    assert (alpha_of(region) > 0).mean() == pytest.approx(share_of_four_tiles, rel=0.05)
    assert columns * rows > 100


def test_peaks_keep_their_distance_and_tiny_areas_are_left_out():
    result = synthetic_result(tissue=0.5, seed=3)
    edge = np.array([result.bag.tile_size_level0] * 2) / result.bag.slide_size * 100
    at = np.array([[r["value"]["x"], r["value"]["y"]] for r in by_type(predict(result), "keypointlabels")]) / edge
    assert len(at) > 3
    for i, point in enumerate(at):
        others = np.delete(at, i, axis=0)
        assert np.abs(others - point).max(axis=1).min() > 2.9
    areas = by_type(predict(result, settings_top_k=400), "polygonlabels")
    assert all(area["meta"]["tiles"] >= 3 or area["score"] == 1.0 for area in areas)


def test_an_area_with_a_hole_is_drawn_without_it():
    result = synthetic_result(planted=(4, 4, 9, 9))
    inside = ((result.bag.grid >= 5) & (result.bag.grid < 8)).all(axis=1)
    logits = result.attention_logits.copy()
    logits[inside] = -3
    ring = replace(result, attention_logits=logits)
    region = by_type(predict(ring), "polygonlabels")[0]
    points = np.array(region["value"]["points"]) / 100 * ring.bag.slide_size / ring.bag.tile_size_level0
    assert points_in_poly(np.array([[6.5, 6.5], [4.5, 4.5]]), points).all()


def test_a_bag_without_any_difference_still_gives_a_prediction():
    result = synthetic_result()
    flat = replace(result, attention_logits=np.zeros_like(result.attention_logits))
    prediction = predict(flat)
    check_prediction(prediction, EVERY_KIND, shown_size(flat.bag.slide_size))
    painted = np.unique(alpha_of(by_type(prediction, "brushlabels")[0]))
    assert len(painted[painted > 0]) == 1, "no tile stands out, so all have one colour"


def test_a_slide_of_one_tile_gives_a_prediction():
    result = synthetic_result((230, 230), 0.5)
    assert len(result.bag) == 1
    prediction = predict(result)
    check_prediction(prediction, EVERY_KIND, (230, 230))
    assert {region["type"] for region in prediction["result"]} == {
        "brushlabels", "rectanglelabels", "polygonlabels", "keypointlabels", "textarea",
    }  # fmt: skip


# --- what Label Studio keeps ----------------------------------------------------------------------------------------


def test_machine_regions_are_marked_as_such_and_cannot_be_edited():
    for region in predict(synthetic_result())["result"]:
        assert region["origin"] == "prediction"
        assert region["readonly"] is True
        if region["type"] != "textarea":
            assert (region["original_width"], region["original_height"]) == (2000, 1500)
            assert region["image_rotation"] == 0


def test_without_a_head_there_is_no_score_no_choice_and_the_embedding_is_on_the_first_region():
    result = synthetic_result()
    prediction = predict(result)
    assert "score" not in prediction
    assert by_type(prediction, "choices") == []
    embedding = prediction["result"][0]["meta"]["embedding"]
    assert np.allclose(embedding, result.slide_embedding, rtol=1e-5)
    assert sum("embedding" in region.get("meta", {}) for region in prediction["result"]) == 1
    assert len(json.dumps(embedding)) < 10_000


def test_with_a_head_its_choice_can_be_changed_and_carries_score_and_embedding():
    prediction = predict(synthetic_result(), learnt=Learnt((HeadSuggestion("diagnosis", "Tumour", 0.83),)))
    (choice,) = by_type(prediction, "choices")
    assert prediction["score"] == 0.83
    assert choice["value"] == {"choices": ["Tumour"]}
    assert choice["readonly"] is False, "the annotator must be able to say otherwise"
    assert len(choice["meta"]["embedding"]) == 768
    assert "embedding" not in prediction["result"][0].get("meta", {})
    check_prediction(prediction, EVERY_KIND, (2000, 1500))


def test_a_head_can_fill_a_number():
    xml = f'<View>{IMAGE}<Number name="grade" toName="image"/></View>'
    prediction = predict(synthetic_result(), xml, learnt=Learnt((HeadSuggestion("grade", 2.5, 0.6),)))
    assert prediction["result"][0]["value"] == {"number": 2.5}
    check_prediction(prediction, xml, (2000, 1500))


def test_a_head_can_rate_and_can_choose_several():
    xml = f"""<View>{IMAGE}<Rating name="stars" toName="image"/>
      <Choices name="seen" toName="image" choice="multiple"><Choice value="a"/><Choice value="b"/></Choices></View>"""
    rated, seen = HeadSuggestion("stars", 4.0, 0.7), HeadSuggestion("seen", ("a", "b"), 0.6)
    prediction = predict(synthetic_result(), xml, learnt=Learnt((rated, seen)))
    assert [region["value"] for region in prediction["result"]] == [{"rating": 4}, {"choices": ["a", "b"]}]
    assert prediction["score"] == 0.6, "the least certain answer is what makes a slide worth labelling"
    check_prediction(prediction, xml, (2000, 1500))
    none = predict(synthetic_result(), xml, learnt=Learnt((rated, HeadSuggestion("seen", (), 0.9))))
    assert [region["type"] for region in none["result"]] == ["rating"], "an empty answer is no region"


def test_a_head_for_a_choice_that_is_gone_says_so():
    for said in (HeadSuggestion("diagnosis", "Benign", 0.9), HeadSuggestion("grade", "1", 0.9)):
        with pytest.raises(HeadMismatch, match="does not offer"):
            predict(synthetic_result(), learnt=Learnt((said,)))


CLASSES = f"""<View>{IMAGE}
  <BrushLabels name="attention" toName="image"><Label value="Attention"/></BrushLabels>
  <BrushLabels name="classes" toName="image" model_heatmap="classes"><Label value="Tumour"/><Label value="Stroma"/></BrushLabels>
</View>"""


def test_a_tile_head_paints_each_tile_with_its_most_probable_class_and_attention_stays():
    result = synthetic_result()
    n = len(result.bag)
    p = np.full((n, 2), 0.1, np.float32)
    p[: n // 2, 1], p[n // 2 :, 1] = 0.9, 0.2
    p[:, 0] = 1 - p[:, 1]
    learnt = Learnt(tiles=(TileClasses("tiles", ("Tumour", "Stroma"), p),))
    size = (1000, 750)
    prediction = predict(result, CLASSES, image_size=size, learnt=learnt)
    brushes = by_type(prediction, "brushlabels")
    assert [region["value"]["brushlabels"] for region in brushes] == [["Attention"], ["Tumour"], ["Stroma"]]
    check_prediction(prediction, CLASSES, size)
    alpha = {r["value"]["brushlabels"][0]: rle.decode(r["value"]["rle"]).reshape(750, 1000, 4)[..., 3] for r in brushes}
    centres = (result.bag.coords + result.bag.tile_size_level0 / 2) / np.array(result.bag.slide_size) * np.array(size)
    x, y = np.floor(centres).astype(int).T
    stroma = np.arange(n) < n // 2
    assert (alpha["Stroma"][y, x] > 0).tolist() == stroma.tolist()
    assert (alpha["Tumour"][y, x] > 0).tolist() == (~stroma).tolist()
    assert alpha["Stroma"][y[0], x[0]] > alpha["Tumour"][y[-1], x[-1]], "0.9 is stronger than 0.8"


def test_a_brush_for_classes_stays_empty_without_a_head_and_a_head_of_other_classes_leaves_it_alone():
    other = TileClasses("tiles", ("Tumour", "Necrosis"), np.full((len(synthetic_result().bag), 2), 0.5, np.float32))
    for learnt in (Learnt(), Learnt(tiles=(other,))):
        brushes = by_type(predict(synthetic_result(), CLASSES, learnt=learnt), "brushlabels")
        assert [region["value"]["brushlabels"] for region in brushes] == [["Attention"]]


def test_choices_alone_stay_empty_until_a_head_exists_and_the_user_is_told_what_to_add():
    xml = f'<View>{IMAGE}<Choices name="d" toName="image"><Choice value="Tumour"/></Choices></View>'
    with pytest.raises(LabelConfigUnsupported, match="until a head has been trained") as caught:
        predict(synthetic_result(), xml)
    assert "<BrushLabels" in caught.value.hint
    assert predict(synthetic_result(), xml, learnt=Learnt((HeadSuggestion("d", "Tumour", 0.7),)))["score"] == 0.7


def test_top_k_of_zero_with_only_rectangles_is_an_error_and_not_an_empty_prediction():
    with pytest.raises(LabelConfigUnsupported, match="TOP_K is 0"):
        predict(synthetic_result(), config_with("RectangleLabels"), settings_top_k=0)


def test_the_same_result_gives_the_same_ids_and_another_version_gives_others():
    result = synthetic_result()
    assert predict(result) == predict(result)
    first = {region["id"] for region in predict(result)["result"]}
    assert len(first) == len(predict(result)["result"])
    assert first.isdisjoint(region["id"] for region in predict(result, model_version="WSC test 2")["result"])
    assert first.isdisjoint(region["id"] for region in predict(synthetic_result(seed=1))["result"])


@pytest.mark.parametrize("stand_in", [True, False])
def test_the_summary_says_what_was_done_by_which_model_and_that_it_is_no_diagnosis(stand_in):
    result = synthetic_result(mpp=0.2527, stand_in=stand_in)
    (region,) = by_type(predict(result), "textarea")
    (text,) = region["value"]["text"]
    assert f"{len(result.bag)} tiles" in text
    assert "0.2527 µm/px, from the slide's file" in text
    top = np.sort(result.mean_attention)[-10:].sum()
    assert f"The 10 tiles with the highest attention hold {top:.1%}" in text
    assert "WSC test 1" in text
    assert "not for diagnosis" in text
    assert ("stand-in model" in text) == stand_in


def test_a_scale_that_was_assumed_is_said_to_be():
    result = synthetic_result()
    assumed = replace(result, bag=replace(result.bag, mpp_source="default"))
    assert "assumed" in by_type(predict(assumed), "textarea")[0]["value"]["text"][0]


def test_a_shown_image_of_any_size_gets_a_mask_of_exactly_that_size():
    for size in [(1, 1), (7, 3), (333, 250), (2000, 1500)]:
        prediction = predict(synthetic_result(), image_size=size)
        check_prediction(prediction, EVERY_KIND, size)
        assert alpha_of(by_type(prediction, "brushlabels")[0]).shape == size[::-1]


# --- bags of patches --------------------------------------------------------------------------------------------------


def test_each_patch_gets_its_attention_on_its_own_page():
    sizes = [(224, 224), (100, 50), (640, 480), (31, 7)]
    result = synthetic_patches(sizes, hot=2)
    xml = load_template("patches")
    prediction = predict(result, xml, settings_top_k=2)
    check_prediction(prediction, xml, None)
    brushes = by_type(prediction, "brushlabels")
    assert [region["item_index"] for region in brushes] == [0, 1, 2, 3]
    for region, (width, height) in zip(brushes, sizes, strict=True):
        assert (region["original_width"], region["original_height"]) == (width, height)
        assert len(np.unique(alpha_of(region))) == 1, "a patch has one attention, so one colour"
    assert max(brushes, key=lambda r: alpha_of(r)[0, 0])["item_index"] == 2
    assert brushes[2]["score"] == 1.0
    rectangles = by_type(prediction, "rectanglelabels")
    assert len(rectangles) == 2
    assert rectangles[0]["item_index"] == 2
    assert rectangles[0]["value"]["width"] == rectangles[0]["value"]["height"] == 100
    (text,) = by_type(prediction, "textarea")[0]["value"]["text"]
    assert "4 patches analysed" in text
    assert f"The patch with the highest attention holds {result.mean_attention.max():.1%} of it (25.0%" in text


def test_a_bag_of_patches_needs_an_image_with_pages():
    with pytest.raises(LabelConfigUnsupported, match="valueList"):
        predict(synthetic_patches([(10, 10)], hot=0), config_with("BrushLabels"))


def test_patches_have_no_outlines_and_a_config_with_only_these_says_so():
    xml = config_with("PolygonLabels").replace('value="$image"', 'valueList="$patches"')
    with pytest.raises(LabelConfigUnsupported, match="show nothing of patches"):
        predict(synthetic_patches([(10, 10)] * 3, hot=0), xml)


def test_a_slide_in_a_config_with_pages_is_drawn_on_the_first_page():
    prediction = predict(synthetic_result(), load_template("patches"))
    drawn = [region for region in prediction["result"] if region["type"] != "textarea"]
    assert {region["item_index"] for region in drawn} == {0}


# --- a drawn area -------------------------------------------------------------------------------------------------


def rectangle(x, y, width, height, **more):
    return DrawnArea("rectangle", {"value": {"x": x, "y": y, "width": width, "height": height, **more}})


def test_in_a_drawn_box_attention_is_pooled_over_its_tiles_only():
    result = synthetic_result(planted=(2, 2, 4, 4))
    box = rectangle(50, 0, 50, 100)  # the planted tiles are not in it
    prediction = predict(result, area=box, settings_top_k=10_000)
    centres = (result.bag.coords + result.bag.tile_size_level0 / 2) / result.bag.slide_size * 100
    inside = centres[:, 0] >= 50
    rectangles = by_type(prediction, "rectanglelabels")
    assert len(rectangles) == inside.sum()
    assert sum(region["meta"]["attention"] for region in rectangles) == pytest.approx(1.0, abs=1e-5)
    assert rectangles[0]["score"] == 1.0
    corners = {(region["meta"]["x"], region["meta"]["y"]) for region in rectangles}
    assert corners == {tuple(corner) for corner in result.bag.coords[inside].tolist()}
    alpha = alpha_of(by_type(prediction, "brushlabels")[0])
    assert not alpha[:, : alpha.shape[1] // 2 - 30].any()
    assert by_type(prediction, "textarea") == []
    assert all("embedding" not in region.get("meta", {}) for region in prediction["result"])
    check_prediction(prediction, EVERY_KIND, (2000, 1500))


def test_a_box_over_the_whole_slide_gives_the_slides_own_attention():
    result = synthetic_result()
    whole = by_type(predict(result), "rectanglelabels")
    boxed = by_type(predict(result, area=rectangle(0, 0, 100, 100)), "rectanglelabels")
    assert [r["meta"]["attention"] for r in boxed] == pytest.approx([r["meta"]["attention"] for r in whole])
    assert {r["id"] for r in boxed}.isdisjoint(r["id"] for r in whole)


def test_a_box_without_tiles_gives_no_regions():
    empty = predict(synthetic_result(tissue=0.0, planted=(2, 2, 4, 4)), area=rectangle(80, 80, 5, 5))
    assert empty == {"model_version": "WSC test 1", "result": []}
    pages = predict(synthetic_patches([(9, 9)], hot=0), load_template("patches"), area=rectangle(0, 0, 100, 100))
    assert pages["result"] == []


def tiles_of(region, bag):
    return {tuple(c) for c in bag.grid[DrawnArea(region["type"], region).tiles(bag)].tolist()}


def mask_of(alpha):
    height, width = alpha.shape
    code = rle.encode_alpha(255 * alpha.astype(np.uint8))
    frame = {"original_width": width, "original_height": height}
    return {"type": "brush", "value": {"format": "rle", "rle": code}, **frame}


def test_every_kind_of_drawing_covers_the_tiles_whose_centres_lie_in_it():
    bag = synthetic_result((2240, 2240), 0.5).bag
    middle = {(c, r) for c in (4, 5) for r in (4, 5)}
    half = {"x": 40, "y": 40, "width": 20, "height": 20}
    drawn = [
        {"type": "rectangle", "value": half},
        {"type": "rectangle", "value": {**half, "x": 60, "rotation": 90}},
        {"type": "ellipse", "value": {"x": 50, "y": 50, "radiusX": 9, "radiusY": 9}},
        {"type": "polygon", "value": {"points": [[41, 41], [59, 41], [59, 59], [41, 59]]}},
    ]
    square = np.zeros((200, 200), bool)
    square[80:120, 80:120] = True
    for region in (*drawn, mask_of(square)):
        assert tiles_of(region, bag) == middle, region["type"]


def test_a_point_a_thin_stroke_and_an_outline_within_one_tile_stand_for_the_tiles_that_they_touch():
    bag = synthetic_result((2240, 2240), 0.5).bag
    assert tiles_of({"type": "keypoint", "value": {"x": 33, "y": 77, "width": 1}}, bag) == {(3, 7)}
    small = {"type": "rectangle", "value": {"x": 31, "y": 71, "width": 1, "height": 1}}
    assert tiles_of(small, bag) == {(3, 7)}
    stroke = np.zeros((200, 200), bool)
    stroke[62, 41:79] = True  # through the upper half of the tiles of row 3
    assert tiles_of(mask_of(stroke), bag) == {(c, 3) for c in (2, 3)}


def test_what_is_drawn_last_counts_if_attention_can_be_pooled_over_it_on_our_image():
    config = parse_config(EVERY_KIND)
    drawn = {"type": "rectanglelabels", "to_name": "image", "value": {"x": 1, "y": 2, "width": 3, "height": 4}}
    answer = {"type": "choices", "to_name": "image", "value": {"choices": ["a"]}}
    assert area_from_context({"result": [answer, drawn]}, config).region == drawn
    other = {**drawn, "to_name": "another"}
    stroke = mask_of(np.ones((4, 4), bool))
    too_large = {**stroke, "original_width": 2**20, "original_height": 2**20}
    for region in (answer, other, too_large, {"type": "vector"}, "x", None):
        assert area_from_context({"result": [drawn, region]}, config) is None
    for nothing in ({"result": []}, {"result": None}, {"other": 1}):
        assert area_from_context(nothing, config) is None


def test_two_areas_have_two_keys_and_the_same_area_has_one():
    keys = {area.key for area in (rectangle(1, 2, 3, 4), rectangle(1, 2, 3, 4), rectangle(1, 2, 3, 5))}
    assert len(keys) == 2


@pytest.mark.parametrize("wrong", [{"width": 0}, {"x": "a"}, {"y": None}, {"height": float("nan")}])
def test_a_drawn_rectangle_that_has_no_place_is_an_error(wrong):
    with pytest.raises(RequestInvalid, match="drawn rectangle"):
        rectangle(**{"x": 1, "y": 2, "width": 3, "height": 4, **wrong}).tiles(synthetic_result().bag)
