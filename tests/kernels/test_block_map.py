"""Block maps: lists, conversions, prediction; and the windows' geometry."""

import pytest
import torch

from sparing.kernels import BlockMap, block_sparse_attention, predict_block_map, window_attention
from sparing.kernels.ops.predict_block_map import block_statistics


def _map(seed: int = 0) -> BlockMap:
    torch.manual_seed(seed)
    return BlockMap.from_mask(torch.rand(2, 3, 4, 5) < 0.5, block_q=16, block_k=16)


def test_the_lists_name_the_kept_blocks_in_ascending_order_both_ways():
    block_map = _map()
    for b, h, i in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(4)).tolist():
        kept = block_map.mask[b, h, i].nonzero().flatten().tolist()
        assert block_map.kv_idx[b, h, i].tolist() == kept + [0] * (5 - len(kept))
        assert block_map.kv_num[b, h, i] == len(kept)
    assert torch.equal(block_map.q_num.sum(), block_map.kv_num.sum())
    assert block_map.q_idx.shape == (2, 3, 5, 4)


def test_elements_expand_blocks_cut_at_the_ragged_end_and_add_the_causal_mask():
    block_map = _map()
    elements = block_map.elements(60, 70)
    assert elements.shape == (2, 3, 60, 70)
    assert torch.equal(elements[:, :, 59, 69], block_map.mask[:, :, 3, 4])
    causal = block_map.elements(60, 70, causal=True)
    assert not causal[:, :, 0, 11:].any()
    assert torch.equal(causal[:, :, 59], elements[:, :, 59])


def test_there_and_back_through_a_flex_block_mask():
    block_map = _map()
    for causal in (False, True):
        again = BlockMap.from_flex(block_map.to_flex(64, 80, causal=causal))
        assert torch.equal(again.mask, block_map.mask)
        assert (again.block_q, again.block_k) == (16, 16)


def test_a_flex_mask_made_by_torch_becomes_a_map():
    from torch.nn.attention.flex_attention import create_block_mask

    flex = create_block_mask(lambda b, h, i, j: i >= j, None, None, 64, 64, device="cpu", BLOCK_SIZE=16)
    assert torch.equal(BlockMap.from_flex(flex).mask[0, 0], torch.ones(4, 4).tril() > 0)


def test_a_map_that_does_not_fit_is_named():
    q = torch.randn(2, 3, 64, 8)
    with pytest.raises(ValueError, match=r"must be \(1 or 2, 1 or 3, 4, 4\), got \(2, 3, 4, 5\)"):
        block_sparse_attention(q, q, q, _map())


def test_self_similarity_is_the_mean_of_all_pairwise_cosines_of_valid_rows():
    torch.manual_seed(0)
    x = torch.randn(1, 1, 7, 6, dtype=torch.float64)
    mean, similarity = block_statistics(x, 4)
    ragged = torch.nn.functional.normalize(x[0, 0, 4:], dim=-1)
    torch.testing.assert_close(similarity[0, 0, 1], (ragged @ ragged.T).mean())
    torch.testing.assert_close(mean[0, 0, 1], x[0, 0, 4:].mean(0))


def test_prediction_options_keep_force_and_drop_the_right_blocks():
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 32, 8), torch.randn(1, 1, 32, 8)
    options = {"block_q": 4, "block_k": 4, "sim_threshold": -1.0}
    half = predict_block_map(q, k, **options, topk=0.5)
    assert half.kv_num.unique().tolist() == [4]
    least = predict_block_map(q, k, **options, cdf=0.0)
    assert least.kv_num.unique().tolist() == [1]  # at least one, whatever the mass
    assert predict_block_map(q, k, **options, cdf=0.0, keep_sink=True).mask[..., 0].all()
    assert predict_block_map(q, k, block_q=4, block_k=4, sim_threshold=1.0, cdf=0.1).mask.all()
    causal = predict_block_map(q, k, **options, topk=0.25, causal=True)
    assert not causal.mask[0, 0].triu(1).any()
    assert (causal.kv_num >= 1).all()
    with pytest.raises(ValueError, match="exactly one of cdf and topk"):
        predict_block_map(q, k, **options)


def test_windows_already_cut_equal_the_map():
    torch.manual_seed(0)
    qkv, table = torch.randn(1, 2, 4, 3 * 8), torch.randn(9, 2)
    out = window_attention(qkv, table, window=2, heads=2)
    cut = qkv.view(2, 2, 2, 24).transpose(0, 1).reshape(2, 4, 3, 2, 4)
    windows = window_attention(cut, table, window=2, heads=2)
    assert windows.shape == (2, 4, 2, 4)
    torch.testing.assert_close(windows.flatten(2).view(2, 2, 2, 8).transpose(0, 1).reshape(1, 2, 4, 8), out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 3}, "no multiple of the window 3x3; pad it first"),
        ({"shift": 2}, "below the window"),
        ({"heads": 3}, "do not divide into 3 heads"),
        ({"rel_bias": torch.zeros(2, 4, 4)}, "not both"),
    ],
)
def test_window_geometry_that_does_not_fit_is_named(change, message):
    arguments = {"window": 2, "heads": 2} | change
    with pytest.raises(ValueError, match=message):
        window_attention(torch.randn(1, 4, 4, 24), torch.randn(9, 2), **arguments)


def test_an_unshifted_window_does_not_see_its_neighbour_and_a_shifted_one_not_across_the_border():
    qkv = torch.zeros(1, 4, 4, 3)
    qkv[..., 2] = torch.arange(16.0).view(
        4, 4
    )  # v = the position; equal scores: each output is a mean over what is seen
    plain = window_attention(qkv, window=2, heads=1)
    assert plain[0, 0, 0].item() == sum((0, 1, 4, 5)) / 4
    shifted = window_attention(qkv, window=2, heads=1, shift=1)
    assert shifted[0, 0, 0].item() == 0.0  # a corner is alone in its region
    assert shifted[0, 1, 1].item() == sum((5, 6, 9, 10)) / 4
