"""Transformer encoders over a sliding window, one token a step; only the newest token's output is returned.

Hedegaard et al., *Continual Transformers* (ICLR 2023), section 3.5. The first of several blocks answers for all
tokens of the window (retroactive), the last for the newest only (single output), blocks between are ordinary encoder
layers over the window. A step equals ``nn.TransformerEncoder(window)[newest]`` for any number of blocks, provided
that positions are in the tokens (:mod:`sparing.continual.positional`). The state dict is that of
``nn.TransformerEncoder``.

The two-block encoder of the reference goes wrong after 2n-2 steps and it cannot be built with three; this one is
tested against torch's encoder.
"""

import re
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from sparing.continual.attention import Attention, TokenRing, band, check_tokens, windows_of
from sparing.continual.module import Continual
from sparing.continual.timing import Span, Tick, first_emission, frames_seen, is_lockstep, keep_unless_live, surely_seen

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu}


class EncoderLayer(nn.Module):
    """One block under the keys of ``nn.TransformerEncoderLayer``; the same maths, with the query taken where it is
    needed.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        dim_feedforward: int,
        activation: str = "relu",
        norm_first: bool = False,
        layer_norm_eps: float = 1e-5,
        dropout: float = 0.0,
        in_proj_bias: bool = True,
    ) -> None:
        super().__init__()
        if activation not in _ACTIVATIONS:
            raise ValueError(f"activation must be one of {sorted(_ACTIVATIONS)} (gelu is exact), got {activation!r}")
        self.self_attn = Attention(d_model, num_heads, in_proj_bias=in_proj_bias)
        self.linear1 = nn.Linear(d_model, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, d_model)
        self.norm1 = nn.LayerNorm(d_model, eps=layer_norm_eps)
        self.norm2 = nn.LayerNorm(d_model, eps=layer_norm_eps)
        self.dropout = nn.Dropout(dropout)
        self.activation, self.norm_first = activation, norm_first

    def before(self, tokens: Tensor) -> Tensor:
        """What the attention looks at: the tokens, or their norm when the norm comes first."""
        return self.norm1(tokens) if self.norm_first else tokens

    def finish(self, tokens: Tensor, attended: Tensor) -> Tensor:
        """The block's output from its input tokens (..., E) and their attention (..., E)."""
        h = tokens + self.dropout(attended)
        h = h if self.norm_first else self.norm1(h)
        inner = self.norm2(h) if self.norm_first else h
        inner = self.linear2(self.dropout(_ACTIVATIONS[self.activation](self.linear1(inner))))
        return h + self.dropout(inner) if self.norm_first else self.norm2(h + self.dropout(inner))

    def forward(self, tokens: Tensor, *, bias: Tensor | None = None) -> Tensor:
        """All tokens of a window: (B, n, E) to (B, n, E)."""
        return self.finish(tokens, self.self_attn.attend(*self.self_attn.project(self.before(tokens)), bias=bias))

    def newest(self, tokens: Tensor, *, bias: Tensor | None = None) -> Tensor:
        """The newest token of a window only: (B, n, E) to (B, E)."""
        seen = self.before(tokens)
        return self.finish(tokens[:, -1], self.self_attn.answer(seen[:, -1], seen, bias=bias))


class TransformerEncoder(Continual, nn.Module):
    """``nn.TransformerEncoder`` over the last ``sequence_len`` tokens of a stream.

    Clips (N, E, T) to (N, E, T - n + 1); frames (streams, E) to (streams, E). With one block steps run without
    gradients (the ring is written in place); train in clip mode.

    Args:
        sequence_len: window n.
        num_layers: blocks, any number.
        final_norm: a LayerNorm behind the last block (key ``norm``).
        partial: answer from the first token on, over the tokens there are.
        in_proj_bias: False for the published CoOadTR, whose in-projection has none.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        dim_feedforward: int,
        num_layers: int,
        sequence_len: int,
        activation: str = "relu",
        norm_first: bool = False,
        final_norm: bool = False,
        layer_norm_eps: float = 1e-5,
        dropout: float = 0.0,
        in_proj_bias: bool = True,
        partial: bool = False,
    ) -> None:
        super().__init__()
        if num_layers < 1 or sequence_len < 1:
            raise ValueError(f"num_layers and sequence_len must be at least 1, got {num_layers} and {sequence_len}")
        self.layers = nn.ModuleList(
            EncoderLayer(
                d_model,
                num_heads,
                dim_feedforward=dim_feedforward,
                activation=activation,
                norm_first=norm_first,
                layer_norm_eps=layer_norm_eps,
                dropout=dropout,
                in_proj_bias=in_proj_bias,
            )
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(d_model, eps=layer_norm_eps) if final_norm else None
        self.d_model, self.num_heads, self.sequence_len, self.partial = d_model, num_heads, sequence_len, partial

    def _span(self) -> Span:
        return Span(self.sequence_len, 1, 0, 0, 0 if self.partial else self.sequence_len - 1)

    def _memory(
        self, streams: int, frame_shape: tuple[int, ...], make: Callable[..., Tensor]
    ) -> tuple[dict, tuple[int, ...]]:
        check_tokens(frame_shape, self.d_model, type(self).__name__)
        if len(self.layers) == 1:
            return TokenRing.make(streams, self.sequence_len, self.num_heads, self.d_model, make), frame_shape
        held = (streams, self.sequence_len - 1, self.d_model)
        return {name: make(held) for name in ("tokens", "queries", "keys", "values")}, frame_shape

    def _step(self, x: Tensor, memory: dict, tick: Tick) -> tuple[Tensor | None, dict]:
        first: EncoderLayer = self.layers[0]  # type: ignore[assignment]
        q, k, v = first.self_attn.project(first.before(x))
        silent = is_lockstep(tick) and first_emission(tick, self.span()) > 0
        if len(self.layers) == 1:
            out, new = TokenRing.step(q, k, v, memory, tick)
            return (None if silent else self._last(first.finish(x, first.self_attn.out_proj(out)))), new
        added = {"tokens": x, "queries": q, "keys": k, "values": v}
        whole = {name: torch.cat([memory[name], token.unsqueeze(1)], 1) for name, token in added.items()}
        new = {name: keep_unless_live(t[:, 1:], memory[name], tick) for name, t in whole.items()}
        if silent:
            return None, new
        return self._blocks(whole, self._partial_bias(x, tick)), new

    def _blocks(self, whole: dict[str, Tensor], bias: Tensor | None) -> Tensor:
        """From the projections of the first block over windows (B, n, E) to the newest outputs (B, E)."""
        first: EncoderLayer = self.layers[0]  # type: ignore[assignment]
        attended = first.self_attn.attend(whole["queries"], whole["keys"], whole["values"], bias=bias)
        tokens = first.finish(whole["tokens"], attended)
        for layer in self.layers[1:-1]:  # type: ignore[index]
            tokens = layer(tokens, bias=bias)
        return self._last(self.layers[-1].newest(tokens, bias=bias))  # type: ignore[operator]

    def _last(self, x: Tensor) -> Tensor:
        return x if self.norm is None else self.norm(x)

    def _partial_bias(self, x: Tensor, tick: Tick) -> Tensor | None:
        """(streams, 1, 1, n): -inf for tokens that do not exist yet."""
        if not self.partial or surely_seen(tick) >= self.sequence_len - 1:
            return None
        seen = frames_seen(tick)
        if not isinstance(seen, Tensor):
            seen = torch.full((x.shape[0],), seen, device=x.device)
        missing = self.sequence_len - 1 - torch.arange(self.sequence_len, device=x.device) > seen[:, None]
        bias = torch.zeros(missing.shape, dtype=x.dtype, device=x.device)
        return bias.masked_fill(missing, float("-inf"))[:, None, None]

    def _steps(self, x: Tensor | None, memory: dict, tick: Tick, end: bool) -> tuple[Tensor | None, dict]:
        if x is None:
            return None, memory
        first: EncoderLayer = self.layers[0]  # type: ignore[assignment]
        tokens, frames = x.transpose(1, 2), x.shape[2]
        q, k, v = first.self_attn.project(first.before(tokens))
        offset = first_emission(tick, self.span()) if is_lockstep(tick) else 0
        if len(self.layers) == 1:
            keys, values, exist, new = TokenRing.extend(k, v, memory, tick)
            if offset >= frames:
                return None, new
            bias = band(exist, frames, self.sequence_len, x.dtype)[:, :, offset:]
            attended = first.self_attn.attend(q[:, offset:], keys, values, bias=bias)
            return self._last(first.finish(tokens[:, offset:], attended)).transpose(1, 2), new
        added = {"tokens": tokens, "queries": q, "keys": k, "values": v}
        lines = {name: torch.cat([memory[name], part], 1) for name, part in added.items()}
        new = {name: line[:, frames:] for name, line in lines.items()}
        if offset >= frames:
            return None, new
        windows = {
            name: rearrange(line[:, offset:].unfold(1, self.sequence_len, 1), "s t e n -> (s t) n e")
            for name, line in lines.items()
        }
        out = self._blocks(windows, self._chunk_bias(x, tick, offset))
        return rearrange(out, "(s t) e -> s e t", s=x.shape[0]), new

    def _chunk_bias(self, x: Tensor, tick: Tick, offset: int) -> Tensor | None:
        """(streams * T, 1, 1, n) for partial windows in chunks."""
        if not self.partial:
            return None
        n, place = self.sequence_len, torch.arange(offset, x.shape[2], device=x.device)
        if isinstance(tick.clock, Tensor):
            seen = tick.clock[:, None] - tick.delay + place
        else:
            seen = (frames_seen(tick) + place).expand(x.shape[0], -1)
        missing = n - 1 - torch.arange(n, device=x.device) > seen.clamp(min=0)[..., None]
        bias = torch.zeros(missing.shape, dtype=x.dtype, device=x.device).masked_fill(missing, float("-inf"))
        return rearrange(bias, "s t n -> (s t) 1 1 n")

    def forward(self, x: Tensor) -> Tensor:
        """Clip (N, E, T) to the newest outputs of its windows (N, E, T - n + 1)."""
        tokens = windows_of(x, self.sequence_len).flatten(0, 1)
        for layer in self.layers[:-1]:  # type: ignore[index]
            tokens = layer(tokens)
        out = self._last(self.layers[-1].newest(tokens))  # type: ignore[operator]
        return rearrange(out, "(n t) e -> n e t", n=x.shape[0])


_PART = re.compile(
    r"^(?P<before>(?:.*\.)?layers\.)(?P<block>\d+)\.(?:.*?\.)?(?P<part>self_attn|linear1|linear2|norm1|norm2)\."
    r"(?:fn\.)?(?P<leaf>(?:out_proj\.)?(?:weight|bias)|in_proj_weight|in_proj_bias)$"
)


def encoder_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Keys of torch's encoder, or of the continual-inference library (whatever containers it nests), to ours, by
    structure.

    An in-projection bias of zeros is dropped where the model has none; another one raises ValueError.
    """
    wanted = model.state_dict()
    clean = {}
    for key, tensor in state_dict.items():
        match = _PART.match(key)
        name = "{before}{block}.{part}.{leaf}".format(**match.groupdict()) if match else key
        if name.endswith("in_proj_bias") and name not in wanted:
            if bool((tensor != 0).any()):
                raise ValueError(
                    f"{key} is not zero, but the network has no in-projection bias (in_proj_bias=True keeps it)"
                )
            continue
        clean[name] = tensor
    return clean
