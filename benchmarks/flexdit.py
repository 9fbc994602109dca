"""Speed of FlexDiT-XL/2 beside diffusers' dense DiT-XL/2 and training-free peers, random weights, one run, interleaved.

    python benchmarks/flexdit.py --pixels 512                      # CPU: batch 1, float32
    python benchmarks/flexdit.py --pixels 512 --device cuda --dtype bfloat16 --batch 16 --guidance --compile

Per model: seconds a forward (median of ``--repeats``, quartiles), ratio to the dense host, GMACs, images per second of
a ``--steps``-step run, peak memory on CUDA. FlexDiT runs at each side of ``--sides`` and along the published schedule
(per-step latency by density). Peers: attention-only token merging in the manner of tomesd (ratio 0.5, on the dense
host); and step caches of which every second step fires, so that a forward is the mean of a whole one and a cached one:
diffusers' FirstBlockCache on the dense model and on the FlexDiT, and cache-dit's DBCache on the dense model where it is
installed (``uv run --with cache-dit python benchmarks/flexdit.py``). Weights are random: nothing here speaks of
quality. Results: benchmarks/results/flexdit_PIXELS_DEVICE.json.
"""

import argparse
import copy
import importlib.util
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from diffusers import DiTTransformer2DModel, FirstBlockCacheConfig
from torch import Tensor, nn

import sparing
from sparing.diffusion import DensityTable

RESULTS = Path(__file__).parent / "results"
CACHED = "(every second step cached)"


class HalfMerged(nn.Module):
    """Attention over half of the tokens: the rest is averaged into its nearest kept token before, and copied back after
    (tomesd, Bolya & Hoffman 2023: random destination in each 2 x 2 cell, attention only)."""

    def __init__(self, attention: nn.Module, side: int) -> None:
        super().__init__()
        self.attention = attention
        generator = torch.Generator().manual_seed(0)
        cells = torch.randint(4, (side // 2, side // 2), generator=generator)
        rows = 2 * torch.arange(side // 2)[:, None] + cells // 2
        columns = 2 * torch.arange(side // 2)[None] + cells % 2
        destinations = (rows * side + columns).flatten()
        sources = torch.ones(side * side, dtype=torch.bool)
        sources[destinations] = False
        self.register_buffer("destinations", destinations)
        self.register_buffer("sources", sources.nonzero()[:, 0])

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        a, b = hidden_states[:, self.sources], hidden_states[:, self.destinations]
        score = nn.functional.normalize(a, dim=-1) @ nn.functional.normalize(b, dim=-1).mT
        best, target = score.max(-1)
        merged = hidden_states.shape[1] // 2
        order = best.argsort(dim=-1, descending=True)
        gone, kept = order[:, :merged, None], order[:, merged:, None]
        width = hidden_states.shape[-1]
        target = target.gather(1, gone[..., 0])[..., None].expand(-1, -1, width)
        sums = b.scatter_reduce(1, target, a.gather(1, gone.expand(-1, -1, width)), "mean")
        stayed = a.gather(1, kept.expand(-1, -1, width))
        out = self.attention(torch.cat([stayed, sums], dim=1), **kwargs)
        from_stayed, from_sums = out[:, : stayed.shape[1]], out[:, stayed.shape[1] :]
        back = torch.empty_like(a)
        back = back.scatter(1, kept.expand(-1, -1, width), from_stayed)
        back = back.scatter(1, gone.expand(-1, -1, width), from_sums.gather(1, target))
        full = torch.empty_like(hidden_states)
        full[:, self.sources], full[:, self.destinations] = back, from_sums
        return full


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pixels", type=int, choices=(256, 512), default=512)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--guidance", action="store_true", help="doubles the batch of every forward")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--sides", type=int, nargs="*", help="sparse sides; 8 and those of the schedule by default")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=50, help="of the run whose images per second are computed")
    parser.add_argument("--layers", type=int, default=28, help="fewer for a quick look")
    parser.add_argument("--heads", type=int, default=16, help="fewer for a quick look: the width is 72 a head")
    parser.add_argument(
        "--json", type=Path, help="result file, instead of benchmarks/results/flexdit_PIXELS_DEVICE.json"
    )
    parser.add_argument("--plot", type=Path, help="picture of the times, relative to the dense model")
    parser.add_argument("--no_peers", action="store_true")
    arguments = parser.parse_args()
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    latent = arguments.pixels // 8
    schedule = {256: "256_r0.61_0.86", 512: "512_r0.90_0.96"}[arguments.pixels]
    table = DensityTable.published(schedule, grid=(latent // 2, latent // 2))
    sides = arguments.sides or sorted({8, *(side for side, _ in table.distinct_sides)})

    torch.manual_seed(0)
    shape: dict[str, Any] = {"num_attention_heads": arguments.heads, "num_layers": arguments.layers}
    dense = DiTTransformer2DModel(sample_size=latent, out_channels=8, **shape)
    dense = dense.eval().to(device, dtype)
    split = {} if arguments.layers == 28 else _small_split(arguments.layers)
    flex: Any = sparing.create_model(f"flexdit_xl_2_{arguments.pixels}", density_table=schedule, **shape, **split)
    flex = flex.eval().to(device, dtype)
    _randomise(flex)

    rows = arguments.batch * (2 if arguments.guidance else 1)
    latents = torch.randn(rows, 4, latent, latent, device=device, dtype=dtype)
    timestep = torch.full((rows,), 500, device=device)
    labels = torch.arange(rows, device=device) % 1000
    if arguments.compile:
        runs = {"dense": torch.compile(dense), "flex": torch.compile(flex, dynamic=False)}
    else:
        runs = {"dense": dense, "flex": flex}
    candidates: dict[str, Callable[[], Any]] = {
        "dense DiT": lambda: runs["dense"](latents, timestep=timestep, class_labels=labels)
    }
    for side in sides:
        candidates[f"FlexDiT {side}x{side}"] = lambda side=side: runs["flex"](latents, timestep, labels, density=side)
    if not arguments.no_peers:
        candidates |= _peers(dense, flex, latents, timestep, labels, grid=latent // 2)
    measured = _interleaved(candidates, repeats=arguments.repeats, device=device)

    base = measured["dense DiT"]["seconds"]
    with torch.device("meta"):
        layout = {"num_pooling": 0, "num_sdtm": 0, "num_dense_top": arguments.layers}
        plain = type(flex)(sample_size=latent, **shape, **layout)
    for name, row in measured.items():
        if name.endswith(CACHED):  # two forwards were timed
            row |= {"seconds": row["seconds"] / 2, "quartiles": [value / 2 for value in row["quartiles"]]}
        row["of_dense"] = row["seconds"] / base
        row["images_per_second"] = arguments.batch / (row["seconds"] * arguments.steps)
        if name == "dense DiT":
            row["gmacs"] = plain.flops("all") / 1e9
        elif (side := name.removeprefix("FlexDiT ").partition("x")[0]).isdigit() and "+" not in name:
            row["gmacs"] = flex.flops(int(side), count="executed") / 1e9
    steps = [round(i * 999 / max(arguments.steps - 1, 1)) for i in range(arguments.steps)]
    along = [measured[f"FlexDiT {h}x{h}"]["seconds"] for h, _ in table.sides(steps) if f"FlexDiT {h}x{h}" in measured]
    result: dict[str, Any] = {
        "settings": {k: v for k, v in vars(arguments).items() if k not in ("json", "plot")},
        "versions": {"torch": torch.__version__, "sparing": sparing.__version__},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "models": measured,
    }
    if len(along) == arguments.steps:
        result["schedule"] = {
            "name": schedule,
            "images_per_second": arguments.batch / sum(along),
            "of_dense": sum(along) / (base * arguments.steps),
            "speedup": base * arguments.steps / sum(along),
        }
    quick = "_quick_look" if (arguments.layers, arguments.heads) != (28, 16) else ""
    file = arguments.json or RESULTS / f"flexdit_{arguments.pixels}_{device.type}{quick}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"{'model':<60} {'seconds':>9} {'quartiles':>19} {'of dense':>9} {'GMACs':>8}")
    for name, row in measured.items():
        low, high = row["quartiles"]
        print(
            f"{name:<60} {row['seconds']:9.4f} {low:9.4f}..{high:<8.4f} {row['of_dense']:9.3f} "
            + (f"{row['gmacs']:8.2f}" if "gmacs" in row else f"{'-':>8}")
        )
    if "schedule" in result:
        print(
            f"schedule {schedule}: {result['schedule']['of_dense']:.3f} of the dense time over {arguments.steps} steps"
        )
    print(f"written to {file}")
    if arguments.plot:
        _plot(measured, arguments.plot)


def _plot(measured: dict[str, dict[str, Any]], path: Path) -> None:
    """Seconds of every model over the dense model's, as bars."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.5 * len(measured) + 1), layout="constrained")
    axes = figure.subplots()
    axes.barh(list(measured), [row["of_dense"] for row in measured.values()])
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xlabel("time of a forward, dense = 1")
    axes.invert_yaxis()
    figure.savefig(path)


def _small_split(layers: int) -> dict[str, Any]:
    if layers < 6:
        raise SystemExit(f"--layers must be 28, or at least 6 for a quick look, got {layers}")
    return {"num_pooling": 1, "num_sdtm": 1, "sdtm_group": [1, layers - 5, 1, 1], "num_dense_top": 1}


def _randomise(model: nn.Module) -> None:
    """No zero-initialised layer stays zero: a cache or a compiler must not profit from it."""
    for parameter in model.parameters():
        if not parameter.detach().any():
            nn.init.normal_(parameter, std=0.02)


def _peers(
    dense: Any, flex: Any, latents: Tensor, timestep: Tensor, labels: Tensor, *, grid: int
) -> dict[str, Callable[[], Any]]:
    """Training-free accelerators of the same machine and run."""

    def merged() -> Any:
        originals = [block.attn1 for block in dense.transformer_blocks]
        for block, attention in zip(dense.transformer_blocks, originals):
            block.attn1 = wrapped[attention]
        try:
            return dense(latents, timestep=timestep, class_labels=labels)
        finally:
            for block, attention in zip(dense.transformer_blocks, originals):
                block.attn1 = attention

    wrapped = {block.attn1: HalfMerged(block.attn1, grid).to(latents.device) for block in dense.transformer_blocks}

    def cached(model: Any, **density: int) -> Any:
        model.enable_cache(FirstBlockCacheConfig(threshold=1e9))
        try:
            with model.cache_context("benchmark"):
                model(latents, timestep, labels, **density)
                return model(latents, timestep, labels, **density)
        finally:
            model.disable_cache()

    layout = {"num_pooling": 0, "num_sdtm": 0, "num_dense_top": len(dense.transformer_blocks)}
    plain = type(flex).from_config({**flex.config, **layout, "density_table": None, "status": None})
    plain = plain.eval().to(latents.device, latents.dtype)
    _randomise(plain)
    peers: dict[str, Callable[[], Any]] = {
        "dense + token merging 0.5": merged,
        f"dense + FirstBlockCache {CACHED}": lambda: cached(plain),
        f"FlexDiT 8x8 + FirstBlockCache {CACHED}": lambda: cached(flex, density=8),
    }
    if importlib.util.find_spec("cache_dit") is None:
        print("cache-dit is not installed: not measured")
    else:
        peers[f"dense + cache-dit DBCache F1B0 {CACHED}"] = _cache_dit(dense, latents, timestep, labels)
    return peers


def _cache_dit(dense: Any, latents: Tensor, timestep: Tensor, labels: Tensor) -> Callable[[], Any]:
    """Two steps of a copy under cache-dit: the first is whole, the second takes all blocks but the first from it."""
    import cache_dit

    model, counted = copy.deepcopy(dense), [0]
    model.transformer_blocks[-1].register_forward_pre_hook(lambda *_: counted.__setitem__(0, counted[0] + 1))
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1,
        Bn_compute_blocks=0,
        residual_diff_threshold=1e9,
        max_warmup_steps=1,
        num_inference_steps=2,
        enable_separate_cfg=False,
    )
    cache_dit.enable_cache(model, cache_config=config)

    def run() -> Any:
        counted[0] = 0
        cache_dit.refresh_context(model, num_inference_steps=2, verbose=False)
        model(latents, timestep=timestep, class_labels=labels)
        out = model(latents, timestep=timestep, class_labels=labels)
        if counted[0] != 1:
            raise RuntimeError(f"cache-dit ran the last block {counted[0]} times in two steps, not once")
        return out

    return run


@torch.inference_mode()
def _interleaved(
    candidates: dict[str, Callable[[], Any]], *, repeats: int, device: torch.device
) -> dict[str, dict[str, Any]]:
    """Seconds of each candidate: one warm-up each, then A, B, C, A, B, C, ..."""

    def synchronise() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    times: dict[str, list[float]] = {name: [] for name in candidates}
    peaks: dict[str, int] = {}
    for round_number in range(repeats + 1):
        for name, call in candidates.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            synchronise()
            started = time.perf_counter()
            call()
            synchronise()
            if round_number:
                times[name].append(time.perf_counter() - started)
                if device.type == "cuda":
                    peaks[name] = torch.cuda.max_memory_allocated(device)
    rows: dict[str, dict[str, Any]] = {}
    for name, seconds in times.items():
        low, _, high = quantiles(seconds, n=4) if len(seconds) > 1 else (seconds[0],) * 3
        rows[name] = {"seconds": median(seconds), "quartiles": [low, high]}
        if name in peaks:
            rows[name]["peak_memory_bytes"] = peaks[name]
    return rows


if __name__ == "__main__":
    main()
