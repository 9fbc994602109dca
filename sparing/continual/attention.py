"""Attention over a sliding window of tokens, one token a step.

Hedegaard et al., *Continual Transformers* (ICLR 2023): the single-output form (section 3.3) answers for one query of
the window, the retroactive form (section 3.2) for all of them. Tokens are channels-first like everything on a stream:
clips (N, E, T), frames (streams, E). No output before the window is full, unless ``partial``.

Single-output attention is the decode attention of a sliding window: a ring of keys and values, order-free.
Retroactive attention recomputes the softmax of the n queries against the n keys (two small matrix products; the
projections around it cost far more). The recurrence of the paper (equations 5-7) subtracts old exponentials without a
maximum and cancels, or overflows at large logits; ``update='incremental'`` is a form of it with a running maximum per
row and recomputed rows where cancellation looms.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from sparing.continual.module import Continual
from sparing.continual.timing import (
    Span,
    Tick,
    admit_chunk,
    all_began,
    first_emission,
    frames_seen,
    is_live,
    is_lockstep,
    keep_unless_live,
)
from sparing.kernels import RingCache, attention, ring_attention_step


class Attention(nn.Module):
    """Packed multi-head projections under the keys of ``nn.MultiheadAttention``.

    Args:
        bias: in-projection and out-projection bias.
        in_proj_bias: None follows ``bias``; False with ``bias=True`` is the published CoOadTR.
    """

    def __init__(self, embed_dim: int, num_heads: int, *, bias: bool = True, in_proj_bias: bool | None = None) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim {embed_dim} is not divisible by num_heads {num_heads}")
        self.embed_dim, self.num_heads = embed_dim, num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim))
        has_bias = bias if in_proj_bias is None else in_proj_bias
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * embed_dim)) if has_bias else None
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        nn.init.xavier_uniform_(self.in_proj_weight)
        if bias:
            nn.init.zeros_(self.out_proj.bias)

    def project(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(..., E) to queries, keys and values, each (..., E)."""
        q, k, v = F.linear(tokens, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        return q, k, v

    def project_query(self, tokens: Tensor) -> Tensor:
        """(..., E) to queries only."""
        bias = None if self.in_proj_bias is None else self.in_proj_bias[: self.embed_dim]
        return F.linear(tokens, self.in_proj_weight[: self.embed_dim], bias)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None) -> Tensor:
        """Queries (B, M, E) over keys and values (B, N, E), with the output projection: (B, M, E)."""
        heads = [rearrange(t, "b n (h d) -> b h n d", h=self.num_heads) for t in (q, k, v)]
        out = attention(*heads, bias=bias)
        assert isinstance(out, Tensor)
        return self.out_proj(rearrange(out, "b h n d -> b n (h d)"))

    def answer(self, query: Tensor, tokens: Tensor, *, bias: Tensor | None = None) -> Tensor:
        """One query (B, E) over tokens (B, N, E) that were never projected, with the output projection: (B, E).

        The same maths in another order. Scores ``(q_h . (W_k,h x_j + b_k,h))`` are ``((q_h W_k,h) . x_j)`` plus a
        number that all keys share, which softmax forgets; ``sum_j a_j (W_v,h x_j + b_v,h)`` is ``W_v,h (sum_j a_j
        x_j) + b_v,h``. The key and value projections of N tokens (2 N E^2 multiply-adds) become two of one token and
        2 N E a head. All heads read the same tokens, so they are the queries of one head of width E.
        """
        width = self.embed_dim
        _, to_keys, to_values = rearrange(self.in_proj_weight, "(p h d) e -> p h d e", p=3, h=self.num_heads)
        q = rearrange(self.project_query(query), "b (h d) -> h b d", h=self.num_heads)
        seen = rearrange(q @ to_keys, "h b e -> b 1 h e")
        keys = tokens.unsqueeze(1)
        mixed = attention(seen, keys, keys, bias=bias, scale=q.shape[-1] ** -0.5)
        assert isinstance(mixed, Tensor)
        out = rearrange(rearrange(mixed, "b 1 h e -> h b e") @ to_values.mT, "h b d -> b (h d)")
        return self.out_proj(out if self.in_proj_bias is None else out + self.in_proj_bias[2 * width :])

    def forward(self, tokens: Tensor) -> Tensor:
        """Ordinary self-attention, (B, N, E) to (B, N, E)."""
        return self.attend(*self.project(tokens))


def _check_window(window: int) -> None:
    if window < 1:
        raise ValueError(f"sequence_len must be at least 1 token, got {window}")


def windows_of(x: Tensor, window: int) -> Tensor:
    """Clip (N, E, T) to its windows (N, T - window + 1, window, E). Raises ValueError for a clip shorter than the
    window.
    """
    if x.ndim != 3:
        raise ValueError(f"tokens must be (N, E, T), got {tuple(x.shape)}")
    if x.shape[2] < window:
        raise ValueError(f"the clip has {x.shape[2]} tokens, fewer than the window of {window}")
    return x.unfold(2, window, 1).permute(0, 2, 3, 1)


def check_tokens(frame_shape: tuple[int, ...], width: int, name: str) -> None:
    """Raise ValueError unless frames are (width,)."""
    if frame_shape != (width,):
        raise ValueError(f"{name} steps on tokens ({width},), got frames {frame_shape}")


class TokenRing:
    """Keys and values of single-output attention as leaves of a memory, and the ring kernel over them."""

    @staticmethod
    def make(streams: int, window: int, heads: int, width: int, make: Callable[..., Tensor]) -> dict[str, Tensor]:
        return {
            "k": make((streams, window, heads, width // heads)),
            "v": make((streams, window, heads, width // heads)),
            "head": make((streams,), dtype=torch.int32),
            "length": make((streams,), dtype=torch.int32),
        }

    @staticmethod
    def step(q: Tensor, k: Tensor, v: Tensor, memory: dict, tick: Tick) -> tuple[Tensor, dict]:
        """One token of each stream: q, k, v (streams, E) to attention (streams, E) before the output projection."""
        heads = memory["k"].shape[2]
        owned = tick.inplace or tick.turn is not None
        leaves = [memory[name] if owned else memory[name].clone() for name in ("k", "v", "head", "length")]
        cache = RingCache(*leaves, window=memory["k"].shape[1])
        alive = tick.active
        if not is_lockstep(tick) and (tick.stride > 1 or not all_began(tick)):
            live = is_live(tick)
            alive = live if alive is None else live & alive  # type: ignore[assignment,operator]
        q, k, v = (rearrange(t, "s (h d) -> s 1 h d", h=heads) for t in (q, k, v))
        out = ring_attention_step(q, k, v, cache, active=alive)
        assert isinstance(out, Tensor)
        new = {"k": cache.k, "v": cache.v, "head": cache.head, "length": cache.length}
        return rearrange(out, "s 1 h d -> s (h d)"), new

    @staticmethod
    def extend(k: Tensor, v: Tensor, memory: dict, tick: Tick) -> tuple[Tensor, Tensor, Tensor, dict]:
        """T tokens of each stream, k and v (streams, T, E).

        Returns the last window-1 tokens and the new ones in order (streams, window-1+T, E) as keys and values, which
        of them exist (streams, window-1+T), and the new memory (ring rewritten in order, oldest in slot 0).
        """
        window, tokens, heads = memory["k"].shape[1], k.shape[1], memory["k"].shape[2]
        device = k.device
        order = (memory["head"][:, None] + torch.arange(1, window, device=device)) % window
        rows = torch.arange(k.shape[0], device=device)[:, None]
        held = memory["length"][:, None] >= window - torch.arange(1, window, device=device)
        alive = torch.ones(k.shape[:2], dtype=torch.bool, device=device)
        if isinstance(tick.clock, Tensor) and tick.delay:
            alive = tick.clock[:, None] + torch.arange(tokens, device=device) >= tick.delay
        keys, values = (
            torch.cat([rearrange(memory[name][rows, order.long()], "s n h d -> s n (h d)"), new], 1)
            for name, new in (("k", k), ("v", v))
        )
        exist = torch.cat([held, alive], 1)
        oldest = memory["k"][rows, memory["head"][:, None].long()], memory["v"][rows, memory["head"][:, None].long()]
        rings = [
            torch.cat([first, rearrange(t, "s n (h d) -> s n h d", h=heads)], 1)[:, -window:]
            for first, t in zip(oldest, (keys, values))
        ]
        length = (memory["length"] + alive.sum(1)).clamp(max=window).to(torch.int32)
        new = {"k": rings[0], "v": rings[1], "head": torch.zeros_like(memory["head"]), "length": length}
        return keys, values, exist, new


def band(exist: Tensor, queries: int, window: int, dtype: torch.dtype) -> Tensor:
    """Bias (streams, 1, queries, keys): query i, at key position ``keys - queries + i``, sees the window that ends
    there.
    """
    keys = exist.shape[1]
    at = torch.arange(keys - queries, keys, device=exist.device)[:, None] - torch.arange(keys, device=exist.device)
    seen = (at >= 0) & (at < window) & exist[:, None, :]
    return torch.zeros(seen.shape, dtype=dtype, device=exist.device).masked_fill(~seen, float("-inf")).unsqueeze(1)


class SingleOutputAttention(Continual, Attention):
    """Self-attention over the last ``sequence_len`` tokens, answered for one of them.

    Steps run without gradients (the ring is written in place); train in clip mode.

    Args:
        sequence_len: window n.
        query_index: which query of the window answers: -1 the newest, -m the one of m-1 steps ago.
        partial: answer from the first token on, over the tokens there are.

    Raises:
        ValueError: ``query_index`` outside -n..-1.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        sequence_len: int,
        query_index: int = -1,
        bias: bool = True,
        in_proj_bias: bool | None = None,
        partial: bool = False,
    ) -> None:
        super().__init__(embed_dim, num_heads, bias=bias, in_proj_bias=in_proj_bias)
        _check_window(sequence_len)
        if not -sequence_len <= query_index <= -1:
            raise ValueError(f"query_index must be in -{sequence_len}..-1 (window {sequence_len}), got {query_index}")
        if partial and query_index != -1:
            raise ValueError(f"partial windows answer for the newest query only, got query_index {query_index}")
        self.sequence_len, self.query_index, self.partial = sequence_len, query_index, partial

    def _span(self) -> Span:
        n = self.sequence_len
        return Span(n, 1, 0, -self.query_index - 1, 0 if self.partial else n - 1)

    def _memory(
        self, streams: int, frame_shape: tuple[int, ...], make: Callable[..., Tensor]
    ) -> tuple[dict, tuple[int, ...]]:
        check_tokens(frame_shape, self.embed_dim, type(self).__name__)
        memory = TokenRing.make(streams, self.sequence_len, self.num_heads, self.embed_dim, make)
        if self.query_index < -1:
            memory["queries"] = make((streams, -self.query_index - 1, self.embed_dim))
        return memory, frame_shape

    def _step(self, x: Tensor, memory: dict, tick: Tick) -> tuple[Tensor | None, dict]:
        q, k, v = self.project(x)
        queue = {}
        if "queries" in memory:
            waiting = torch.cat([memory["queries"], q.unsqueeze(1)], 1)
            q = waiting[:, 0]
            queue = {"queries": keep_unless_live(waiting[:, 1:], memory["queries"], tick)}
        out, new = TokenRing.step(q, k, v, memory, tick)
        if is_lockstep(tick) and first_emission(tick, self.span()):
            return None, new | queue
        return self.out_proj(out), new | queue

    def _steps(self, x: Tensor | None, memory: dict, tick: Tick, end: bool) -> tuple[Tensor | None, dict]:
        if x is None:
            return None, memory
        q, k, v = self.project(x.transpose(1, 2))
        keys, values, exist, new = TokenRing.extend(k, v, memory, tick)
        if "queries" in memory:
            waiting = torch.cat([memory["queries"], q], 1)
            q, new["queries"] = waiting[:, : x.shape[2]], waiting[:, x.shape[2] :]
        offset = first_emission(tick, self.span()) if is_lockstep(tick) else 0
        if offset >= x.shape[2]:
            return None, new
        bias = band(exist, x.shape[2], self.sequence_len, x.dtype)[:, :, offset:]
        return self.attend(q[:, offset:], keys, values, bias=bias).transpose(1, 2), new

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Clip (N, E, T) to the answers of its windows (N, E, T - n + 1)."""
        tokens = windows_of(x, self.sequence_len).flatten(0, 1)
        out = self.answer(tokens[:, self.query_index], tokens)
        return rearrange(out, "(n t) e -> n e t", n=x.shape[0])


class RetroactiveAttention(Continual, Attention):
    """Self-attention over the last ``sequence_len`` tokens, answered for all of them, oldest first.

    Frames in: (streams, E); out: (streams, E, n). Clips (N, E, T) to (N, E, T - n + 1, n).

    Args:
        sequence_len: window n.
        update: 'recompute' (default) or 'incremental', which saves the n x n products for very long windows.
    """

    def __init__(
        self, embed_dim: int, num_heads: int, *, sequence_len: int, bias: bool = True, update: str = "recompute"
    ) -> None:
        super().__init__(embed_dim, num_heads, bias=bias)
        _check_window(sequence_len)
        if update == "incremental" and sequence_len < 2:
            raise ValueError(f"incremental updates need a window of at least 2 tokens, got {sequence_len}")
        if update not in ("recompute", "incremental"):
            raise ValueError(f"update must be 'recompute' or 'incremental', got {update!r}")
        self.sequence_len, self.update = sequence_len, update

    def _span(self) -> Span:
        n = self.sequence_len
        return Span(n, 1, 0, n - 1, n - 1)

    def _memory(
        self, streams: int, frame_shape: tuple[int, ...], make: Callable[..., Tensor]
    ) -> tuple[dict, tuple[int, ...]]:
        check_tokens(frame_shape, self.embed_dim, type(self).__name__)
        held, heads = self.sequence_len - 1, self.num_heads
        memory = {name: make((streams, held, self.embed_dim)) for name in ("queries", "keys", "values")}
        if self.update == "incremental":
            memory |= {
                "row_max": make((streams, heads, held), dtype=torch.float32, fill=float("-inf")),
                "row_sum": make((streams, heads, held), dtype=torch.float32),
                "row_peak": make((streams, heads, held), dtype=torch.float32),
                "row_value": make((streams, heads, held, self.embed_dim // heads), dtype=torch.float32),
            }
        return memory, (self.embed_dim, self.sequence_len)

    def _step(self, x: Tensor, memory: dict, tick: Tick) -> tuple[Tensor | None, dict]:
        new_tokens = dict(zip(("queries", "keys", "values"), self.project(x)))
        whole = {name: torch.cat([memory[name], token.unsqueeze(1)], 1) for name, token in new_tokens.items()}
        new = {name: keep_unless_live(t[:, 1:], memory[name], tick) for name, t in whole.items()}
        silent = is_lockstep(tick) and first_emission(tick, self.span()) > 0
        if self.update == "incremental":
            out, rows = self._increment(whole, memory, tick)
            new |= {name: keep_unless_live(t, memory[name], tick) for name, t in rows.items()}
            return (None if silent else self.out_proj(out).transpose(1, 2)), new
        if silent:
            return None, new
        return self.attend(whole["queries"], whole["keys"], whole["values"]).transpose(1, 2), new

    def _increment(self, whole: dict, memory: dict, tick: Tick) -> tuple[Tensor, dict]:
        """Update the n-1 old rows by the key that comes and the key that goes; make the new row (streams, n, E)."""
        heads, n = self.num_heads, self.sequence_len
        q, k, v = (
            rearrange(whole[name].float(), "s n (h d) -> s h n d", h=heads) for name in ("queries", "keys", "values")
        )
        q = q * q.shape[-1] ** -0.5
        seen = frames_seen(tick)
        if not isinstance(seen, Tensor):
            seen = torch.full((q.shape[0],), seen, device=q.device)
        # Position j of the n keys exists once n - 1 - j tokens were seen before.
        exist = (seen[:, None] >= n - 1 - torch.arange(n, device=q.device))[:, None]
        # The saved rows never hold a key that is not saved beside them: the oldest is taken out at the end of the step.
        old, newest_k, newest_v = q[:, :, :-1], k[:, :, -1:], v[:, :, -1:]
        logit = (old * newest_k).sum(-1)
        row_max = torch.maximum(memory["row_max"], logit)
        shrink = torch.exp(memory["row_max"] - row_max)
        gain = torch.exp(logit - row_max)
        total = memory["row_sum"] * shrink + gain
        peak = torch.maximum(memory["row_peak"] * shrink, total)
        value = memory["row_value"] * shrink[..., None] + gain[..., None] * newest_v
        last = (q[:, :, -1:] @ k.transpose(-1, -2)).squeeze(2).masked_fill(~exist, float("-inf"))
        last_max = last.amax(-1, keepdim=True)
        weights = torch.exp(last - last_max)
        total = torch.cat([total, weights.sum(-1, keepdim=True)], 2)
        peak = torch.cat([peak, weights.sum(-1, keepdim=True)], 2)
        row_max = torch.cat([row_max, last_max], 2)
        value = torch.cat([value, weights.unsqueeze(2) @ v], 2)
        out = rearrange(value / total[..., None], "s h n d -> s n (h d)").to(whole["queries"].dtype)
        rows = self._forget_oldest(q, k, v, exist, (row_max, total, peak, value))
        return out, rows

    def _forget_oldest(
        self, q: Tensor, k: Tensor, v: Tensor, exist: Tensor, rows: tuple[Tensor, Tensor, Tensor, Tensor]
    ) -> dict[str, Tensor]:
        """Take the oldest key out of the n-1 newest rows; rows that lose more than 7/8 of their peak are computed
        anew.
        """
        row_max, total, peak, value = (t[:, :, 1:] for t in rows)
        leaving = (q[:, :, 1:] * k[:, :, :1]).sum(-1).masked_fill(~exist[:, :, :1], float("-inf"))
        loss = torch.exp(leaving - row_max)
        total = total - loss
        value = value - loss[..., None] * v[:, :, :1]
        doubtful = total < peak * 2.0**-3
        if torch.compiler.is_compiling() or bool(doubtful.any()):
            logits = (q[:, :, 1:] @ k[:, :, 1:].transpose(-1, -2)).masked_fill(~exist[:, :, None, 1:], float("-inf"))
            fresh_max = logits.amax(-1)
            weights = torch.exp(logits - fresh_max[..., None])
            fresh = weights.sum(-1)
            value = torch.where(doubtful[..., None], weights @ v[:, :, 1:], value)
            row_max = torch.where(doubtful, fresh_max, row_max)
            total = torch.where(doubtful, fresh, total)
            peak = torch.where(doubtful, fresh, peak)
        return {"row_max": row_max, "row_sum": total, "row_peak": peak, "row_value": value}

    def _steps(self, x: Tensor | None, memory: dict, tick: Tick, end: bool) -> tuple[Tensor | None, dict]:
        if x is None:
            return None, memory
        if self.update == "incremental":
            raise ValueError(
                "incremental retroactive attention steps one token at a time; use update='recompute' for chunks"
            )
        x = admit_chunk(x, tick)
        new, windows = {}, []
        for name, tokens in zip(("queries", "keys", "values"), self.project(x.transpose(1, 2))):
            whole = torch.cat([memory[name], tokens], 1)
            new[name] = whole[:, x.shape[2] :]
            windows.append(whole)
        offset = first_emission(tick, self.span()) if is_lockstep(tick) else 0
        if offset >= x.shape[2]:
            return None, new
        q, k, v = (rearrange(t[:, offset:].unfold(1, self.sequence_len, 1), "s t e n -> (s t) n e") for t in windows)
        out = self.attend(q, k, v)
        return rearrange(out, "(s t) n e -> s e t n", s=x.shape[0]), new

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Clip (N, E, T) to the answers of its windows (N, E, T - n + 1, n)."""
        out = Attention.forward(self, windows_of(x, self.sequence_len).flatten(0, 1))
        return rearrange(out, "(b t) n e -> b e t n", b=x.shape[0])
