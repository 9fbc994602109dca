"""Costs: parameters and FLOPs exactly, times by their statistics, peak memory by what is alive."""

import os

import pytest
import timm
import torch
from torch import nn

import sparing
from sparing.kernels import tiny_attention
from sparing.zoo import profile as profiling


def test_deit_small_counts_the_papers_flops_on_cpu():
    result = sparing.profile(timm.create_model("deit_small_patch16_224"), measure=False)
    assert result.macs == pytest.approx(4.5989e9, rel=5e-4)
    assert result.flops == 2 * result.macs
    assert result.params == 22_050_664
    assert (result.latency_s, result.throughput, result.peak_memory_bytes) == (None, None, None)


def test_flops_of_deit_small_are_patches_projections_attention_mlp_and_head():
    tokens, width, layers = 197, 384, 12
    layer = 4 * tokens * width**2 + 2 * tokens**2 * width + 8 * tokens * width**2
    by_hand = 196 * 3 * 16**2 * width + layers * layer + width * 1000
    assert sparing.profile(timm.create_model("deit_small_patch16_224"), measure=False).macs == by_hand


class NeedsRealValues(nn.Module):
    """Branches on data, as no meta tensor can; counts its calls in a buffer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4, bias=False)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.layer(x) if float(x.abs().sum()) >= 0 else x


def test_a_model_that_meta_tensors_cannot_run_is_counted_for_real_and_keeps_its_state():
    model = NeedsRealValues()
    assert profiling.count_flops(model, torch.ones(3, 4)) == 2 * 3 * 4 * 4
    assert model.calls == 0


def test_counting_allocates_no_second_copy_of_the_weights():
    model = nn.Linear(8, 8)
    copy = profiling._copy_without_memory(model)
    assert copy.weight.is_meta
    assert isinstance(copy.weight, nn.Parameter)
    assert not model.weight.is_meta


def test_a_compiled_model_counts_what_it_was_compiled_from():
    model = torch.compile(nn.Linear(4, 5), backend="aot_eager")
    assert sparing.profile(model, torch.ones(2, 4), measure=False).flops == 2 * 2 * 4 * 5


class CustomOp(nn.Module):
    """Attention by a Triton custom op, which the counter knows only through our formula."""

    def forward(self, q):
        return tiny_attention(q, q, q, backend="triton")


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs the Triton interpreter")
def test_custom_ops_count_by_their_formulas():
    q = torch.randn(2, 3, 8, 16, generator=torch.Generator().manual_seed(0))
    assert profiling.count_flops(CustomOp(), q) == 2 * (2 * 3 * 8 * 8) * (16 + 16)


def test_batches_count_and_divide():
    model = timm.create_model("test_vit", num_classes=5)
    one = sparing.profile(model, torch.randn(1, 3, 160, 160), measure=False)
    four = sparing.profile(model, torch.randn(4, 3, 160, 160), repeats=3, warmup=0)
    assert four.flops == 4 * one.flops
    assert four.batch_size == 4
    assert four.throughput == pytest.approx(4 / four.latency_s)
    assert four.repeats == 3
    assert "GMACs" in str(four)
    assert four.to_dict()["macs"] == four.macs


def test_times_are_the_median_and_the_interquartile_range(monkeypatch):
    ticks = iter([0, 1, 0, 2, 0, 3, 0, 10, 0, 4])
    monkeypatch.setattr(profiling.time, "perf_counter", lambda: float(next(ticks)))
    result = sparing.profile(nn.Linear(2, 2), torch.ones(1, 2), repeats=5, warmup=2)
    assert (result.latency_s, result.latency_spread_s) == (3.0, 2.0)


def test_interleaving_runs_the_models_in_turn():
    order = []
    model = nn.Identity()
    calls = [lambda: order.append("a"), lambda: order.append("b")]
    times = profiling.measure_latency(calls, [model], device=torch.device("cpu"), repeats=2, warmup=1)
    assert order == ["a", "b"] * 3
    assert [len(t) for t in times] == [2, 2]


class Doubling(nn.Module):
    """Allocates a temporary of four times its input while the input's double is alive."""

    def forward(self, x):
        double = x.repeat(2)
        peak = double.repeat(2)
        return peak[:1] + double[:1]


def test_peak_memory_on_cpu_sums_what_is_alive_together():
    x = torch.ones(250_000)  # one MB
    peak, method = profiling.peak_memory(Doubling(), x)
    assert peak == pytest.approx(1e6 + 2e6 + 4e6, rel=0.01)
    assert "profiler" in method


def test_the_mode_of_every_submodule_is_restored():
    model = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(3))
    model[1].eval()
    sparing.profile(model, torch.ones(2, 3), repeats=1, warmup=0)
    assert (model.training, model[0].training, model[1].training) == (True, True, False)


def test_keyword_arguments_reach_the_forward():
    class Scaled(nn.Module):
        def forward(self, x, *, weight):
            return x @ weight

    result = sparing.profile(Scaled(), torch.ones(2, 3), kwargs={"weight": torch.ones(3, 5)}, measure=False)
    assert result.flops == 2 * 2 * 3 * 5


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="Linear has no pretrained_cfg with an input_size"):
        sparing.profile(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="repeats must be at least 1"):
        sparing.profile(nn.Linear(2, 2), torch.ones(1, 2), repeats=0)


@pytest.mark.gpu
def test_cuda_costs_are_those_of_the_device():
    model = timm.create_model("deit_tiny_patch16_224").cuda().half()
    result = sparing.profile(model, torch.randn(8, 3, 224, 224, device="cuda", dtype=torch.float16), repeats=5)
    assert result.device == torch.cuda.get_device_name()
    assert result.macs == pytest.approx(8 * 1.2537e9, rel=5e-4)
    assert result.peak_memory_bytes > 2 * result.params  # the weights alone
    assert result.memory_method == "peak of the CUDA allocator"
    assert result.latency_s > 0
