"""ToMe: token merging, training-free, on any timm ViT.

"Token Merging: Your ViT But Faster" (Bolya et al., ICLR 2023). Between attention and MLP of every block the tokens are
split alternately into sets A (even positions) and B (odd); each A token proposes its most similar B token, similarity
being the cosine of the keys averaged over heads (float32); the ``r`` best proposals are merged by a mean weighted with
the number of original tokens that each token stands for. ``log(size)`` is added to the attention logits ("proportional
attention", eq. 1). Prefix tokens are never merged.

Beyond the published code: LayerScale, query and key norms, register tokens, attention-pooling heads and heads that
average tokens. ``forward_features`` hands back the host's own shape: every position reads the merged token that it went
into, so a mean over positions is the size-weighted mean over merged tokens, and dense maps keep their grid.

Shapes: tokens ``(batch, tokens, dim)``, sizes ``(batch, tokens, 1)``. All shapes are static: r tokens go in each block,
whatever the image.
"""

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from einops import rearrange
from timm.models import checkpoint
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from sparing.vision.split_attention import attend, project_self
from sparing.vision.vit_contracts import (
    check_images,
    check_output_format,
    pack_intermediates,
    refuse_masks,
    take_indices,
)
from sparing.vision.vit_hosts import check_same_class, check_vit
from sparing.vision.vit_twin import ViTTwin
from sparing.zoo.twins import Status

__all__ = ["MergedTokens", "TokenMerge", "TokenMergingViT", "match_tokens", "merge_schedule"]

Rate = int | Sequence[int] | tuple[int, float]


# --- Matching and merging ---------------------------------------------------------------------------------------------


class TokenMerge(NamedTuple):
    """One matching of T tokens: which A tokens stay, which merge, and into which B token.

    kept (batch, a - r) and merged (batch, r) index set A, target (batch, r) set B; ``tokens`` is T, ``protected`` the
    number of leading tokens that stay in front in their order. Output order: those, kept A tokens, B tokens.
    """

    kept: Tensor
    merged: Tensor
    target: Tensor
    tokens: int
    protected: int

    def sum(self, x: Tensor) -> Tensor:
        """Adds up the tokens of every group: (batch, T, C) -> (batch, T - r, C).

        The additions are a scatter, whose order is not fixed on CUDA; under
        ``torch.use_deterministic_algorithms(True)`` a product with the 0/1 assignment replaces it.
        """
        a, b = x[:, ::2], x[:, 1::2]
        moved = _gather(a, self.merged)
        if torch.are_deterministic_algorithms_enabled():
            assignment = nn.functional.one_hot(self.target, b.shape[1]).to(x.dtype)
            b = b + assignment.transpose(1, 2) @ moved
        else:
            b = b.scatter_add(1, self.target[..., None].expand_as(moved), moved)
        return self._joined(_gather(a, self.kept), b)

    def mean(self, x: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        """Size-weighted mean (batch, T - r, C) of every group of ``x`` (batch, T, C), and the new sizes (batch, T - r,
        1).
        """
        merged_size = self.sum(size)
        return (self.sum(x * size) / merged_size).to(x.dtype), merged_size

    def destination(self) -> Tensor:
        """(batch, T) output position of every input token."""
        batch, device = self.kept.shape[0], self.kept.device
        a_count, b_count = (self.tokens + 1) // 2, self.tokens // 2
        # Where kept A and B tokens land: send their ranks through the output order.
        rank = torch.arange(self.tokens - self.merged.shape[1], device=device)
        kept_count = self.kept.shape[1]
        order = self._joined(rank[None, :kept_count, None], rank[None, kept_count:, None])[0, :, 0]
        place = torch.zeros_like(rank).scatter(0, order, rank)
        of_b = place[kept_count:].expand(batch, b_count)
        of_a = torch.zeros(batch, a_count, dtype=torch.long, device=device)
        of_a = of_a.scatter(1, self.kept, place[:kept_count].expand(batch, kept_count))
        of_a = of_a.scatter(1, self.merged, of_b.gather(1, self.target))
        out = torch.zeros(batch, self.tokens, dtype=torch.long, device=device)
        out[:, ::2], out[:, 1::2] = of_a, of_b
        return out

    def unmerge(self, merged: Tensor) -> Tensor:
        """Copies merged values (batch, T - r, C) back to every original position (batch, T, C)."""
        return _gather(merged, self.destination())

    def _joined(self, a: Tensor, b: Tensor) -> Tensor:
        if self.protected < 2:  # a lone prefix token is A's first
            return torch.cat([a, b], dim=1)
        in_a, in_b = (self.protected + 1) // 2, self.protected // 2
        prefix = [side[:, i // 2, None] for i in range(self.protected) for side in ((a, b)[i % 2],)]
        return torch.cat([*prefix, a[:, in_a:], b[:, in_b:]], dim=1)


def match_tokens(metric: Tensor, r: int, *, protected: int = 0, first_is_free: bool = False) -> TokenMerge | None:
    """Bipartite soft matching (paper section 3).

    Args:
        metric: (batch, T, C); the cosine between rows is the similarity, in float32.
        r: tokens to merge away, capped at half of those that may merge.
        protected: leading tokens that never merge.
        first_is_free: the first of them may merge after all: in the published code a distillation token without a
            class token is still the second token, and the first is one of the image's.

    Returns:
        The matching, or None when nothing is to be merged.
    """
    tokens = metric.shape[1]
    r = min(r, (tokens - protected + first_is_free) // 2)
    if r <= 0:
        return None
    metric = metric.detach().float()
    metric = metric / metric.norm(dim=-1, keepdim=True)
    scores = metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)
    in_a, in_b = (protected + 1) // 2, protected // 2
    scores[:, int(first_is_free) : in_a] = float("-inf")
    scores[:, :, :in_b] = float("-inf")
    best, partner = scores.max(dim=-1)
    order = best.argsort(dim=-1, descending=True)
    merged, kept = order[:, :r], order[:, r:]
    if protected and not first_is_free:  # -inf rows must lead again
        kept = kept.sort(dim=-1).values
    return TokenMerge(kept, merged, partner.gather(1, merged), tokens, protected)


def merge_schedule(r: Rate, depth: int) -> list[int]:
    """Tokens to merge in each of ``depth`` blocks.

    Args:
        r: the same number everywhere; a list, one a block (blocks behind its end merge nothing); or a tuple (r,
            inflection as a float): linear from ``int(r * (1 - inflection))`` in the first block to ``2 r`` minus that
            in the last, so that inflection -1 merges late tokens least, +1 most.
        depth: number of blocks.

    Raises:
        ValueError: a negative number, a list that is longer than ``depth``, an inflection outside [-1, 1], or a tuple
            of two ints, which reads two ways.
    """
    if isinstance(r, int) and not isinstance(r, bool):
        rates = [r] * depth
    elif isinstance(r, tuple) and len(r) == 2 and isinstance(r[1], float):
        rate, inflection = r
        if not -1 <= inflection <= 1:
            raise ValueError(f"inflection {inflection} is outside [-1, 1]")
        first = int(rate * (1 - inflection))
        step = (2 * rate - 2 * first) / max(depth - 1, 1)
        rates = [int(first + step * i) for i in range(depth)]
    elif isinstance(r, tuple) and len(r) == 2 and all(isinstance(n, int) for n in r):
        raise ValueError(
            f"r {r!r} reads two ways: write ({r[0]}, {float(r[1])}) for a rate and its inflection, or "
            f"[{r[0]}, {r[1]}] for the first two blocks"
        )
    elif isinstance(r, list | tuple) and all(isinstance(n, int) and not isinstance(n, bool) for n in r):
        if len(r) > depth:
            raise ValueError(f"r lists {len(r)} blocks, the host has {depth}")
        rates = [*r] + [0] * (depth - len(r))
    else:
        raise ValueError(f"r {r!r}: an int, a list of ints (one a block) or (int, inflection as a float) is accepted")
    if min(rates) < 0:
        raise ValueError(f"r {r!r} asks for a negative number of merges")
    return rates


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` (batch, n) of ``x`` (batch, T, C)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


# --- The twin ---------------------------------------------------------------------------------------------------------


class MergedTokens(NamedTuple):
    """Tokens (batch, T_out, dim) after the last norm, sizes (batch, T_out, 1), and of every original token (batch, T)
    its merged one.
    """

    tokens: Tensor
    size: Tensor
    destination: Tensor

    def source(self) -> Tensor:
        """(batch, T_out, T) 0/1: which original tokens went into each merged token."""
        return nn.functional.one_hot(self.destination, self.tokens.shape[1]).transpose(1, 2)


class TokenMergingViT(ViTTwin):
    """ToMe twin of a timm ViT: the host's parameters under the host's names, nothing new, nothing to train.

    Made by ``from_host``. The constructor takes the host over as it is (no copy).

    Args:
        host: a timm ``VisionTransformer`` (``VisionTransformerDistilled`` for the subclass below).
        r: tokens merged away in each block, see ``merge_schedule``; 0 computes what the host computes.
        proportional_attention: add log(size) to the logits. On for supervised hosts, off for MAE-pretrained ones
            (paper, section 4).
    """

    method: ClassVar[str] = "tome"
    training: ClassVar[Literal["none", "required"]] = "none"  # type: ignore[misc,assignment]

    def __init__(self, host: VisionTransformer, *, r: Rate = 8, proportional_attention: bool = True) -> None:
        check_vit(host, method="tome")
        check_same_class(self, host)
        rates = merge_schedule(r, len(host.blocks))
        self.take_over(host)
        self.proportional_attention = proportional_attention
        self.rates = rates

    @property
    def rates(self) -> list[int]:
        """Tokens merged away in each block. Assign any form that ``merge_schedule`` takes, at any time."""
        return list(self._rates)

    @rates.setter
    def rates(self, r: Rate) -> None:
        self._rates = merge_schedule(r, len(self.blocks))
        self.status: Status = "training-free" if any(self._rates) else "exact"

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """timm's: cut the blocks behind the last one taken, and their rates with them."""
        take = super().prune_intermediate_layers(indices, prune_norm=prune_norm, prune_head=prune_head)
        self.rates = self._rates[: len(self.blocks)]
        return take

    @property
    def knobs(self) -> dict[str, Any]:
        """The schedule, one number a block, and proportional attention."""
        return {"r": self.rates, "proportional_attention": self.proportional_attention}

    # --- Forward ---

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Images (batch, channels, height, width) -> what the host's head gives."""
        if self.global_pool == "token" and self.attn_pool is None:
            # The head reads prefix tokens only: no need to copy merged tokens back to their positions.
            refuse_masks(attn_mask, is_causal)
            return self.forward_head(self.norm(self._blocks(x)[0]))
        return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Images -> tokens after the last norm in the host's shape (batch, T, dim); merged tokens stand at all their
        positions.
        """
        refuse_masks(attn_mask, is_causal)
        tokens, _, destination, _ = self._blocks(x, follow=True)
        tokens = self.norm(tokens)
        return tokens if destination is None else _gather(tokens, destination)

    def merged_features(self, images: Tensor) -> MergedTokens:
        """The tokens that are left, what each stands for, and where every original token went."""
        tokens, size, destination, _ = self._blocks(images, follow=True)
        if size is None or destination is None:
            size = torch.ones(*tokens.shape[:2], 1, device=tokens.device)
            destination = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape[:2])
        return MergedTokens(self.norm(tokens), size, destination)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:
        """timm's contract, in the host's shapes: maps keep the image's grid, and merged tokens stand at all their
        positions in it.

        Raises:
            ValueError: another format than 'NCHW' or 'NLC', or a mask.
        """
        check_output_format(output_fmt)
        refuse_masks(attn_mask, is_causal)
        take = take_indices(len(self.blocks), indices)
        grid = check_images(self, x)
        stop = max(take) + 1 if stop_early else None
        tokens, _, destination, taken = self._blocks(x, take=take, stop=stop, follow=True)
        last = None
        if not intermediates_only:
            last = self.norm(tokens) if destination is None else _gather(self.norm(tokens), destination)
        return pack_intermediates(
            [self.norm(taken[i]) if norm else taken[i] for i in take],
            [grid] * len(take),
            last,
            num_prefix=self.num_prefix_tokens,
            output_fmt=output_fmt,
            return_prefix_tokens=return_prefix_tokens,
            output_dict=output_dict,
        )

    def _blocks(
        self, images: Tensor, *, take: Iterable[int] = (), stop: int | None = None, follow: bool = False
    ) -> tuple[Tensor, Tensor | None, Tensor | None, dict[int, Tensor]]:
        """Embedding and blocks ``0 .. stop - 1``: tokens, sizes, destinations (with ``follow``), and the outputs of
        those in ``take``.
        """
        check_images(self, images)
        tokens = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(images))))
        size = destination = None
        taken, wanted = {}, set(take)
        saves = self.grad_checkpointing and torch.is_grad_enabled() and not torch.jit.is_scripting()
        for index, (block, r) in enumerate(zip(self.blocks, self._rates)):
            if stop is not None and index >= stop:
                break
            arguments = (block, tokens, size, r, self.num_prefix_tokens, self.proportional_attention)
            tokens, size, merge = checkpoint(merging_block, *arguments) if saves else merging_block(*arguments)
            if follow and merge is not None:
                step = merge.destination()
                destination = step if destination is None else step.gather(1, destination)
            if index in wanted:
                taken[index] = tokens if destination is None else _gather(tokens, destination)
        return tokens, size, destination, taken


class TokenMergingViTDistilled(TokenMergingViT, VisionTransformerDistilled):
    """The ToMe twin of a distilled DeiT; class and distillation token are both protected."""


TokenMergingViT.distilled = TokenMergingViTDistilled


def merging_block(
    block: Block, tokens: Tensor, size: Tensor | None, r: int, protected: int, proportional: bool
) -> tuple[Tensor, Tensor | None, TokenMerge | None]:
    """A timm block that merges ``r`` tokens between attention and MLP.

    Args:
        block: the live block.
        tokens: (batch, T, dim).
        size: (batch, T, 1) original tokens in each, None before the first merge.
        r: tokens to merge away.
        protected: leading tokens that never merge.
        proportional: add log(size) to the attention logits.

    Returns:
        tokens (batch, T - r, dim), sizes (batch, T - r, 1) and the matching (None when nothing merged).
    """
    stream = block.norm1(tokens)
    queries, keys, values = project_self(block.attn, stream)
    bias = rearrange(size.log(), "b t 1 -> b 1 1 t").to(queries.dtype) if proportional and size is not None else None
    attended = attend(block.attn, stream, queries, keys, values, bias=bias)
    tokens = tokens + block.drop_path1(block.ls1(attended))
    merge = match_tokens(keys.mean(1), r, protected=protected)
    if merge is not None:
        # Sizes are float32 in half-precision twins too: bfloat16 counts to 256 only. The weighted sum follows.
        size = torch.ones(*tokens.shape[:2], 1, device=tokens.device) if size is None else size
        tokens, size = merge.mean(tokens, size)
    return tokens + block.drop_path2(block.ls2(block.mlp(block.norm2(tokens)))), size, merge
