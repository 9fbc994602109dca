"""The toy method in the zoo's table, for the time of a test."""

import pytest

from sparing.zoo import compare, hosts, registry, table
from zoo import toy


@pytest.fixture
def toy_zoo(monkeypatch):
    """The table with a toy host (a shipped tag without a file) and a toy twin, and nothing else; METHODS likewise."""
    entries = {
        "toy_host": table.Entry(module="zoo.toy_models", task="toy", params=323),
        "toy_host.demo": table.Entry(
            module="zoo.toy_models", task="toy", source="shipped", demo=True, license_weights="mit", license_data="mit"
        ),
        "toy_toy_host": table.Entry(
            module="zoo.toy_models", task="toy", method="toy", host="toy_host", license_weights="cc-by-nc-4.0"
        ),
    }
    monkeypatch.setattr(table, "MODELS", entries)
    for module in (compare, hosts, registry):
        monkeypatch.setattr(module, "MODELS", entries)
    monkeypatch.setitem(table.METHODS, "toy", "zoo.toy:ToyTwin")
    return toy
