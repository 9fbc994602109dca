"""The static table against what the modules register; every entry builds, with the parameters its card states."""

import importlib
import importlib.util

import pytest

import sparing
from sparing.zoo.registry import registered
from sparing.zoo.table import CLASSES, METHODS, MODELS, PAPERS
from sparing.zoo.twins import Twin
from sparing.zoo.weights import SHIPPED

MODULES = sorted({entry.module for entry in MODELS.values()})


@pytest.mark.parametrize("module", MODULES)
def test_the_table_lists_exactly_what_a_module_registers(module):
    importlib.import_module(module)
    stated = {name.partition(".")[0] for name, entry in MODELS.items() if entry.module == module}
    assert set(registered(module)) == stated


def test_importing_vision_makes_every_vision_name_timms():
    timm = pytest.importorskip("timm")
    importlib.import_module("sparing.vision")
    names = {name.partition(".")[0] for name, entry in MODELS.items() if entry.module.startswith("sparing.vision")}
    assert names
    assert [name for name in sorted(names) if not timm.is_model(name)] == []


def test_no_module_registers_names_that_the_table_does_not_know():
    for family in ("vision", "diffusion", "video_language", "audio", "continual"):
        if importlib.util.find_spec(f"sparing.{family}"):
            importlib.import_module(f"sparing.{family}")
    ours = {name for name in registered() if _module_of(name).startswith("sparing.")}
    assert ours <= {name.partition(".")[0] for name in MODELS}


def _module_of(name):
    from sparing.zoo.registry import _ENTRY_POINTS

    return _ENTRY_POINTS[name].__module__


@pytest.mark.parametrize("name", sorted(name for name, entry in MODELS.items() if entry.params is not None))
def test_an_entry_builds_with_the_parameters_that_its_card_states(name):
    model = sparing.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == MODELS[name].params


def test_every_entry_states_its_parameters():
    assert [name for name, entry in MODELS.items() if entry.params is None] == []


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_names_a_class_that_meets_the_contract(method):
    module, _, name = METHODS[method].partition(":")
    cls = getattr(importlib.import_module(module), name)
    assert cls.method == method
    assert cls.training in ("none", "required")
    assert method in PAPERS
    for part in ("from_host", "why_not"):
        assert callable(getattr(cls, part))
    if issubclass(cls, Twin):
        for part in ("from_host", "why_not", "from_twin_config", "twin_config", "knobs"):
            assert any(part in vars(parent) for parent in cls.__mro__ if parent is not Twin), part


@pytest.mark.parametrize("class_name", sorted(CLASSES))
def test_every_class_of_a_saved_folder_exists_under_its_name(class_name):
    module, _, name = CLASSES[class_name].partition(":")
    assert getattr(importlib.import_module(module), name).__name__ == class_name


def test_shipped_files_and_shipped_entries_are_the_same_and_small():
    files = sorted(SHIPPED.glob("*.safetensors"))
    assert {file.stem for file in files} == {name for name, entry in MODELS.items() if entry.source == "shipped"}
    assert all(file.stat().st_size <= 2 * 2**20 for file in files)
    assert sum(file.stat().st_size for file in files) <= 16 * 2**20


def test_the_hosts_that_entries_name_exist():
    timm = pytest.importorskip("timm")
    hosts = {entry.host for entry in MODELS.values() if entry.host}
    unknown = [host for host in hosts if host.startswith("timm/") and not timm.is_model(host[5:].partition(".")[0])]
    assert unknown == []
