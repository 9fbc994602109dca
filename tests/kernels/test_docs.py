"""The examples of the kernel documentation run as printed."""

import re
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).parents[2] / "docs" / "kernels.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_an_example_runs(number):
    torch.manual_seed(number)
    exec(compile(EXAMPLES[number], f"{PAGE.name} example {number + 1}", "exec"), {})
