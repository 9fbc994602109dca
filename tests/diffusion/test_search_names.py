"""Verifiers by name: every entry of the table is what it says, and every slip is answered in the caller's words."""

import importlib
import inspect

import pytest
import torch

from sparing.diffusion.search import verifiers as v
from sparing.diffusion.search.verifiers.base import Verifier
from sparing.diffusion.search.verifiers.names import VERIFIERS, key_values, make_verifier, make_verifiers


@pytest.mark.parametrize("name", VERIFIERS)
def test_the_table_is_what_the_modules_hold(name):
    entry = VERIFIERS[name]
    kind = getattr(importlib.import_module(f"sparing.diffusion.search.verifiers.{entry.home}"), entry.kind)
    assert issubclass(kind, Verifier)
    assert kind.name == name
    assert getattr(v, entry.kind) is kind
    parameters = inspect.signature(kind).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    assert open_ended or set(entry.options) <= set(parameters)
    without_default = {key for key, p in parameters.items() if p.default is p.empty and p.kind is not p.VAR_KEYWORD}
    assert without_default == set(entry.needs)


def test_arguments_signs_and_factors():
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(make_verifier("brightness:target=0.25")(images), v.Brightness(0.25)(images))
    torch.testing.assert_close(make_verifier("-contrast")(images), -v.Contrast()(images))
    torch.testing.assert_close(make_verifier("2.5*Contrast")(images), 2.5 * v.Contrast()(images))
    torch.testing.assert_close(make_verifier("-.5*contrast")(images), -0.5 * v.Contrast()(images))
    shipped = make_verifier("classifier:model=vit_micro_patch4_28.demo_fashion,target=3,output=logit")
    assert shipped(torch.rand(2, 1, 28, 28)).shape == (2,)


def test_several_are_ranked_together_and_one_is_left_alone():
    assert isinstance(make_verifiers(["contrast", "sharpness"]), v.RankEnsemble)
    assert make_verifiers(["contrast", "sharpness"], weights=[1, 2]).weights == (1.0, 2.0)
    assert isinstance(make_verifiers(["contrast"]), v.Contrast)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sharpnes", "no verifier 'sharpnes'; closest: sharpness"),
        ("zzz", "no verifier 'zzz'; there are aesthetic, "),
        ("", "has no name"),
        ("-", "has no name|no verifier"),
        ("brightness:target", "'target' is no KEY=VALUE"),
        ("brightness:level=3", "'brightness' takes target; not level"),
        ("contrast:k=1", "'contrast' takes no argument; not k"),
        ("brightness:target=7", r"target of brightness is in \[0, 1\], got 7"),
        (
            "brightness:target=bright",
            "verifier 'brightness:target=bright': target must be a finite number, got 'bright'",
        ),
        ("compressibility:quality=95.5", "quality must be a whole number, got 95.5"),
        ("spectral_flatness:n_fft=true", "n_fft must be a whole number, got True"),
        ("denoising_error:levels=[0.3,[0.5]", r"the brackets of 'levels=\[0\.3,\[0\.5\]' do not match"),
        ("brightness:target=NaN", "'NaN' is no finite number"),
        ("classifier", "verifier 'classifier' needs model: classifier:model=..."),
        ("classifier:model=vit_mikro", "closest"),
        ("classifier:model=timm/test_vitt", "closest"),
    ],
)
def test_slips_are_answered_in_the_callers_words(text, words):
    with pytest.raises(ValueError, match=words):
        make_verifier(text)


def test_the_users_own_function(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def fit(samples, prompts):\n    return [float(len(p)) for p in prompts]\n\nnumber = 3\n")
    verifier = make_verifier(f"{file}:fit")
    assert verifier.name == "fit"
    assert verifier(torch.zeros(2, 3, 4, 4), ["ab", "abc"]).tolist() == [2.0, 3.0]
    for text, error, words in (
        (f"{file}:fitt", ValueError, "has no 'fitt'; it has fit"),
        (f"{file}:number", ValueError, "got int"),
        (f"{file}", ValueError, "name the function in it"),
        ("nowhere.py:fit", FileNotFoundError, "no such file: 'nowhere.py'"),
    ):
        with pytest.raises(error, match=words):
            make_verifier(text)


def test_commas_inside_brackets_belong_to_the_value():
    assert key_values('start=3,ladder=[[1,4],[2,5]],a={"b":[1,2]},c=x', of="it") == {
        "start": 3,
        "ladder": [[1, 4], [2, 5]],
        "a": {"b": [1, 2]},
        "c": "x",
    }


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("def fit(:", "SyntaxError"),
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("raise RuntimeError('boo')", "RuntimeError: boo"),
        ("raise SystemExit('no')", "SystemExit: no"),
    ],
)
def test_a_file_that_cannot_be_run_is_named_with_its_error(tmp_path, content, words):
    file = tmp_path / "mine.py"
    file.write_text(content)
    with pytest.raises(ValueError, match=f"mine.py' could not be run: {words}"):
        make_verifier(f"{file}:fit")


@pytest.mark.parametrize("sign", ["", "-", "2*"])
def test_what_the_users_function_raises_is_told_by_its_name(tmp_path, sign):
    file = tmp_path / "mine.py"
    file.write_text("def fit(samples, prompts):\n    return [{}[p] if p else 1.0 for p in prompts]\n")
    verifier = make_verifier(f"{sign}{file}:fit")
    assert verifier(torch.zeros(1, 3, 4, 4)).shape == (1,)
    with pytest.raises(ValueError, match="'fit' could not score: KeyError: 'x'"):
        verifier(torch.zeros(1, 3, 4, 4), ["x"])
