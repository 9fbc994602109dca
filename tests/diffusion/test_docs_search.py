"""The examples of the noise search page run as printed."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "noise_search.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_an_example_runs(number):
    scope: dict = {}
    exec(compile(EXAMPLES[number], f"{PAGE.name} example {number + 1}", "exec"), scope)
    if "result" in scope:
        assert scope["result"].nfe == 80
        assert scope["result"].best.score == max(candidate.score for candidate in scope["result"].candidates)
