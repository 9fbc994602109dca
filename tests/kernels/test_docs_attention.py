"""The examples of docs/kernels_attention.md run as they stand."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parent.parent.parent / "docs" / "kernels_attention.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_an_example_runs(example):
    exec(compile(example, str(PAGE), "exec"), {})


def test_every_op_of_the_family_has_an_example():
    names = ("attention", "varlen_attention", "block_sparse_attention", "few_query_attention", "window_attention")
    assert all(any(f"{name}(" in example for example in EXAMPLES) for name in (*names, "ring_attention_step"))
