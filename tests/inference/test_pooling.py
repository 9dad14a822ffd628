"""Attention pooling against the releases' references and against float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from backend.inference.blocks import NativeBlocks
from backend.inference.pooling import AttentionGrouper


@pytest.fixture(scope="module", params=("1.0", "1.6"))
def pooling(request: pytest.FixtureRequest, test_data: Path) -> tuple[AttentionGrouper, dict[str, np.ndarray]]:
    stem = test_data / "checkpoints" / f"wsc-layout-{request.param}"
    with np.load(f"{stem}.reference.npz") as reference:
        arrays = {name: reference[name] for name in reference.files}
    return NativeBlocks(f"{stem}.pt.zip", "cpu").grouper, arrays


BAG_IDS = torch.tensor([1] * 7 + [3] * 5)


def test_logits_and_slide_vectors_agree_with_the_release(pooling) -> None:
    grouper, reference = pooling
    pooled = grouper.pool(torch.from_numpy(reference["latent"]), BAG_IDS)
    np.testing.assert_allclose(pooled.logits.numpy(), reference["logits"], atol=1e-4)
    np.testing.assert_allclose(pooled.slide_vectors.numpy(), reference["slide_vectors"], atol=1e-4)
    assert pooled.bag_ids.tolist() == [1, 3]


def test_attention_sums_to_one_for_each_bag_and_head(pooling) -> None:
    grouper, reference = pooling
    attention = grouper.pool(torch.from_numpy(reference["latent"]), BAG_IDS).attention
    for bag in (1, 3):
        np.testing.assert_allclose(attention[bag == BAG_IDS].sum(0).numpy(), np.ones(8), atol=1e-6)


def test_attention_agrees_with_a_float64_softmax(pooling) -> None:
    grouper, reference = pooling
    logits = reference["logits"][:7].astype(np.float64)
    expected = np.exp(logits) / np.exp(logits).sum(0)
    attention = grouper.pool(torch.from_numpy(reference["latent"]), BAG_IDS).attention[:7]
    np.testing.assert_allclose(attention.numpy(), expected, rtol=1e-5)


def test_upstreams_attention_is_the_scrambled_one(pooling) -> None:
    """The release returns (heads, N) memory viewed as (N, heads): the same numbers, not the same rows."""
    grouper, reference = pooling
    attention = grouper.pool(torch.from_numpy(reference["latent"]), BAG_IDS).attention
    upstream = torch.from_numpy(reference["upstream_attention"])
    scrambled = torch.cat([attention[bag == BAG_IDS].T.contiguous().view(-1, 8) for bag in (1, 3)])
    torch.testing.assert_close(scrambled, upstream, atol=1e-5, rtol=1e-4)
    assert (attention - upstream).abs().max() > 1e-3  # row i of upstream is not tile i
    unscrambled = torch.cat([upstream[bag == BAG_IDS].reshape(8, -1).T for bag in (1, 3)])
    torch.testing.assert_close(unscrambled, attention, atol=1e-5, rtol=1e-4)


def test_several_bags_in_one_call_equal_each_bag_alone_in_any_order(pooling) -> None:
    grouper, reference = pooling
    latents = torch.from_numpy(reference["latent"])
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    together = grouper.pool(latents[order], BAG_IDS[order])
    for row, bag in enumerate((1, 3)):
        alone = grouper.pool(latents[bag == BAG_IDS], torch.zeros(int((bag == BAG_IDS).sum()), dtype=torch.long))
        torch.testing.assert_close(together.slide_vectors[row], alone.slide_vectors[0], atol=1e-5, rtol=1e-5)


def test_a_bag_of_100_000_tiles_keeps_its_smallest_weights(pooling) -> None:
    """Release 1.0 floors weights at 1e-5, the mean weight of such a bag: half of its heatmap would be flat."""
    grouper, _ = pooling
    latents = torch.randn(100_000, 768, generator=torch.Generator().manual_seed(5))
    pooled = grouper.pool(latents, torch.zeros(100_000, dtype=torch.long))
    weights = pooled.attention.double()
    np.testing.assert_allclose(weights.sum(0).numpy(), np.ones(8), atol=1e-4)
    expected = torch.softmax(pooled.logits.double(), 0)
    torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-10)
    assert (weights < 1e-5).any(0).all()


def test_wrong_shapes_and_empty_bags_are_errors(pooling) -> None:
    grouper, _ = pooling
    with pytest.raises(ValueError, match="expected"):
        grouper.pool(torch.zeros(4, 5), torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match="expected"):
        grouper.pool(torch.zeros(4, 768), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="without tiles"):
        grouper.pool(torch.zeros(0, 768), torch.zeros(0, dtype=torch.long))
