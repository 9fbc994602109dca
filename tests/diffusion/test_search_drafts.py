"""Drafts: cheap samplers that rank noises; winners are run in full from the same noise."""

import math

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from diffusion.conftest import build_flexdit
from tiny_pipelines import build

from sparing.diffusion import FlexDiTPipeline, RespacedScheduler, SparseThresholds
from sparing.diffusion.search import NoiseSearch
from sparing.diffusion.search.algorithms import Random
from sparing.diffusion.search.drafts import (
    cached_draft,
    draft_agreement,
    fewer_steps,
    rank_correlation,
    sparse_draft,
    twin_draft,
)
from sparing.diffusion.sparse_attention import BlockThreshold, attention_sites

CALL = {"class_labels": [3], "num_inference_steps": 6, "guidance_scale": 1.5}


def level(samples, prompts):
    return samples.flatten(1).mean(1)


def pixel_pipeline(transformer=None):
    """A FlexDiT that works in pixel space: no decoder needed."""
    model = transformer or build_flexdit(in_channels=1, out_channels=2)
    return FlexDiTPipeline(model, RespacedScheduler())


def search(pipe, draft, keep=2, n=6):
    return NoiseSearch(pipe, level, Random(n, keep=keep), draft=draft)(**CALL)


def test_a_twin_ranks_and_the_host_runs_the_winners():
    pipe = pixel_pipeline(build_flexdit(in_channels=1, out_channels=2, num_pooling=0, num_sdtm=0, num_dense_top=10))
    twin = build_flexdit(in_channels=1, out_channels=2, seed=1)
    used = []
    twin.register_forward_pre_hook(lambda _, args, kwargs: used.append(len(args[0])), with_kwargs=True)
    result = search(pipe, twin_draft(pipe, twin, density=2))
    assert sum(used) == 6 * 6 * 2  # six drafts of six steps, two rows each
    assert pipe.transformer is not twin
    full = NoiseSearch(pipe, level, Random(6))(**CALL)
    for candidate in result.finished:
        assert candidate.score == pytest.approx(full.candidates[candidate.index].score, abs=1e-5)
    assert draft_agreement(result) == {"pairs": 2, "rank_correlation": None, "draft_nfe": 36, "full_nfe": 12}


def test_drafts_by_the_pipeline_itself_agree_wholly():
    pipe = pixel_pipeline()
    agreement = draft_agreement(search(pipe, fewer_steps(6), keep=6))
    assert agreement["rank_correlation"] == pytest.approx(1.0)
    assert agreement["pairs"] == 6


def test_cached_drafts_skip_blocks_and_full_runs_are_exact():
    pipe = pixel_pipeline()
    calls = []
    pipe.transformer.transformer_blocks[-1].ff.register_forward_hook(lambda *_: calls.append(1))
    plain = NoiseSearch(pipe, level, Random(6))(**CALL)
    whole, _ = len(calls), calls.clear()
    result = search(pipe, cached_draft(pipe, FirstBlockCacheConfig(threshold=1e9)))
    per_batch = whole  # six steps of one batch
    assert len(calls) < 2 * per_batch
    assert not pipe.transformer.is_cache_enabled
    for candidate in result.finished:
        assert candidate.score == pytest.approx(plain.candidates[candidate.index].score, abs=1e-5)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match="a cache is on already"):
        cached_draft(pipe, FirstBlockCacheConfig())


def test_a_cache_on_the_pipeline_fires_between_steps():
    """The pipeline opens the context that diffusers' caches ask for."""
    pipe = pixel_pipeline()
    pipe.set_progress_bar_config(disable=True)
    calls = []
    pipe.transformer.transformer_blocks[-1].ff.register_forward_hook(lambda *_: calls.append(1))
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    pipe([1], num_inference_steps=4, output_type="pt", generator=torch.Generator().manual_seed(0))
    assert len(calls) == 1


def test_sparse_drafts_switch_attention_and_switch_it_back():
    pipe, kwargs = build("flux")
    call = {**kwargs, "num_inference_steps": 4}
    half = {site.name: BlockThreshold(-1.0, topk=0.5) for site in attention_sites(pipe)}
    thresholds = SparseThresholds(half, block_q=16, block_k=16, dense_steps=0.0)
    plain = NoiseSearch(pipe, level, Random(4))(**call)
    result = NoiseSearch(pipe, level, Random(4, keep=4), draft=sparse_draft(pipe, thresholds))(**call)
    for candidate in result.finished:
        assert candidate.score == pytest.approx(plain.candidates[candidate.index].score, abs=1e-5)
    drafts = [c.score for c in result.candidates if c.via == "draft"]
    assert any(abs(draft - c.score) > 1e-6 for draft, c in zip(drafts, plain.candidates))  # sparse attention was on


def test_what_cannot_draft_is_refused():
    pipe = pixel_pipeline()
    with pytest.raises(ValueError, match="has no denoiser 'unet'; its networks are transformer"):
        twin_draft(pipe, build_flexdit(), name="unet")
    with pytest.raises(ValueError, match="the twin has in_channels=4, the pipeline's transformer 1"):
        twin_draft(pipe, build_flexdit())
    with pytest.raises(ValueError, match="Linear is no denoiser and cannot stand in for the pipeline's transformer"):
        twin_draft(pipe, torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="at least one step"):
        fewer_steps(0)
    with pytest.raises(ValueError, match="num_inference_steps must be a whole number, got 'abc'"):
        fewer_steps("abc")
    with pytest.raises(ValueError, match="takes no diffusers cache"):
        cached_draft(build("ddim")[0], FirstBlockCacheConfig(), name="unet")


def test_rank_correlation():
    assert rank_correlation([1, 2, 3], [10, 20, 30]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert rank_correlation([1, 2, 2, 4], [1, 3, 2, 4]) == pytest.approx(0.9486832980505138)
    assert math.isnan(rank_correlation([1, 1, 1], [1, 2, 3]))
    with pytest.raises(ValueError, match="two pairs or more"):
        rank_correlation([1], [1])
