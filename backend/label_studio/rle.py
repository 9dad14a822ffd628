"""Label Studio's run-length code for brush masks, written and read with NumPy.

The format is that of ``@thi.ng/rle-pack`` (the editor decodes with it; ``label_studio_sdk.converter.brush`` has a Python
version that works bit by bit through strings). A stream of bits, most significant first:

- 32 bits: number of values; 5 bits: width of a value minus 1; four times 4 bits: widths of a run length minus 1;
- then tokens: 1 bit *repeat*, 2 bits *which of the four widths*, the run length minus 1 in that width, and one value (repeat)
  or as many values as the length says; zero bits up to the next byte.

The values are the bytes of an RGBA image of exactly the natural size of the picture shown: the editor copies them into a canvas
of that size. It replaces red, green and blue by the label's colour and keeps alpha. All four channels carry the alpha here, as
the SDK's own encoder does, which makes each pixel part of one run.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from backend.results.bag import Int64Array, UInt8Array

_LENGTH_BITS = (3, 4, 8, 16)
_VALUE_BITS = 8
_MAX_RUN = 1 << 16
_HEADER_BITS = 32 + 5 + 4 * 4
_DECODE_CHUNK_BYTES = 1 << 16


def encode_runs(lengths: npt.NDArray[np.integer], values: npt.NDArray[np.integer]) -> list[int]:
    """Encode an image given as runs.

    Parameters
    ----------
    lengths
        int (R,): pixels in each run, row by row through the image; zeros are allowed.
    values
        int (R,): alpha of each run, 0 to 255.

    Returns
    -------
    The stream as a list of bytes, the form of ``value.rle`` in a brush region.
    """
    lengths = lengths.astype(np.int64)
    some = lengths > 0
    lengths, values = lengths[some], values[some].astype(np.int64)
    if len(lengths) == 0:
        raise ValueError("an image without pixels cannot be encoded")
    starts = np.flatnonzero(np.concatenate(([True], values[1:] != values[:-1])))
    values = values[starts]
    lengths = np.add.reduceat(lengths, starts) * 4  # four channels a pixel
    total = int(lengths.sum())
    if total >= 1 << 32:
        raise ValueError(f"an image of {total // 4} pixels is too large for the format's 32-bit count")

    pieces = -(-lengths // _MAX_RUN)
    if pieces.max() > 1:  # a run longer than 65 536 is told in several tokens: the last one holds the rest
        ends = np.cumsum(pieces) - 1
        rest = lengths - (pieces - 1) * _MAX_RUN
        values = np.repeat(values, pieces)
        lengths = np.full(len(values), _MAX_RUN, dtype=np.int64)
        lengths[ends] = rest

    width_index = np.searchsorted(np.array([1 << bits for bits in _LENGTH_BITS]), lengths)
    length_bits = np.array(_LENGTH_BITS)[width_index]
    codes = (((4 + width_index) << length_bits | (lengths - 1)) << _VALUE_BITS) | values
    sizes = 3 + length_bits + _VALUE_BITS

    header = _VALUE_BITS - 1
    for bits in _LENGTH_BITS:
        header = header << 4 | (bits - 1)
    codes = np.concatenate(([total >> 16, total & 0xFFFF, header], codes))
    sizes = np.concatenate(([16, 16, _HEADER_BITS - 32], sizes))
    stream: list[int] = _pack(codes, sizes).tolist()
    return stream


def _pack(codes: Int64Array, sizes: Int64Array) -> UInt8Array:
    """Write codes of up to 32 bits one behind the other.

    Each code touches at most two 32-bit words; no two set the same bit, so that adding up is the same as a bitwise or, and sums
    below 2³² are exact in the float64 of ``bincount``.
    """
    ends = np.cumsum(sizes)
    starts = ends - sizes
    word, offset = starts >> 5, starts & 31
    shifted = codes.astype(np.uint64) << (64 - sizes - offset).astype(np.uint64)
    words = int(ends[-1] >> 5) + 2
    high = np.bincount(word, weights=(shifted >> np.uint64(32)).astype(np.float64), minlength=words)
    low = np.bincount(word + 1, weights=(shifted & np.uint64(0xFFFFFFFF)).astype(np.float64), minlength=words)
    stream = (high + low).astype(np.uint32).astype(">u4").view(np.uint8)
    return stream[: -(-int(ends[-1]) // 8)]


def encode_alpha(alpha: UInt8Array) -> list[int]:
    """Encode an alpha image, uint8 (height, width)."""
    flat = alpha.ravel()
    if len(flat) == 0:
        raise ValueError("an image without pixels cannot be encoded")
    starts = np.flatnonzero(np.concatenate(([True], flat[1:] != flat[:-1])))
    return encode_runs(np.diff(starts, append=len(flat)), flat[starts])


def encode_grid(
    levels: UInt8Array, column_edges: Int64Array, row_edges: Int64Array, image_size: tuple[int, int]
) -> list[int]:
    """Encode a grid of tiles, drawn at ``image_size``, without ever drawing it.

    Parameters
    ----------
    levels
        uint8 (rows, columns): alpha of each tile.
    column_edges, row_edges
        int64 (columns + 1,), (rows + 1,): pixels of each column and row, as :func:`backend.slides.render.tile_edges_px` gives.
    image_size
        (width, height) of the image in pixels; what lies outside the grid is 0.
    """
    width, height = image_size
    rows, columns = levels.shape
    padded = np.zeros((rows + 2, columns + 2), dtype=np.uint8)
    padded[1:-1, 1:-1] = levels
    across = np.diff(column_edges, prepend=0, append=width)
    down = np.diff(row_edges, prepend=0, append=height)
    used = across > 0
    lines = np.repeat(padded[:, used], down, axis=0)
    return encode_runs(np.broadcast_to(across[used], lines.shape).ravel(), lines.ravel())


def decode(data: Sequence[int] | npt.NDArray[np.integer]) -> UInt8Array:
    """Decode a stream written by any encoder of the format.

    Returns
    -------
    uint8 (number of values,): for a brush mask the RGBA bytes, row by row.

    Raises
    ------
    ValueError
        Not bytes, shorter than its header, values wider than 8 bits, or the tokens do not add up to the number of values that the
        header promises.
    """
    array = np.asarray(data)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer) or len(array) * 8 < _HEADER_BITS:
        raise ValueError("not a run-length stream: too short, or not a list of whole numbers")
    if array.min() < 0 or array.max() > 255:
        raise ValueError("not a run-length stream: values outside 0..255")
    stream = array.astype(np.uint8)
    header = int.from_bytes(stream[:7].tobytes(), "big") >> (56 - _HEADER_BITS)
    count = header >> 21
    value_bits = (header >> 16 & 31) + 1
    length_bits = np.array([(header >> shift & 15) + 1 for shift in (12, 8, 4, 0)], dtype=np.uint32)
    if value_bits > 8:
        raise ValueError(f"values of {value_bits} bits are not bytes")

    padded = np.concatenate((stream, np.zeros(8, dtype=np.uint8)))
    at, repeats, lengths = _tokens(padded, len(stream) * 8, count, value_bits, length_bits)
    total = int(lengths.sum())
    if total != count:
        raise ValueError(f"the stream holds {total} values, and its header promises {count}")
    words = np.where(repeats, 1, lengths)
    token_of_word = np.repeat(np.arange(len(words)), words)
    nth = np.arange(len(token_of_word)) - np.repeat(np.cumsum(words) - words, words)
    position = at[token_of_word] + nth * value_bits
    if len(position) and position[-1] + value_bits > len(stream) * 8:
        raise ValueError("the stream ends within a value")
    pair = padded[position >> 3].astype(np.uint16) << 8 | padded[(position >> 3) + 1]
    values = (pair >> (16 - value_bits - (position & 7)).astype(np.uint16) & ((1 << value_bits) - 1)).astype(np.uint8)
    return np.repeat(values, np.where(repeats, lengths, 1)[token_of_word])


def _tokens(
    padded: UInt8Array, bits: int, count: int, value_bits: int, length_bits: npt.NDArray[np.uint32]
) -> tuple[Int64Array, npt.NDArray[np.bool_], Int64Array]:
    """Where the values of each token start, whether it repeats, and its length.

    Where a token ends depends on what it says, so the chain has to be followed one by one. What a token *would* say is therefore
    computed for every bit position at once, in chunks, and the following is left with one look-up a token.
    """
    positions: list[int] = []
    position, found = _HEADER_BITS, 0
    parts: list[tuple[Int64Array, npt.NDArray[np.bool_], Int64Array]] = []
    while found < count and position < bits:
        first = position >> 3
        chunk = padded[first : first + _DECODE_CHUNK_BYTES + 4].astype(np.uint32)
        windows = chunk[:-3] << 24 | chunk[1:-2] << 16 | chunk[2:-1] << 8 | chunk[3:]
        heads = (windows[:, None] << np.arange(8, dtype=np.uint32)).ravel() >> 13  # the 19 bits from each position on
        width = length_bits[heads >> 16 & 3]
        lengths = ((heads & 0xFFFF) >> (16 - width)).astype(np.int64) + 1
        repeats = heads >> 18 == 1
        steps = 3 + width.astype(np.int64) + np.where(repeats, value_bits, lengths * value_bits)
        step_at, length_at = memoryview(steps), memoryview(lengths)
        local, end = position - first * 8, len(steps)
        positions = []
        while local < end and found < count:
            positions.append(local)
            found += length_at[local]
            local += step_at[local]
        taken = np.array(positions, dtype=np.int64)
        parts.append((taken + first * 8 + 3 + width[taken], repeats[taken], lengths[taken]))
        position = first * 8 + local
    if not parts:
        empty = np.zeros(0, dtype=np.int64)
        return empty, empty.astype(np.bool_), empty
    at, repeated, run = (np.concatenate(column) for column in zip(*parts, strict=True))
    return at, repeated, run
