"""The fast Swin-V2 says what the plain float32 forward says, for every layout and size of tile; where it cannot, it is not used."""

from __future__ import annotations

import copy
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2

from backend.inference.blocks import NativeBlocks
from backend.inference.checkpoint import ModelIdentity
from backend.inference.compiled import CompiledInBackground
from backend.inference.engine import Engine
from backend.inference.fast_swin import MAX_RELATIVE_DIFFERENCE, FastLatents, FastSwin, NotSwin, probe_tiles
from backend.inference.host_threads import in_small_batches


@pytest.fixture(scope="module", params=["1.0", "1.6"])
def blocks(request: pytest.FixtureRequest, test_data: Path) -> NativeBlocks:
    return NativeBlocks(test_data / "checkpoints" / f"wsc-layout-{request.param}.pt.zip", "cpu")


@pytest.fixture(scope="module")
def blocks_1_6(test_data: Path) -> NativeBlocks:
    return NativeBlocks(test_data / "checkpoints" / "wsc-layout-1.6.pt.zip", "cpu")


def tiles_of(height: int, width: int | None = None, count: int = 3, seed: int = 0) -> Tensor:
    """Tiles with structure at several scales, of which no two are alike."""
    rng = np.random.default_rng(seed)
    width = width or height
    coarse = rng.integers(0, 200, (count, -(-height // 16), -(-width // 16), 3))
    smooth = coarse.repeat(16, axis=1).repeat(16, axis=2)[:, :height, :width]
    return torch.from_numpy((smooth + rng.integers(0, 56, smooth.shape)).astype(np.uint8))


def plain(blocks: NativeBlocks, pixels: Tensor) -> Tensor:
    with torch.inference_mode():
        return blocks.latents(pixels.permute(0, 3, 1, 2).float() / 255)


def engine(blocks: NativeBlocks, precision: str = "float32", *, fast: bool = True) -> Engine:
    return Engine(blocks, ModelIdentity("wsc", "0" * 64, "1.6.3", precision, stand_in=False), batch_tiles=4, fast=fast)


def encoder_with(blocks: NativeBlocks, swin: SwinTransformer) -> nn.Module:
    """The checkpoint's encoder around another Swin-V2."""
    encoder = copy.deepcopy(blocks.encoder)
    encoder.model.wrapped_model = swin.eval()
    return encoder


@pytest.mark.parametrize("size", [224, 256, 240, 232, 100])
def test_latents_agree_with_the_plain_forward_for_any_size_of_tile(blocks: NativeBlocks, size: int) -> None:
    pixels = tiles_of(size)
    fast = FastLatents(blocks)
    expected = plain(blocks, pixels)
    difference = (fast.latents(pixels) - expected).abs().max() / expected.abs().max()
    assert difference <= MAX_RELATIVE_DIFFERENCE
    assert fast.agrees(size, size)


def test_tiles_need_not_be_square(blocks_1_6: NativeBlocks) -> None:
    """Here a map is one window high and several wide, so that only one direction is shifted."""
    pixels = tiles_of(32, 160)
    expected = plain(blocks_1_6, pixels)
    torch.testing.assert_close(FastLatents(blocks_1_6).latents(pixels), expected, atol=1e-4, rtol=1e-4)


def test_slide_vector_and_attention_agree(blocks: NativeBlocks) -> None:
    pixels = tiles_of(224, count=9).numpy()
    latents = {fast: engine(blocks, fast=fast).encode([pixels], 9) for fast in (True, False)}
    (logits, vector), (plain_logits, plain_vector) = (engine(blocks).pool(latents[fast]) for fast in (True, False))
    np.testing.assert_allclose(latents[True], latents[False], atol=1e-4)
    np.testing.assert_allclose(logits, plain_logits, atol=1e-4)
    np.testing.assert_allclose(vector, plain_vector, atol=1e-4)
    assert (np.argsort(logits, axis=0) == np.argsort(plain_logits, axis=0)).all()


def test_in_float64_only_rounding_is_left(blocks_1_6: NativeBlocks) -> None:
    encoder = copy.deepcopy(blocks_1_6.encoder).double()
    pixels = tiles_of(120, count=2)
    with torch.inference_mode():
        expected = encoder(pixels.permute(0, 3, 1, 2).double() / 255)[-1]
        torch.testing.assert_close(FastSwin(encoder, torch.float64)(pixels), expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(("window", "size"), [([7, 7], 224), ([4, 6], 136), ([16, 16], 200)])
def test_other_windows_and_depths(blocks_1_6: NativeBlocks, window: list[int], size: int) -> None:
    torch.manual_seed(3)
    swin = SwinTransformer(
        [4, 4], 32, [2, 3, 2], [2, 4, 8], window, block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2
    )
    for parameter in swin.parameters():  # biases are zero when made, and would hide mistakes
        nn.init.normal_(parameter, std=0.3) if parameter.ndim == 1 else None
    encoder = encoder_with(blocks_1_6, swin)
    pixels = tiles_of(size, count=2)
    with torch.inference_mode():
        expected = encoder(pixels.permute(0, 3, 1, 2).float() / 255)[-1]
        torch.testing.assert_close(FastSwin(encoder, torch.float32)(pixels), expected, atol=1e-4, rtol=1e-4)


def test_bfloat16_keeps_the_bounds_of_the_encoder(blocks: NativeBlocks) -> None:
    pixels = tiles_of(224, count=12).numpy()
    exact = engine(blocks, fast=False).encode([pixels], 12).astype(np.float64)
    rounded = engine(blocks, "bfloat16").encode([pixels], 12).astype(np.float64)
    norms = np.linalg.norm(exact, axis=1) * np.linalg.norm(rounded, axis=1)
    assert ((exact * rounded).sum(1) / norms).min() >= 0.999
    a, b = (engine(blocks).pool(latents.astype(np.float32))[1].astype(np.float64) for latents in (exact, rounded))
    assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) >= 0.9995


def test_the_card_s_pyramid_is_left_as_it_is(blocks: NativeBlocks) -> None:
    tiles = torch.rand((2, 3, 224, 224), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        before = blocks["encoder"](tiles)
        FastLatents(blocks).latents(tiles_of(224))
        after = blocks["encoder"](tiles)
    assert [level.shape[1:] for level in after] == [
        (3, 224, 224), (96, 56, 56), (192, 28, 28), (384, 14, 14), (768, 7, 7)
    ]  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_another_encoder_is_called_as_it_is(stand_in: Path) -> None:
    blocks = NativeBlocks(stand_in, "cpu")
    with pytest.raises(NotSwin, match="MiniConvNet"):
        FastLatents(blocks)
    pixels = tiles_of(224, count=5)
    np.testing.assert_allclose(engine(blocks).encode([pixels.numpy()], 5), plain(blocks, pixels).numpy(), atol=1e-5)


@pytest.mark.parametrize("change", ["a subclass", "another activation", "a hook", "training mode"])
def test_a_module_that_differs_from_the_expected_is_noticed(blocks_1_6: NativeBlocks, change: str) -> None:
    encoder = copy.deepcopy(blocks_1_6.encoder)
    block = encoder.model.wrapped_model.features[3][1]
    if change == "a subclass":
        block.attn.__class__ = type("Attention", (type(block.attn),), {})
    elif change == "another activation":
        block.mlp[1] = nn.GELU(approximate="tanh")
    elif change == "a hook":
        block.register_forward_hook(lambda *_: None)
    else:
        encoder.train()
    with pytest.raises(NotSwin):
        FastSwin(encoder, torch.float32)


def test_a_fast_way_that_disagrees_is_not_taken(
    test_data: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The bias of the positions is left out of the fast way: latents are plausible, and wrong."""
    blocks = NativeBlocks(test_data / "checkpoints" / "wsc-layout-1.6.pt.zip", "cpu")
    real = engine(blocks)
    attention = real._fast.swin._stages[2][0][3]._attention
    attention._bias = torch.zeros_like(attention._bias)
    pixels = tiles_of(224, count=5)
    latents = real.encode([pixels.numpy()], 5)
    assert "DISAGREES" in caplog.text
    np.testing.assert_allclose(latents, plain(blocks, pixels).numpy(), atol=1e-5)


def test_the_probe_has_structure_for_every_size() -> None:
    for size in (224, 97):
        tiles = probe_tiles(size, size)
        assert tiles.shape == (2, size, size, 3)
        assert tiles.float().flatten(1).std(1).min() > 20


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_small_batches_keep_the_order_and_torch_s_threads(count: int) -> None:
    before = torch.get_num_threads()
    pixels = torch.arange(count).view(count, 1)
    assert in_small_batches(lambda piece: piece * 2.0, pixels).flatten().tolist() == [2.0 * i for i in range(count)]
    assert torch.get_num_threads() == before


def test_the_compiled_way_takes_over_when_it_agrees_and_never_when_not(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    calls: list[str] = []

    def encode(pixels: Tensor) -> Tensor:
        return pixels.float().flatten(1) + 1

    def right(pixels: Tensor) -> Tensor:
        calls.append("compiled")
        return encode(pixels)

    pixels = tiles_of(32)
    for compiler, expected in ((lambda _: right, True), (lambda _: lambda p: -encode(p), False)):
        both = CompiledInBackground(encode, compiler)
        assert torch.equal(both(pixels), encode(pixels))
        both.join(30)
        calls.clear()
        assert torch.equal(both(pixels), encode(pixels))
        assert bool(calls) is expected
    assert "compiled for batches of 3" in caplog.text
    assert "disagrees" in caplog.text


def test_a_compiler_that_fails_costs_only_a_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    def failing(_: object) -> object:
        raise RuntimeError("no C compiler here")

    both = CompiledInBackground(lambda pixels: pixels.float().flatten(1), failing)
    pixels = tiles_of(32)
    both(pixels)
    both.join(30)
    assert torch.equal(both(pixels), pixels.float().flatten(1))
    assert "no C compiler here" in caplog.text


@pytest.mark.cuda
@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="what runs on CUDA only is tested where torch finds a CUDA device"
)
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_on_cuda_every_tile_comes_back_in_its_place(test_data: Path, precision: str) -> None:
    """29 tiles in batches of 4: the last one is filled up, and two are always under way."""
    path = test_data / "checkpoints" / "wsc-layout-1.6.pt.zip"
    pixels = tiles_of(224, count=29).numpy()
    expected = engine(NativeBlocks(path, "cpu"), fast=False).encode([pixels], 29).astype(np.float64)
    latents = engine(NativeBlocks(path, "cuda:0"), precision).encode([pixels[:9], pixels[9:]], 29).astype(np.float64)
    norms = np.linalg.norm(expected, axis=1) * np.linalg.norm(latents, axis=1)
    assert ((expected * latents).sum(1) / norms).min() >= 0.999
