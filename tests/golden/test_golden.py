"""Every described golden case is one test; ``--golden-dir`` (repeatable) adds directories."""

import pytest

from golden.harness import NOT_YET, Case, Expected, adapter, difference, find_case_files, run


def test_every_folder_has_an_adapter_or_is_listed_as_not_yet(golden_directories):
    for folder in {case_file.folder for case_file in find_case_files(golden_directories)}:
        assert folder in NOT_YET or hasattr(adapter(folder), "BUILDERS")


def test_case(golden_case: Case):
    run(golden_case)


def test_the_comparison_sees_a_small_error_a_wrong_shape_and_a_moved_infinity():
    import torch

    want = torch.tensor([1.0, 2.0, float("-inf")])
    assert difference(want.clone(), Expected(want)) == ""
    assert "above" in difference(want + torch.tensor([1e-3, 0.0, 0.0]), Expected(want, atol=1e-4))
    assert "above" in difference(want + torch.tensor([1e-3, 0.0, 0.0]), Expected(want, norm_rtol=1e-6))
    assert "shape" in difference(want[:2], Expected(want))
    assert "infinities" in difference(torch.tensor([1.0, 2.0, 0.0]), Expected(want))
    assert "not finite" in difference(torch.tensor([float("nan"), 2.0, float("-inf")]), Expected(want))


def test_a_kind_without_builder_fails():
    with pytest.raises(AssertionError, match="no builder for kind"):
        run(Case("vision/x", "no_such_kind", {}, {}, {}, {}))


def test_a_copy_is_left_out_and_another_case_of_the_same_name_is_kept(tmp_path):
    for place, config in (("a", 1), ("b", 1), ("c", 2)):
        (tmp_path / place / "vision").mkdir(parents=True)
        (tmp_path / place / "vision" / "x.json").write_text(f'{{"model": "m", "config": {config}}}')
    found = find_case_files([tmp_path / place for place in "abc"])
    assert [case_file.spec["config"] for case_file in found] == [1, 2]
