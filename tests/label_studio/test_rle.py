"""Brush masks are written as the editor reads them; the SDK's own decoder is the judge."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from label_studio_sdk.converter import brush

from backend.label_studio import rle

images = hnp.arrays(
    np.uint8, hnp.array_shapes(min_dims=2, max_dims=2, max_side=40), elements=st.sampled_from([0, 1, 17, 255])
)


@settings(deadline=None, max_examples=60)
@given(images)
def test_the_sdk_decodes_what_we_encode_into_four_equal_channels(alpha):
    decoded = brush.decode_rle(rle.encode_alpha(alpha))
    assert np.array_equal(decoded.reshape(*alpha.shape, 4), np.repeat(alpha[..., None], 4, axis=2))


@settings(deadline=None, max_examples=60)
@given(images)
def test_we_decode_what_either_encoder_writes(alpha):
    expected = np.repeat(alpha.ravel(), 4)
    assert np.array_equal(rle.decode(rle.encode_alpha(alpha)), expected)
    assert np.array_equal(rle.decode(brush.mask2rle(alpha)), expected)


def test_random_alpha_of_every_value_survives():
    alpha = np.random.default_rng(0).integers(0, 256, size=(61, 83), dtype=np.uint8)
    code = rle.encode_alpha(alpha)
    assert np.array_equal(brush.decode_rle(code), np.repeat(alpha.ravel(), 4))
    assert np.array_equal(rle.decode(code), np.repeat(alpha.ravel(), 4))


@pytest.mark.parametrize("pixels", [1, 2, 3, 4, 5, 64, 65, 16_384, 16_385, 32_768, 100_000])
def test_runs_on_either_side_of_each_token_width_survive(pixels):
    code = rle.encode_runs(np.array([pixels, 3]), np.array([200, 7]))
    assert np.array_equal(brush.decode_rle(code), np.repeat([200, 7], [4 * pixels, 12]))
    assert np.array_equal(rle.decode(code), np.repeat([200, 7], [4 * pixels, 12]))


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_grid_is_encoded_as_if_it_had_been_drawn(data):
    width, height = data.draw(st.integers(1, 60)), data.draw(st.integers(1, 60))
    levels = data.draw(hnp.arrays(np.uint8, hnp.array_shapes(min_dims=2, max_dims=2, max_side=12)))
    rows, columns = levels.shape
    xs = np.sort(data.draw(hnp.arrays(np.int64, columns + 1, elements=st.integers(0, width))))
    ys = np.sort(data.draw(hnp.arrays(np.int64, rows + 1, elements=st.integers(0, height))))
    drawn = np.zeros((height, width), dtype=np.uint8)
    for r in range(rows):
        for c in range(columns):
            drawn[ys[r] : ys[r + 1], xs[c] : xs[c + 1]] = levels[r, c]
    code = rle.encode_grid(levels, xs, ys, (width, height))
    assert np.array_equal(rle.decode(code), np.repeat(drawn.ravel(), 4))


def test_tokens_that_list_their_values_one_by_one_are_read_as_the_sdk_reads_them():
    values = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
    bits = f"{len(values):032b}{7:05b}" + "".join(f"{width - 1:04b}" for width in (3, 4, 8, 16))
    bits += "0" + "01" + f"{len(values) - 1:04b}" + "".join(f"{value:08b}" for value in values)
    bits += "0" * (-len(bits) % 8)
    code = [int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)]
    assert brush.decode_rle(code).tolist() == values
    assert rle.decode(code).tolist() == values


def test_a_stream_longer_than_one_chunk_of_the_decoder_survives():
    alpha = np.random.default_rng(1).integers(0, 256, size=(300, 700), dtype=np.uint8)
    code = rle.encode_alpha(alpha)
    assert len(code) > 3 * (1 << 16)
    assert np.array_equal(rle.decode(code), np.repeat(alpha.ravel(), 4))


@pytest.mark.parametrize(
    "broken",
    [
        [],
        [1, 2, 3],
        [300] * 20,
        [-1] * 20,
        [0.5] * 20,
        rle.encode_alpha(np.arange(100, dtype=np.uint8).reshape(10, 10))[:-20],
        [255, 255, 255, 255, *rle.encode_alpha(np.zeros((9, 9), dtype=np.uint8))[4:]],
    ],
)
def test_what_is_no_mask_is_refused(broken):
    with pytest.raises(ValueError, match=r"stream"):
        rle.decode(broken)


def test_an_image_without_pixels_is_refused():
    with pytest.raises(ValueError, match="without pixels"):
        rle.encode_alpha(np.zeros((0, 5), dtype=np.uint8))
