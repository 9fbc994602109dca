"""Reading checkpoints: every kind of bad file gives one clear line, and nothing in a file is ever run."""

import pickle
import sys
import types

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import save_file
from torch import nn

from sparing.zoo import weights

RAN = []


def run() -> None:
    RAN.append("code of the file")


class RunsOnLoad:
    def __reduce__(self):
        return (run, ())


def lying_header(good: bytes) -> dict[str, bytes]:
    return {
        "header longer than the file": (10**12).to_bytes(8, "little") + good[8:],
        "shape larger than the data": good.replace(b"[2,2]", b"[9,9]"),
        "data cut off": good[:-4],
        "no json": good[:8] + b"x" * (len(good) - 8),
    }


@pytest.mark.parametrize("lie", lying_header(b""))
def test_a_safetensors_file_with_a_lying_header_gives_one_line(tmp_path, lie):
    save_file({"weight": torch.ones(2, 2)}, tmp_path / "good.safetensors")
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(lying_header((tmp_path / "good.safetensors").read_bytes())[lie])
    with pytest.raises(ValueError, match=r"bad.safetensors' is no valid safetensors file") as caught:
        weights.read_state(bad)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, save):
    save({"weight": torch.ones(2), "extra": RunsOnLoad()}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"w.pt' is refused: .*nothing of it was run") as caught:
        weights.read_state(tmp_path / "w.pt")
    assert RAN == []
    assert "\n" not in str(caught.value)


def test_classes_named_as_stubs_are_read_as_inert_data(tmp_path, monkeypatch):
    module = types.ModuleType("published_config")
    module.Node = type("Node", (dict,), {"__module__": "published_config"})
    monkeypatch.setitem(sys.modules, "published_config", module)
    node = module.Node(rate=1)
    node.frozen = True
    torch.save({"model": {"weight": torch.ones(2)}, "config": node}, tmp_path / "w.pth")
    monkeypatch.delitem(sys.modules, "published_config")
    with pytest.raises(ValueError, match=r"published_config.Node"):
        weights.read_state(tmp_path / "w.pth")
    assert list(weights.read_state(tmp_path / "w.pth", stubs=["published_config.Node"])) == ["weight"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\xff\xd8\xff\xe0 a picture", "neither a safetensors nor a torch file"),
        (b"PK\x03\x04 no archive", "damaged torch file"),
        (b"\x80\x02 no pickle", "is refused: no torch file of plain tensors"),
    ],
)
def test_files_of_another_kind_give_one_line(tmp_path, content, message):
    (tmp_path / "w.pt").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        weights.read_state(tmp_path / "w.pt")
    assert "\n" not in str(caught.value)


def test_missing_files_and_folders_without_weights_say_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        weights.read_state(tmp_path / "none.pt")
    with pytest.raises(FileNotFoundError, match=r"holds no weights; looked for model.safetensors"):
        weights.read_state(tmp_path)


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "model_state_dict"])
def test_customary_wrappers_and_ddp_prefixes_come_off(tmp_path, wrapper):
    state = {"module.weight": torch.arange(3.0), "module.bias": torch.ones(1)}
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, tmp_path / "w.pt")
    read = weights.read_state(tmp_path / "w.pt")
    assert sorted(read) == ["bias", "weight"]
    torch.testing.assert_close(read["weight"], torch.arange(3.0))


def test_a_checkpoint_of_another_model_names_the_first_five_keys_and_changes_nothing(tmp_path):
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(4)))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    save_file(
        {f"other.{i}": torch.ones(1) for i in range(7)} | {"0.weight": torch.ones(3, 3)}, tmp_path / "w.safetensors"
    )
    with pytest.raises(ValueError, match="another model") as caught:
        weights.load_checkpoint(model, tmp_path / "w.safetensors")
    message = str(caught.value)
    assert "missing: 0.bias, 1.weight, 1.bias, 2.weight, 2.bias and 2 more" in message
    assert "unexpected: other.0, other.1, other.2, other.3, other.4 and 2 more" in message
    assert "of another shape: 0.weight (3, 3) instead of (2, 2)" in message
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_tied_tensors_are_stored_once_and_filled_together():
    model, other = (nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(2))
    for pair in (model, other):
        pair[1].weight = pair[0].weight
    state = weights.untied_state(model)
    assert sorted(state) == ["0.bias", "0.weight", "1.bias"]
    weights.fill(other, state, origin="state")
    torch.testing.assert_close(other[1].weight, model[1].weight, rtol=0, atol=0)
    del state["0.weight"]
    with pytest.raises(ValueError, match=r"missing: 0.weight, 1.weight"):
        weights.fill(other, state, origin="state")


def _raises(error):
    def fetch(*_args, **_kwargs):
        raise error

    return fetch


def _missing_repository():
    response = types.SimpleNamespace(headers={}, status_code=404, request=None)
    error = errors.RepositoryNotFoundError.__new__(errors.RepositoryNotFoundError)
    Exception.__init__(error, "404")
    error.response = response
    return error


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (errors.OfflineModeIsEnabled("offline"), ConnectionError, "the hub cannot be reached"),
        (errors.LocalEntryNotFoundError("not cached"), ConnectionError, "not in the local cache"),
        (OSError("no route"), ConnectionError, "the hub cannot be reached"),
        (_missing_repository(), FileNotFoundError, "the hub has no 'a/b'"),
        (errors.HFValidationError("bad"), ValueError, "neither a folder here nor a hub id"),
    ],
)
def test_a_hub_that_cannot_answer_gives_one_line(monkeypatch, error, kind, message):
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", _raises(error))
    with pytest.raises(kind, match=message) as caught:
        weights.download("a/b", "model.safetensors")
    assert "\n" not in str(caught.value)


def test_a_hub_source_downloads_the_named_file(monkeypatch, tmp_path):
    asked = []

    def fetch(repo, file):
        asked.append((repo, file))
        return str(tmp_path / "cached.pth")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    assert weights.locate("x", "hf:owner/repo/folder/file.pth") == tmp_path / "cached.pth"
    assert asked == [("owner/repo", "folder/file.pth")]
