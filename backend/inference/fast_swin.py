"""Swin-V2 for inference: what torchvision computes, without what it computes again in every forward.

Read off ``torchvision.models.swin_transformer`` (Swin Transformer V2, Liu et al. 2022, arXiv 2111.09883). The differences, none of which
changes the result beyond rounding:

- the continuous position bias (a small network) and the logit scale are constants in evaluation, and computed once;
- attention goes through ``scaled_dot_product_attention``, with the bias and the mask of shifted windows as its mask;
- shifting, padding and cutting into windows are one look-up of rows, made once for each tile size. What torchvision pads with zeros
  before the projection is here the projection of zero, which is a constant row: only real tokens are multiplied;
- only the last level of the pyramid is made, which is all that the squeezer reads; pixels go in as uint8, as the slide's reader has them.

It is used only for an encoder whose modules are exactly the expected ones, and only for tile sizes at which it has been seen to agree with the plain
float32 forward (:meth:`FastLatents.agrees`).
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.swin_transformer import PatchMergingV2, ShiftedWindowAttentionV2, SwinTransformerBlockV2
from torchvision.ops.misc import MLP, Permute

from backend.inference.blocks import NativeBlocks
from backend.inference.host_threads import in_small_batches

log = logging.getLogger(__name__)

MAX_RELATIVE_DIFFERENCE = 1e-4
"""float32: largest difference of a latent's value from the plain forward, relative to the largest value."""
MIN_COSINE = 0.999
"""bfloat16 and float16: smallest cosine between a tile's latent and that of the plain float32 forward."""

_APART = -100.0  # torchvision's value between tokens that only the shift has brought together
_ENCODER = "mmm.mtl_modules.shared_blocks.PyramidEncoder.PyramidEncoder"
_SWIN = "mmm.neural.modules.swinformer.TorchVisionSwinformer"
_SQUEEZER = "mmm.mtl_modules.shared_blocks.Squeezer.Squeezer"


class FastLatents:
    """Tiles to latents through :class:`FastSwin` and the checkpoint's own squeezer.

    Parameters
    ----------
    blocks
        The model. Nothing in it is changed.
    dtype
        Arithmetic of the encoder; the squeezer is float32.

    Raises
    ------
    NotSwin
        The modules are not exactly those that this file knows. The plain forward is the way then.
    """

    def __init__(self, blocks: NativeBlocks, dtype: torch.dtype = torch.float32) -> None:
        if _name(blocks.squeezer) != _SQUEEZER or hooked(blocks.squeezer):
            raise NotSwin(f"the squeezer is {_name(blocks.squeezer)}")
        self.swin = FastSwin(blocks.encoder, dtype)
        self._blocks = blocks
        self._dtype = dtype
        self._verdicts: dict[tuple[int, int], bool] = {}

    def agrees(self, height: int, width: int) -> bool:
        """Whether it agrees with the plain float32 forward for tiles of this size. Tried once for each size; says so in the log if not."""
        verdict = self._verdicts.get((height, width))
        if verdict is None:
            verdict = self._verdicts[height, width] = self._probe(height, width)
        return verdict

    @torch.inference_mode()
    def latents(self, pixels: Tensor) -> Tensor:
        """uint8 (n, H, W, 3) on the model's device → latents float32 (n, D)."""
        if pixels.device.type == "cpu":
            return in_small_batches(self.encode, pixels)
        return self.encode(pixels)

    def encode(self, pixels: Tensor) -> Tensor:
        """:meth:`latents` in one piece, without choosing threads: what may be compiled."""
        _, pooled = self._blocks.squeezer([self.swin(pixels).float()])
        return torch.flatten(pooled, start_dim=1)

    @torch.inference_mode()
    def _probe(self, height: int, width: int) -> bool:
        pixels = probe_tiles(height, width).to(self._blocks.device)
        try:
            ours = self.latents(pixels).double()
            plain = self._blocks.latents(pixels.permute(0, 3, 1, 2).float().div(255.0)).double()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            log.warning(
                "fast encoder: fails on tiles of %d x %d px (%s); using the plain one",
                width, height, str(error).splitlines()[0],
            )  # fmt: skip
            return False
        difference = float((ours - plain).abs().max() / plain.abs().max())
        cosine = float(F.cosine_similarity(ours, plain).min())
        # Comparisons that NaN fails.
        ok = difference <= MAX_RELATIVE_DIFFERENCE if self._dtype is torch.float32 else cosine >= MIN_COSINE
        log.log(
            logging.INFO if ok else logging.WARNING,
            "fast encoder: %s with the plain float32 forward on tiles of %d x %d px (difference %.1e, cosine %.6f)%s",
            "agrees" if ok else "DISAGREES", width, height, difference, cosine, "" if ok else "; using the plain one",
        )  # fmt: skip
        return ok


def probe_tiles(height: int, width: int) -> Tensor:
    """Two tiles, uint8 (2, height, width, 3), the same for every call: noise, and patches of plain colour on a gradient."""
    generator = torch.Generator().manual_seed(20_501)
    noise = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    patches = torch.rand((3, -(-height // 24), -(-width // 24)), generator=generator)
    coarse = F.interpolate(patches[None], size=(height, width), mode="nearest")[0].permute(1, 2, 0)
    gradient = torch.linspace(0.2, 1.0, width).view(1, -1, 1)
    return torch.stack([noise, (coarse * gradient * 255).to(torch.uint8)])


class NotSwin(Exception):
    """The encoder is not the one that :class:`FastSwin` knows; the message says where it differs."""


class FastSwin:
    """The last pyramid level of a Swin-V2 encoder.

    Parameters
    ----------
    encoder
        The checkpoint's block, in evaluation mode. In its own dtype its weights are shared, else copied.
    dtype
        Of the matrix products and the attention; norms and sums are at least float32.

    Raises
    ------
    NotSwin
        A module is not exactly what is expected.
    """

    def __init__(self, encoder: nn.Module, dtype: torch.dtype) -> None:
        features = _checked_features(encoder)
        convolution, _, norm = features[0]
        self._dtype = dtype
        self._patch: tuple[int, int] = convolution.kernel_size
        # A convolution whose stride is its kernel is a product with the patch's pixels, here in the order (row, column, channel).
        weight = convolution.weight.permute(0, 2, 3, 1).flatten(1)
        self._embed = _linear(weight, convolution.bias, dtype)
        self._norm = _Norm(norm, dtype)
        self._stages = [
            (
                [_Block(block, dtype) for block in features[i]],
                _Merge(features[i + 1], dtype) if i + 1 < len(features) else None,
            )
            for i in range(1, len(features), 2)
        ]

    def __call__(self, pixels: Tensor) -> Tensor:
        """uint8 (n, H, W, 3) → float32 (float64 in float64) (n, C, H / 32, W / 32), sizes rounded up."""
        n, height, width, channels = pixels.shape
        ph, pw = self._patch
        rows, columns = height // ph, width // pw
        patches = pixels[:, : rows * ph, : columns * pw].reshape(n, rows, ph, columns, pw, channels)
        patches = patches.permute(0, 1, 3, 2, 4, 5).reshape(n, rows, columns, ph * pw * channels)
        # Divided in float32 (or wider), as the plain way does, and rounded afterwards.
        x = self._norm(F.linear(patches.to(_wide(self._dtype)).div_(255.0).to(self._dtype), *self._embed))
        for blocks, merge in self._stages:
            for block in blocks:
                x = block(x)
            if merge is not None:
                x = merge(x)
        return x.permute(0, 3, 1, 2)


class _Norm:
    """Its result is float32 (float64), and so is the sum that blocks add to: in bfloat16 that sum would lose what separates similar tiles."""

    def __init__(self, norm: nn.LayerNorm, dtype: torch.dtype) -> None:
        self._shape, self._eps, self._dtype = norm.normalized_shape, norm.eps, _wide(dtype)
        self._weight, self._bias = _cast(norm.weight, self._dtype), _cast(norm.bias, self._dtype)

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.to(self._dtype), self._shape, self._weight, self._bias, self._eps)


class _Merge:
    """Four neighbouring tokens become one, in torchvision's order: (0, 0), (1, 0), (0, 1), (1, 1) as (row, column)."""

    def __init__(self, merge: PatchMergingV2, dtype: torch.dtype) -> None:
        self._weight = _cast(merge.reduction.weight, dtype)
        self._norm = _Norm(merge.norm, dtype)

    def __call__(self, x: Tensor) -> Tensor:
        n, height, width, channels = x.shape
        if height % 2 or width % 2:
            x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
        rows, columns = x.shape[1] // 2, x.shape[2] // 2
        x = x.view(n, rows, 2, columns, 2, channels).permute(0, 1, 3, 4, 2, 5).reshape(n, rows, columns, 4 * channels)
        return self._norm(F.linear(x.to(self._weight.dtype), self._weight))


class _Block:
    def __init__(self, block: SwinTransformerBlockV2, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._attention = _WindowAttention(block.attn, dtype)
        self._norm1, self._norm2 = _Norm(block.norm1, dtype), _Norm(block.norm2, dtype)
        self._widen = _linear(block.mlp[0].weight, block.mlp[0].bias, dtype)
        self._narrow = _linear(block.mlp[3].weight, block.mlp[3].bias, dtype)

    def __call__(self, x: Tensor) -> Tensor:
        x = x + self._norm1(self._attention(x.to(self._dtype)))
        return x + self._norm2(F.linear(F.gelu(F.linear(x.to(self._dtype), *self._widen)), *self._narrow))


@dataclass(frozen=True)
class _Windows:
    """How a map of one size is cut into windows.

    ``rows``: for each place in each window the token that is there, the number after the last for padding. ``back``: for each
    token its place. ``mask``: (1 or windows, heads, L, L), L tokens a window. ``repeated``: the same for several tiles, kept for the last number asked.
    """

    rows: Tensor
    back: Tensor
    mask: Tensor
    count: int
    padded: bool
    repeated: dict[int, Tensor] = field(default_factory=dict)

    def mask_for(self, tiles: int) -> Tensor:
        """The mask for ``tiles`` tiles, (tiles * windows, heads, L, L)."""
        if len(self.mask) == 1:
            return self.mask.expand(tiles * self.count, -1, -1, -1)
        repeated = self.repeated.get(tiles)
        if repeated is None:
            if len(self.repeated) > 1:  # the batch and the rest of the last one
                self.repeated.clear()
            repeated = self.repeated[tiles] = self.mask.repeat(tiles, 1, 1, 1)
        return repeated


class _WindowAttention:
    """``shifted_window_attention`` with cosine attention, on tokens (n, H, W, C)."""

    def __init__(self, attention: ShiftedWindowAttentionV2, dtype: torch.dtype) -> None:
        self._heads: int = attention.num_heads
        self._window = (int(attention.window_size[0]), int(attention.window_size[1]))
        self._shift = (int(attention.shift_size[0]), int(attention.shift_size[1]))
        self._channels: int = attention.qkv.in_features
        bias = attention.qkv.bias.detach().clone()
        bias[self._channels : 2 * self._channels] = 0.0  # cosine attention has no bias of the keys
        self._project = _linear(attention.qkv.weight, bias, dtype)
        self._out = _linear(attention.proj.weight, attention.proj.bias, dtype)
        with torch.no_grad():
            scale = attention.logit_scale.clamp(max=math.log(100.0)).exp().flatten()
            # Queries carry the scale, keys do not; in float32 also where the rest is not.
            self._lengths = torch.cat([scale, torch.ones_like(scale)])
            self._bias = attention.get_relative_position_bias().to(dtype)
            self._of_padding = self._unit_(_cast(bias, dtype).clone().view(1, 1, -1))
        self._cuts: dict[tuple[int, int], _Windows] = {}

    def __call__(self, x: Tensor) -> Tensor:
        n, height, width, channels = x.shape
        cut = self._cuts.get((height, width))
        if cut is None:
            cut = self._cuts[height, width] = self._cut(height, width)
        qkv = self._unit_(F.linear(x, *self._project).view(n, height * width, 3 * channels))
        if cut.padded:
            qkv = torch.cat([qkv, self._of_padding.expand(n, 1, -1)], dim=1)
        tokens = self._window[0] * self._window[1]
        parts = torch.index_select(qkv, 1, cut.rows).view(n * cut.count, tokens, 3, self._heads, -1)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=cut.mask_for(n), scale=1.0)
        mixed = mixed.transpose(1, 2).reshape(n, cut.count * tokens, channels)
        return F.linear(torch.index_select(mixed, 1, cut.back).view(n, height, width, channels), *self._out)

    def _unit_(self, qkv: Tensor) -> Tensor:
        """Give queries the length of their head's scale and keys length 1, in place; (n, tokens, 3 C). Lengths in float32, as in ``F.normalize``."""
        qk = qkv[..., : 2 * self._channels].view(*qkv.shape[:2], 2 * self._heads, -1)
        wide = self._lengths.dtype
        length = torch.linalg.vector_norm(qk, dim=-1, dtype=wide).clamp_min_(1e-12)
        qk.mul_((self._lengths / length).to(qk.dtype).unsqueeze(-1))
        return qkv

    def _cut(self, height: int, width: int) -> _Windows:
        (wh, ww), device = self._window, self._bias.device
        full_h, full_w = -(-height // wh) * wh, -(-width // ww) * ww
        # A map of one window has nothing to shift.
        sh = 0 if wh >= full_h else self._shift[0]
        sw = 0 if ww >= full_w else self._shift[1]

        def windows(field: Tensor) -> Tensor:
            return field.view(full_h // wh, wh, full_w // ww, ww).permute(0, 2, 1, 3).reshape(-1, wh * ww)

        token = torch.full((full_h, full_w), height * width)
        token[:height, :width] = torch.arange(height * width).view(height, width)
        rows = windows(torch.roll(token, (-sh, -sw), (0, 1)))
        places = torch.empty(height * width + 1, dtype=torch.long)
        places[rows.flatten()] = torch.arange(rows.numel())
        mask = self._bias
        if sh or sw:
            # Regions of the shifted map: what was together before the shift, and what comes from the other side.
            area = torch.zeros(full_h, full_w, dtype=torch.long)
            for i, ys in enumerate((slice(0, -wh), slice(-wh, -sh or None), slice(full_h - sh, None))):
                for j, xs in enumerate((slice(0, -ww), slice(-ww, -sw or None), slice(full_w - sw, None))):
                    area[ys, xs] = 3 * i + j
            areas = windows(area)
            apart = (areas[:, None, :] != areas[:, :, None]).to(device)
            mask = self._bias + (apart.to(self._bias.dtype) * _APART)[:, None]
        back = places[:-1].to(device)
        return _Windows(rows.flatten().to(device), back, mask, len(rows), rows.numel() > height * width)


# --- is it the encoder that this file knows? ---------------------------------------------------------------------


def _checked_features(encoder: nn.Module) -> list[Any]:
    """The stages of a Swin-V2 encoder, each module looked at; :class:`NotSwin` if one is another than expected."""
    if encoder.training or hooked(encoder):
        raise NotSwin("the encoder is in training mode or has hooks")
    _expect(_name(encoder) == _ENCODER, encoder, "the encoder")
    model: Any = encoder.model
    _expect(_name(model) == _SWIN, model, "its model")
    remapper: Any = encoder.remapper
    _expect(len(remapper) == 0, remapper, "its remapper")
    features = list(model.wrapped_model.features)
    _expect(len(features) % 2 == 0 and len(features) >= 2, model, "its list of stages")
    embed = list(features[0])
    _expect([type(m) for m in embed] == [nn.Conv2d, Permute, nn.LayerNorm], features[0], "the patch embedding")
    convolution, permute, _ = embed
    _expect(
        convolution.stride == convolution.kernel_size
        and convolution.padding == (0, 0)
        and convolution.dilation == (1, 1)
        and convolution.groups == 1
        and convolution.bias is not None
        and list(permute.dims) == [0, 2, 3, 1],
        convolution,
        "the patch embedding",
    )
    for i in range(1, len(features), 2):
        for block in features[i]:
            _check_block(block)
        if i + 1 < len(features):
            merge = features[i + 1]
            _expect(type(merge) is PatchMergingV2 and type(merge.norm) is nn.LayerNorm, merge, "a patch merging")
            _expect(type(merge.reduction) is nn.Linear and merge.reduction.bias is None, merge, "a patch merging")
    return [embed, *features[1:]]


def _check_block(block: Any) -> None:
    _expect(type(block) is SwinTransformerBlockV2, block, "a block")
    _expect(type(block.norm1) is nn.LayerNorm and type(block.norm2) is nn.LayerNorm, block, "a block's norms")
    attention, mlp = block.attn, block.mlp
    _expect(type(attention) is ShiftedWindowAttentionV2, attention, "an attention")
    _expect(
        type(attention.qkv) is nn.Linear and type(attention.proj) is nn.Linear and attention.qkv.bias is not None,
        attention,
        "an attention's projections",
    )
    _expect(
        len(attention.window_size) == 2
        and all(0 <= s < w for s, w in zip(attention.shift_size, attention.window_size, strict=True)),
        attention,
        "an attention's windows",
    )
    kinds = [nn.Linear, nn.GELU, nn.Dropout, nn.Linear, nn.Dropout]
    _expect(type(mlp) is MLP and [type(m) for m in mlp] == kinds and mlp[1].approximate == "none", mlp, "an MLP")


def _expect(condition: bool, module: object, what: str) -> None:
    if not condition:
        raise NotSwin(f"{what} is another {type(module).__name__} than expected")


def _name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def hooked(root: nn.Module) -> bool:
    """Whether calling a module may do more than its class says."""
    return any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in root.modules())


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to(dtype)


def _linear(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    return _cast(weight, dtype).contiguous(), None if bias is None else _cast(bias, dtype)
