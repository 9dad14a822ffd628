"""Attention pooling: from the latents of a bag to attention by tile and head, and the slide vector.

Gated attention-based MIL pooling after Ilse, Tomczak and Welling 2018 (arXiv 1802.04712), with several heads whose pooled vectors are
reduced to one (``mapper``, a linear layer). Computed here from the grouper's own weights rather than by its ``forward``: what that
returns as attention is ``(heads, N)`` memory *viewed* as ``(N, heads)``, so that its row i is not tile i.

Layouts (told apart by the names of the weights):

======  =========================================  ==================================================
layout  gate                                       after the softmax
======  =========================================  ==================================================
1.0/1.1 ``attention_v`` (tanh) · ``attention_u``   clamped to at least 1e-5 for the slide vector only
1.6     ``v`` (tanh) · ``u`` (sigmoid)             nothing
======  =========================================  ==================================================
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from backend.errors import BlockBroken

Layout = Literal["1.0", "1.6"]

# Tiles whose attention logits are computed at once: bounds the temporary memory (32 768 x 384 x 4 bytes x 3 = 150 MB).
_CHUNK = 32_768


@dataclass(frozen=True, eq=False)
class PooledBags:
    """What pooling gives for one or several bags.

    Attributes
    ----------
    logits
        float32 (N, H): attention before the softmax; row i is tile i.
    attention
        float32 (N, H): softmax over the tiles of each bag; sums to 1 for each bag and head. No clamp.
    slide_vectors
        float32 (B, D): one vector a bag, bags in ascending order of their ids.
    bag_ids
        int64 (B,): the ids in that order.
    """

    logits: Tensor
    attention: Tensor
    slide_vectors: Tensor
    bag_ids: Tensor


class AttentionGrouper(nn.Module):
    """A grouper of any known layout behind the model card's call: ``vectors, attention = grouper(latents, bag_ids)``.

    Parameters
    ----------
    grouper
        The unpickled block: an ``mmm`` ``Grouper`` whose ``reducer`` is an ``AttentionPoolingReducer``.

    Raises
    ------
    BlockBroken
        The block has no attention pooling, or its weights do not fit each other.
    """

    def __init__(self, grouper: nn.Module) -> None:
        super().__init__()
        reducer = getattr(grouper, "reducer", None)
        if not isinstance(reducer, nn.Module):
            raise BlockBroken(f"Block 'grouper' is a {type(grouper).__name__} without a reducer.")
        self.reducer = reducer
        self.layout: Layout
        gate: tuple[str, ...]
        modules = dict(reducer.named_children())
        if {"attention_u", "attention_v", "attention"} <= modules.keys():
            self.layout, gate = "1.0", ("attention_u", "attention_v")
        elif {"u", "v", "attention"} <= modules.keys():
            self.layout, gate = "1.6", ("u", "v")
        elif "attention" in modules:
            self.layout, gate = ("1.6" if hasattr(reducer, "cfg") else "1.0"), ()
        else:
            raise BlockBroken(
                f"Block 'grouper' pools by {type(reducer).__name__}, which has no attention weights by tile.",
                hint="This backend needs a grouper with AttentionPoolingReducer, as Whole Slide Concepts has.",
            )
        self._gate: tuple[str, ...] = gate
        self.reduction = self._find_reduction(modules)
        linears = [m for m in modules["attention"].modules() if isinstance(m, nn.Linear)]
        first = [m for m in modules[gate[0] if gate else "attention"].modules() if isinstance(m, nn.Linear)]
        if not linears or not first:
            raise BlockBroken("Block 'grouper' has no linear layer in its attention.")
        self.num_heads: int = linears[-1].out_features
        self.embedding_dim: int = first[0].in_features
        if self.reduction == "linear":
            mapper = cast(nn.Linear, modules["mapper"])
            if mapper.in_features != self.num_heads * self.embedding_dim:
                raise BlockBroken(
                    f"Block 'grouper': mapper takes {mapper.in_features} values, but {self.num_heads} heads of "
                    f"{self.embedding_dim} give {self.num_heads * self.embedding_dim}."
                )

    def _find_reduction(self, modules: dict[str, nn.Module]) -> str:
        config: Any = getattr(self.reducer, "cfg", None)
        reduction = getattr(config, "reduction", None) if config is not None else None
        if reduction is None:
            reduction = "linear" if "mapper" in modules else None
        if reduction == "linear" and not isinstance(modules.get("mapper"), nn.Linear):
            reduction = None
        if reduction not in ("linear", "mean", "max"):
            raise BlockBroken(f"Block 'grouper' reduces its heads by {reduction!r}; known are linear, mean and max.")
        return str(reduction)

    def logits(self, latents: Tensor) -> Tensor:
        """Attention before the softmax: float32 (N, D) → (N, H). In chunks, so that memory does not grow with the bag."""
        return torch.cat([self._logits(chunk) for chunk in torch.split(latents, _CHUNK)])

    def _logits(self, latents: Tensor) -> Tensor:
        attention = cast(nn.Module, self.reducer.attention)
        if not self._gate:
            return cast(Tensor, attention(latents))
        u, v = (cast(nn.Module, getattr(self.reducer, name)) for name in self._gate)
        return cast(Tensor, attention(v(latents) * u(latents)))

    def pool(self, latents: Tensor, bag_ids: Tensor, logits: Tensor | None = None) -> PooledBags:
        """Pool one or several bags.

        Parameters
        ----------
        latents
            float (N, D) on the grouper's device; N ≥ 1.
        bag_ids
            integer (N,): tiles with the same id form one bag, in any order.
        logits
            What :meth:`logits` gives for these latents, where that is known already.

        Raises
        ------
        ValueError
            Shapes that do not fit, or no tile at all.
        """
        if latents.ndim != 2 or latents.shape[1] != self.embedding_dim or bag_ids.shape != latents.shape[:1]:
            raise ValueError(
                f"latents {tuple(latents.shape)} and bag ids {tuple(bag_ids.shape)}: expected (N, {self.embedding_dim}) and (N,)"
            )
        if len(latents) == 0:
            raise ValueError("a bag without tiles cannot be pooled")
        latents = latents.float()
        # Pooling is float32 also under autocast: a softmax over 100 000 tiles has weights near 1e-5.
        with torch.autocast(device_type=latents.device.type, enabled=False):
            if logits is None:
                logits = self.logits(latents)
            attention = torch.empty_like(logits)
            ids = torch.unique(bag_ids, sorted=True)
            vectors = []
            for bag in ids:  # over bags, not over tiles
                rows = slice(None) if len(ids) == 1 else (bag_ids == bag).nonzero(as_tuple=True)[0]
                weights = torch.softmax(logits[rows], dim=0)
                attention[rows] = weights
                vectors.append(self._reduce(weights, latents[rows]))
        return PooledBags(logits, attention, torch.stack(vectors), ids)

    def _reduce(self, weights: Tensor, latents: Tensor) -> Tensor:
        """(n, H) weights and (n, D) latents of one bag → its vector (D,)."""
        if self.layout == "1.0":
            weights = weights.clamp(min=1e-5)  # as release 1.0 does, so that its slide vectors are reproduced
        pooled = weights.T @ latents  # (H, D)
        if self.reduction == "linear":
            return cast(Tensor, cast(nn.Module, self.reducer.mapper)(pooled.reshape(1, -1))[0])
        return pooled.max(dim=0).values if self.reduction == "max" else pooled.mean(dim=0)

    def forward(self, latents: Tensor, bag_ids: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Slide vectors (B, D) and attention (N, H), row i = tile i. Release 1.6's further arguments are accepted, and not needed."""
        pooled = self.pool(latents, bag_ids)
        return pooled.slide_vectors, pooled.attention
