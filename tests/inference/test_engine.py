"""The engine: any batch size gives the same bag, memory running out halves the batch, wrong input is an error."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from backend.errors import OutOfDeviceMemory, SlideError
from backend.inference.blocks import NativeBlocks
from backend.inference.checkpoint import ModelIdentity
from backend.inference.engine import Engine
from backend.results.bag import Bag

N = 11
TILES = np.random.default_rng(4).integers(0, 256, (N, 224, 224, 3), np.uint8)


def identity(precision: str = "float32") -> ModelIdentity:
    return ModelIdentity("stand-in", "0" * 64, "1.6.3", precision, stand_in=True)


@pytest.fixture(scope="module")
def blocks(stand_in: Path) -> NativeBlocks:
    return NativeBlocks(stand_in, "cpu")


@pytest.fixture
def bag() -> Bag:
    grid = np.stack([np.arange(N), np.zeros(N, np.int64)], 1).astype(np.int64)
    return Bag("slide", grid * 224, grid, (N, 1), 224.0, (224 * N, 224), 224, 0.5, 0.5, "slide")


def chunks(sizes: list[int]) -> Iterator[np.ndarray]:
    start = 0
    for size in sizes:
        yield TILES[start : start + size]
        start += size


def test_latents_and_pooling_equal_the_plain_float32_snippet(blocks: NativeBlocks, bag: Bag) -> None:
    result = Engine(blocks, identity(), batch_tiles=4).analyse(bag, chunks([3, 5, 2, 1]))
    plain = torch.from_numpy(TILES).permute(0, 3, 1, 2).float() / 255
    with torch.inference_mode():
        latents = blocks.latents(plain)
        vector, attention = blocks["grouper"](latents, torch.zeros(N, dtype=torch.long))
    np.testing.assert_allclose(result.latents.astype(np.float32), latents.numpy(), rtol=2e-3, atol=1e-3)  # float16
    np.testing.assert_allclose(result.attention, attention.numpy(), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(result.slide_embedding, vector[0].numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tiles", [1, 2, 37, 9001])
def test_pooling_in_threads_is_the_float64_formula(blocks: NativeBlocks, tiles: int) -> None:
    """Logits in pieces and one thread for the rest, whatever the size of the bag; attention, softmax and mapper written out here."""
    latents = np.random.default_rng(tiles).normal(size=(tiles, 768)).astype(np.float32)
    logits, vector = Engine(blocks, identity()).pool(latents)
    reducer = copy.deepcopy(blocks.grouper.reducer).double()
    x = torch.from_numpy(latents).double()
    with torch.inference_mode():
        expected = reducer.attention(reducer.v(x) * reducer.u(x))
        expected_vector = reducer.mapper((torch.softmax(expected, dim=0).T @ x).reshape(1, -1))[0]
    np.testing.assert_allclose(logits, expected.numpy(), atol=2e-5, rtol=1e-5)
    np.testing.assert_allclose(vector, expected_vector.numpy(), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("batch", [1, 3, 11, 64])
def test_the_batch_size_changes_nothing(blocks: NativeBlocks, bag: Bag, batch: int) -> None:
    reference = Engine(blocks, identity(), batch_tiles=5).analyse(bag, chunks([11]))
    result = Engine(blocks, identity(), batch_tiles=batch).analyse(bag, chunks([4, 4, 3]))
    np.testing.assert_allclose(result.attention_logits, reference.attention_logits, atol=1e-4)


def test_progress_counts_every_tile(blocks: NativeBlocks, bag: Bag) -> None:
    seen: list[tuple[int, int]] = []
    Engine(blocks, identity(), batch_tiles=4).analyse(bag, chunks([11]), progress=lambda *p: seen.append(p))
    assert seen == [(4, 11), (8, 11), (11, 11)]


def test_running_out_of_memory_halves_the_batch_and_goes_on(
    blocks: NativeBlocks, bag: Bag, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No CUDA device here: torch's own error is raised for batches over 3 tiles. The handling is the real one."""
    engine = Engine(blocks, identity(), batch_tiles=8)
    expected = engine.analyse(bag, chunks([11]))
    real = engine.plain_latents

    def small_device(pixels: torch.Tensor) -> torch.Tensor:
        if len(pixels) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(pixels)

    monkeypatch.setattr(engine, "plain_latents", small_device)
    result = engine.analyse(bag, chunks([11]))
    assert engine.batch_tiles == 2
    assert "out of memory; going on with batches of 2" in caplog.text
    np.testing.assert_allclose(result.attention_logits, expected.attention_logits, atol=1e-4)


def test_an_encoder_with_hooks_is_given_whole_batches_and_others_pieces(
    blocks: NativeBlocks, bag: Bag, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces run in threads at once, and a hook may keep what it saw in its module."""
    given: list[int] = []
    real = blocks.latents

    def counting(tiles: torch.Tensor) -> torch.Tensor:
        given.append(len(tiles))
        return real(tiles)

    monkeypatch.setattr(blocks, "latents", counting)
    in_pieces = Engine(blocks, identity(), batch_tiles=11).analyse(bag, chunks([11]))
    assert max(given) <= 4
    assert sum(given) == 11
    given.clear()
    hook = blocks.encoder.register_forward_hook(lambda *_: None)
    try:
        whole = Engine(blocks, identity(), batch_tiles=11).analyse(bag, chunks([11]))
    finally:
        hook.remove()
    assert given == [11]
    np.testing.assert_allclose(in_pieces.attention_logits, whole.attention_logits, atol=1e-4)


def test_no_memory_for_one_tile_is_a_clear_error(
    blocks: NativeBlocks, bag: Bag, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_device(tiles: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(blocks, "latents", no_device)
    with pytest.raises(OutOfDeviceMemory, match="Not even one tile"):
        Engine(blocks, identity(), batch_tiles=8).analyse(bag, chunks([11]))


@pytest.mark.parametrize(("sizes", "words"), [([5], "Only 5 of the bag's 11"), ([11, 11], "More tiles")])
def test_too_few_or_too_many_tiles_are_an_error(blocks: NativeBlocks, bag: Bag, sizes: list[int], words: str) -> None:
    tiles = (TILES[:size] for size in sizes)
    with pytest.raises(SlideError, match=words):
        Engine(blocks, identity(), batch_tiles=4).analyse(bag, tiles)


def test_bfloat16_stays_close_to_float32(blocks: NativeBlocks, bag: Bag) -> None:
    exact = Engine(blocks, identity()).analyse(bag, chunks([11]))
    rounded = Engine(blocks, identity("bfloat16")).analyse(bag, chunks([11]))
    a, b = exact.latents.astype(np.float64), rounded.latents.astype(np.float64)
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert cosine.min() >= 0.999
    assert exact.provenance["precision"] == "float32"
    assert rounded.provenance["precision"] == "bfloat16"


@pytest.mark.cuda
@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="what runs on CUDA only is tested where torch finds a CUDA device"
)
def test_cuda_agrees_with_the_cpu(blocks: NativeBlocks, bag: Bag, stand_in: Path) -> None:
    on_cpu = Engine(blocks, identity()).analyse(bag, chunks([11]))
    on_cuda = Engine(NativeBlocks(stand_in, "cuda:0"), identity()).analyse(bag, chunks([11]))
    np.testing.assert_allclose(on_cuda.attention_logits, on_cpu.attention_logits, atol=1e-2)
