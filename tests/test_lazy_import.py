"""`import sparing`, listing models and printing cards load no dependency."""

import subprocess
import sys

import pytest

import sparing

PROGRAM = """
import sys
import sparing
assert sparing.__version__
sparing.list_models("stvit*", demo=True)
for name in sparing.list_models(demo=True):
    sparing.model_card(name)
dependencies = '''torch torchvision torchaudio timm diffusers transformers xformers open_clip numpy triton einops
safetensors huggingface_hub matplotlib accelerate PIL typer rich'''.split()
heavy = set(dependencies) & set(sys.modules)
families = {name for name in sys.modules if name.startswith("sparing.") and not name.startswith("sparing.zoo")}
print(sorted(heavy | families))
"""


def test_import_and_lists_load_no_dependency_and_no_family():
    out = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=60)
    assert out.stdout.strip() == "[]"


def test_every_name_of_the_face_resolves():
    assert [name for name in sparing.__all__ if getattr(sparing, name, None) is None] == []


def test_an_unknown_name_of_the_face_names_what_there_is():
    with pytest.raises(AttributeError, match="create_model"):
        sparing.creat_model  # noqa: B018
