"""GeoJSON that QuPath opens, and files that are whole or not there."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_bags import synthetic_patches, synthetic_result

from backend.errors import ExportUnsupported
from backend.results.export import write_bytes, write_json
from backend.results.ranks import hottest_first, percentile_ranks
from backend.slides.geojson import to_geojson


@settings(deadline=None, max_examples=40)
@given(st.floats(0.05, 5.0), st.integers(1, 25), st.integers(1, 25))
def test_every_ring_begins_at_its_tile_and_ends_where_the_next_one_begins(mpp, columns, rows):
    edge = 224 * 0.5 / mpp
    result = synthetic_result((int(np.ceil(columns * edge)), int(np.ceil(rows * edge))), mpp)
    rings = [feature["geometry"]["coordinates"] for feature in to_geojson(result, "s")["features"]]
    assert all(len(ring) == 1 for ring in rings), "a tile has no holes"
    rings = np.array([ring[0] for ring in rings], dtype=np.float64)
    assert np.array_equal(rings[:, 0], result.bag.coords)
    assert np.array_equal(rings[:, 0], rings[:, -1]), "a ring is closed"
    ends = np.round((result.bag.grid + 1) * result.bag.tile_size_level0)
    assert np.array_equal(rings[:, 2], np.minimum(ends, result.bag.slide_size))
    assert np.array_equal(rings[:, 1], np.stack([rings[:, 2, 0], rings[:, 0, 1]], axis=1))
    assert np.array_equal(rings[:, 3], np.stack([rings[:, 0, 0], rings[:, 2, 1]], axis=1))


def test_whole_numbers_stay_whole(tmp_path):
    write_json(tmp_path / "s.geojson", to_geojson(synthetic_result(mpp=0.25), "s"))
    feature = json.loads((tmp_path / "s.geojson").read_text())["features"][1]
    assert feature["geometry"]["coordinates"][0][:3] == [[448, 0], [896, 0], [896, 448]]
    assert all(isinstance(number, int) for point in feature["geometry"]["coordinates"][0] for number in point)


def test_the_weights_themselves_are_exported_for_the_mean_and_each_head(tmp_path):
    result = synthetic_result(planted=(2, 2, 4, 4))
    path = tmp_path / "deep" / "s.geojson"
    write_json(path, to_geojson(result, "slide 1"))
    collection = json.loads(path.read_text())
    assert collection["type"] == "FeatureCollection"
    assert collection["name"] == "slide 1"
    assert collection["provenance"]["model_version"] == "WSC test 1"
    measured = [feature["properties"]["measurements"] for feature in collection["features"]]
    assert np.array_equal(np.float32([m["Attention"] for m in measured]), result.mean_attention)
    for head in range(8):
        assert np.array_equal(np.float32([m[f"Attention head {head}"] for m in measured]), result.attention[:, head])
    assert np.array_equal([[m["Column"], m["Row"]] for m in measured], result.bag.grid)
    assert sum(m["Attention"] for m in measured) == pytest.approx(1, abs=1e-5)


def test_qupath_finds_object_type_class_name_and_colour_on_every_tile():
    result = synthetic_result(planted=(2, 2, 4, 4))
    features = to_geojson(result, "s")["features"]
    assert len({feature["id"] for feature in features}) == len(features)
    for feature in features:
        properties = feature["properties"]
        assert properties["objectType"] == "tile"
        assert properties["classification"]["name"].startswith("Attention: ")
        assert all(0 <= channel <= 255 for channel in properties["classification"]["color"])
    share = np.mean([f["properties"]["classification"]["name"] == "Attention: top 10 %" for f in features])
    assert share == pytest.approx(0.1, abs=0.01)
    assert to_geojson(result, "s")["features"] == features, "the same export twice is the same file"
    other = to_geojson(result, "another slide", object_type="annotation")["features"]
    assert other[0]["properties"]["objectType"] == "annotation"
    assert other[0]["id"] != features[0]["id"]


def test_patches_have_no_place_on_a_slide_and_the_user_is_told():
    with pytest.raises(ExportUnsupported, match="HDF5"):
        to_geojson(synthetic_patches([(5, 5)], hot=0), "s")


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "r.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": float("nan")})
    with pytest.raises(TypeError):
        write_bytes(path, "not bytes")
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]
    write_json(path, {"µ": 2})
    assert "µ" in path.read_text(encoding="utf-8")


def test_percentile_ranks_run_from_0_to_1_and_equal_tiles_share_theirs():
    assert percentile_ranks(np.array([3.0, 1.0, 2.0])).tolist() == [1.0, 0.0, 0.5]
    assert percentile_ranks(np.array([1.0, 1.0, 2.0])).tolist() == [0.25, 0.25, 1.0]
    assert percentile_ranks(np.array([7.0, 7.0])).tolist() == [0.5, 0.5]
    assert percentile_ranks(np.array([7.0])).tolist() == [0.5]
    assert percentile_ranks(np.array([])).tolist() == []


def test_the_hottest_tile_comes_first_and_equals_keep_their_order():
    assert hottest_first(np.array([1.0, 3.0, 3.0, 2.0])).tolist() == [1, 2, 3, 0]
