"""The four block types of SparseDiT / FlexDiT and the order they stand in.

Paper: "SparseDiT: token sparsification for efficient diffusion transformer" (arXiv 2412.06028), section 3.2 and figure
2. Depth, bottom to top: ``num_pooling`` pooling blocks; ``num_sdtm`` sparse-dense token modules (SDTM), each of
``sdtm_group = (merge, sparse, recover, dense)`` blocks; ``num_dense_top`` plain blocks. In an SDTM of N dense and M
sparse tokens:

* *merge*: the tokens that enter, y (N), are average-pooled to z (M); z attends to y;
* *sparse*: plain blocks on z (M);
* *recover*: z is enlarged by nearest neighbour; r = W1 up(z) + W2 y (N); r attends to z;
* *dense*: plain blocks on N tokens.

*pooling* blocks replace attention by the mean over all tokens; *plain* is the adaLN block of DiT. Modulation is that of
the
host: adaLN-zero (DiT: each block owns a ``Linear(D, 6D)``) or adaLN-single (PixArt, Latte: a shared projection plus a
table of the block). With ``cross_attention_dim`` a block also attends to text, as PixArt's do.

Pooling lives inside the merge block and enlarging inside the recover block, so that a cache which skips any run of
blocks that starts and ends on dense tokens leaves the token count right.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from diffusers.models.attention import AttentionModuleMixin, FeedForward
from einops import rearrange
from torch import Tensor, nn
from torchvision.ops import stochastic_depth

from sparing._compat import active_attention_backend, dispatch_attention, register_cacheable_block
from sparing.kernels import (
    attention,
    block_sparse_attention,
    gate_residual,
    gate_residual_ln_modulate,
    grid_pool,
    grid_unpool,
    ln_modulate,
    predict_block_map,
)

__all__ = [
    "BlockSparseAttnProcessor",
    "FlexAttention",
    "FlexDiTBlock",
    "MeanAttention",
    "depth_layout",
    "run_blocks",
    "sdtm_inputs",
    "set_block_sparse_attention",
]

Kind = Literal["plain", "pooling", "merge", "sparse", "recover", "dense"]
Grid = tuple[int, int]


def depth_layout(
    num_layers: int, *, num_pooling: int, num_sdtm: int, sdtm_group: Sequence[int], num_dense_top: int
) -> list[Kind]:
    """The kind of every block, bottom to top; block i of it is initialised from block i of the dense host.

    Raises:
        ValueError: when the split does not add up to ``num_layers`` (naming all numbers), or an SDTM cannot pool or
            recover.
    """
    group = list(sdtm_group)
    if len(group) != 4 or any(count < 0 for count in group):
        raise ValueError(f"sdtm_group must give four counts [merge, sparse, recover, dense], got {group}")
    for name, count in (("num_pooling", num_pooling), ("num_sdtm", num_sdtm), ("num_dense_top", num_dense_top)):
        if count < 0:
            raise ValueError(f"{name} must not be negative, got {count}")
    total = num_pooling + num_sdtm * sum(group) + num_dense_top
    if total != num_layers:
        raise ValueError(
            f"num_pooling {num_pooling} + num_sdtm {num_sdtm} * sum(sdtm_group {group}) + num_dense_top "
            f"{num_dense_top} "
            f"= {total} blocks, but the model has num_layers {num_layers}"
        )
    if num_sdtm and (group[0] < 1 or group[2] < 1):
        raise ValueError(f"an SDTM needs at least one merge and one recover block, got sdtm_group {group}")
    sdtm: list[Kind] = []
    for kind, count in zip(("merge", "sparse", "recover", "dense"), group, strict=True):
        sdtm += [cast(Kind, kind)] * count
    bottom: list[Kind] = ["pooling"] * num_pooling
    top: list[Kind] = ["plain"] * num_dense_top
    return bottom + sdtm * num_sdtm + top


class FlexAttnProcessor:
    """Softmax attention through ``sparing.kernels.attention``, or through diffusers' dispatcher once a person chose a
    backend there (``model.set_attention_backend(...)`` or ``with attention_backend(...)``)."""

    _attention_backend: Any = None
    _parallel_config: Any = None

    def __call__(
        self,
        attn: "FlexAttention",
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            rearrange(project(tokens), "b n (h d) -> b h n d", h=attn.heads)
            for project, tokens in ((attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context))
        )
        out = self.attend(attn, query, key, value, attention_mask)
        return attn.to_out[0](rearrange(out, "b h n d -> b n (h d)"))

    def attend(
        self, attn: "FlexAttention", query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None
    ) -> Tensor:
        """The attention itself: q ``(batch, heads, M, head_dim)`` over k, v ``(batch, heads, N, head_dim)``."""
        backend = self._attention_backend or active_attention_backend()
        if backend is None:
            return attention(query, key, value, bias=attention_mask)
        return dispatch_attention(query, key, value, attention_mask=attention_mask, backend=backend)


class BlockSparseAttnProcessor(FlexAttnProcessor):
    """Attention over predicted key blocks only (``sparing.kernels.predict_block_map``): training-free, approximate
    unless every block is kept.

    Args:
        block_q, block_k: rows of a query and of a key block.
        sim_threshold: blocks whose tokens resemble each other less than this are always computed.
        cdf, topk: keep key blocks up to this cumulative share, or this share of them; exactly one of the two.
    """

    def __init__(
        self,
        *,
        block_q: int = 128,
        block_k: int = 64,
        sim_threshold: float = 0.5,
        cdf: float | None = None,
        topk: float | None = None,
    ) -> None:
        if (cdf is None) == (topk is None):
            raise ValueError(f"give exactly one of cdf and topk, got cdf={cdf}, topk={topk}")
        self.prediction: dict[str, Any] = {
            "block_q": block_q,
            "block_k": block_k,
            "sim_threshold": sim_threshold,
            "cdf": cdf,
            "topk": topk,
        }

    def attend(
        self, attn: "FlexAttention", query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None
    ) -> Tensor:
        if attention_mask is not None:
            raise ValueError(
                "block-sparse attention takes no attention mask: use it for self-attention of image tokens"
            )
        kept = predict_block_map(query, key, **self.prediction)
        return block_sparse_attention(query, key, value, kept)


class FlexAttention(nn.Module, AttentionModuleMixin):
    """Multi-head attention with diffusers' parameter names.

    Args:
        dim: width D of the queries and of the output.
        heads, head_dim: ``heads * head_dim`` is the inner width.
        context_dim: width of keys' and values' tokens (D when None).
        bias: biases on q, k and v; the output projection always has one.
    """

    _default_processor_cls = FlexAttnProcessor
    _available_processors = [FlexAttnProcessor, BlockSparseAttnProcessor]
    _supports_qkv_fusion = False

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        head_dim: int,
        context_dim: int | None = None,
        bias: bool = True,
        is_cross_attention: bool = False,
    ) -> None:
        super().__init__()
        inner = heads * head_dim
        self.heads, self.is_cross_attention = heads, is_cross_attention
        self.to_q = nn.Linear(dim, inner, bias=bias)
        self.to_k = nn.Linear(context_dim or dim, inner, bias=bias)
        self.to_v = nn.Linear(context_dim or dim, inner, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(inner, dim)])
        self.set_processor(FlexAttnProcessor())

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """``(batch, M, dim)`` attends to ``encoder_hidden_states (batch, N, context_dim)`` (itself when None);
        ``attention_mask`` is an additive bias, broadcastable to ``(batch, heads, M, N)``."""
        return self.processor(self, hidden_states, encoder_hidden_states, attention_mask)


class MeanAttention(nn.Module):
    """Uniform attention (PoolingFormer block, section 3.2): every token receives ``Proj(mean_m V(x_m))``.

    Mean, modulation and V are affine, so the mean is taken first and V and Proj see one token a sample: exact in real
    arithmetic, without the N x N map of ones of the published code.
    """

    def __init__(self, dim: int, *, heads: int, head_dim: int, bias: bool = True) -> None:
        super().__init__()
        self.to_v = nn.Linear(dim, heads * head_dim, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(heads * head_dim, dim)])

    def forward(self, mean_token: Tensor) -> Tensor:
        """``mean_token (batch, 1, dim)``, the mean of the modulated tokens -> ``(batch, 1, dim)``, the same for every
        token.
        """
        return self.to_out[0](self.to_v(mean_token))


class AdaLNZero(nn.Module):
    """The modulation of a DiT block (section 3.2 of "Scalable Diffusion Models with Transformers"): ``Linear(D,
    6D)``.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, 6 * dim)

    def forward(self, conditioning: Tensor) -> Tensor:
        """``silu(c) (batch, dim)`` -> ``(batch, 6 * dim)``."""
        return self.linear(conditioning)


class FlexDiTBlock(nn.Module):
    """One block of a FlexDiT; ``kind`` decides how its tokens mix (see the module docstring).

    Args:
        dim: width D.
        kind: 'plain', 'sparse' and 'dense' are the same block on different token counts.
        heads, head_dim: of the attention.
        modulation: 'zero' (own ``norm1.linear``) or 'single' (``scale_shift_table`` added to a shared projection).
        cross_attention_dim: width of text tokens, or None for no text attention.
        attention_bias: biases on q, k, v.
        mlp_ratio: hidden width of the MLP over D.
        attention_norm_eps, mlp_norm_eps: of the LayerNorms before attention and MLP.
        drop_path: probability of dropping a residual branch of a sample in training.
    """

    def __init__(
        self,
        dim: int,
        kind: Kind,
        *,
        heads: int,
        head_dim: int,
        modulation: Literal["zero", "single"] = "zero",
        cross_attention_dim: int | None = None,
        attention_bias: bool = True,
        mlp_ratio: float = 4.0,
        attention_norm_eps: float = 1e-6,
        mlp_norm_eps: float = 1e-6,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.dim, self.kind, self.drop_path = dim, kind, drop_path
        # kinds of one computation share a compiled graph: no forward may ask which of them a block is
        self._attends_within = kind not in ("pooling", "merge", "recover")
        self.attention_norm_eps, self.mlp_norm_eps = attention_norm_eps, mlp_norm_eps
        shape: dict[str, Any] = {"heads": heads, "head_dim": head_dim, "bias": attention_bias}
        if modulation == "zero":
            self.norm1: nn.Module | None = AdaLNZero(dim)
        else:
            self.norm1 = None
            self.scale_shift_table = nn.Parameter(torch.randn(6, dim) / dim**0.5)
        if kind == "pooling":
            self.attn1: nn.Module = MeanAttention(dim, **shape)
        else:
            # A merge or recover block attends from one token set to another, but within the image: only text is 'cross'
            # for caches.
            self.attn1 = FlexAttention(dim, **shape)
        if kind == "recover":
            self.merge_sparse = nn.Linear(dim, dim)
            self.merge_dense = nn.Linear(dim, dim)
        self.attn2 = (
            None
            if cross_attention_dim is None
            else FlexAttention(dim, context_dim=cross_attention_dim, is_cross_attention=True, **shape)
        )
        self.ff = FeedForward(dim, activation_fn="gelu-approximate", inner_dim=int(dim * mlp_ratio))

    def forward(
        self,
        hidden_states: Tensor,
        conditioning: Tensor,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        dense_states: Tensor | None = None,
        grid: Grid | None = None,
        sparse_grid: Grid | None = None,
    ) -> Tensor:
        """One block.

        Args:
            hidden_states: ``(batch, tokens, dim)``; N dense tokens, or M sparse ones inside an SDTM.
            conditioning: 'zero': ``silu(c) (batch, dim)``; 'single': the shared projection ``(batch, 6 * dim)``.
            encoder_hidden_states: text ``(batch, L, cross_attention_dim)``.
            encoder_attention_mask: additive bias on the text keys, broadcastable to ``(batch, heads, tokens, L)``.
            dense_states: the dense tokens that entered the SDTM ``(batch, N, dim)``; needed by 'recover' and by a
                second 'merge'.
            grid, sparse_grid: token grids of N and M; needed by 'merge' and 'recover'.

        Returns:
            ``(batch, tokens, dim)``: M tokens after a 'merge', N after a 'recover', else as given.
        """
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self._modulation(conditioning)
        residual, branch = self._mix_tokens(hidden_states, shift_a, scale_a, dense_states, grid, sparse_grid)
        branch = self._drop(branch)
        if self.attn2 is None:
            residual, normed = gate_residual_ln_modulate(
                residual, branch.expand_as(residual), gate_a, shift_m, scale_m, eps=self.mlp_norm_eps
            )
        else:
            residual = gate_residual(residual, branch.expand_as(residual), gate_a)
            residual = residual + self.attn2(residual, encoder_hidden_states, encoder_attention_mask)
            normed = ln_modulate(residual, shift_m, scale_m, eps=self.mlp_norm_eps)
        return gate_residual(residual, self._drop(self.ff(normed)), gate_m)

    def _modulation(self, conditioning: Tensor) -> tuple[Tensor, ...]:
        """Shift, scale and gate of attention, then of the MLP, each ``(batch, 1, dim)``."""
        if self.norm1 is not None:
            six = rearrange(self.norm1(conditioning), "b (six d) -> six b 1 d", six=6)
        else:
            six = rearrange(conditioning, "b (six d) -> six b 1 d", six=6)
            six = rearrange(self.scale_shift_table, "six d -> six 1 1 d") + six
        return six.unbind(0)

    def _mix_tokens(
        self,
        hidden: Tensor,
        shift: Tensor,
        scale: Tensor,
        dense: Tensor | None,
        grid: Grid | None,
        sparse_grid: Grid | None,
    ) -> tuple[Tensor, Tensor]:
        """The residual stream and the branch to be gated onto it."""
        eps = self.attention_norm_eps
        if self._attends_within:
            return hidden, self.attn1(ln_modulate(hidden, shift, scale, eps=eps))
        if self.kind == "pooling":
            mean_token = F.layer_norm(hidden, (self.dim,), eps=eps).mean(dim=1, keepdim=True)
            return hidden, self.attn1(mean_token * (1 + scale) + shift)
        if self.kind == "merge":
            context = hidden if dense is None else dense
            pooled = grid_pool(hidden, grid, sparse_grid) if dense is None else hidden
            # Queries and keys share one norm and one modulation (section 2.4c of the specification, gotcha 8).
            normed = ln_modulate(pooled, shift, scale, eps=eps), ln_modulate(context, shift, scale, eps=eps)
            return pooled, self.attn1(*normed)
        # recover: W1 commutes with the gather of nearest-neighbour enlarging, so apply it to the M sparse tokens
        source = grid if hidden.shape[1] == dense.shape[1] else sparse_grid  # type: ignore[union-attr]
        merged = grid_unpool(self.merge_sparse(hidden), source, grid) + self.merge_dense(dense)
        normed = ln_modulate(merged, shift, scale, eps=eps), ln_modulate(hidden, shift, scale, eps=eps)
        return merged, self.attn1(*normed)

    def _drop(self, branch: Tensor) -> Tensor:
        if self.drop_path == 0.0 or not self.training:
            return branch
        return stochastic_depth(branch, self.drop_path, mode="row", training=True)


def set_block_sparse_attention(blocks: Iterable[nn.Module], processor: BlockSparseAttnProcessor | None) -> None:
    """Gives the self-attention of every dense block ('dense' and 'plain') this processor; None: exact attention
    again. Sparse tokens are few already, and merge and recover blocks need all of them.
    """
    for block in blocks:
        if block.kind in ("dense", "plain"):
            block.attn1.set_processor(processor or FlexAttnProcessor())  # type: ignore[union-attr, operator]


def sdtm_inputs() -> Callable[[nn.Module, Tensor], Tensor | None]:
    """Keeps the dense tokens that entered the current SDTM: call it before each block with the tokens about to enter;
    it returns what the block needs as ``dense_states``.
    """
    dense: Tensor | None = None
    previous = ""

    def before(block: nn.Module, hidden_states: Tensor) -> Tensor | None:
        nonlocal dense, previous
        opens = block.kind == "merge" and previous != "merge"
        previous = str(block.kind)
        if opens:
            dense = hidden_states
            return None  # the first merge block pools them itself
        return dense if previous in ("merge", "recover") else None

    return before


def run_blocks(
    blocks: nn.ModuleList,
    hidden_states: Tensor,
    conditioning: Tensor,
    *,
    grid: Grid,
    sparse_grid: Grid,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    checkpoint: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Dense tokens through all blocks, bottom to top. ``checkpoint(block, *args)`` runs a block when given."""
    context = sdtm_inputs()
    for block in blocks:
        dense = context(block, hidden_states)
        arguments = (conditioning, encoder_hidden_states, encoder_attention_mask, dense, grid, sparse_grid)
        if checkpoint is None:
            hidden_states = block(hidden_states, *arguments)
        else:
            hidden_states = checkpoint(block, hidden_states, *arguments)
    return hidden_states


register_cacheable_block(FlexDiTBlock)
