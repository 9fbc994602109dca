"""Twins: what applies and why not, building, saving whole or not at all, loading without the host."""

import json

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import sparing
from sparing.zoo import table, weights
from zoo.toy import ToyHost


def answer(name, model):
    return next(line for line in sparing.methods(model) if line.method == name)


def test_methods_says_what_applies_and_why_the_others_do_not(toy_zoo):
    yes, no = answer("toy", toy_zoo.ToyHost()), answer("toy", nn.ReLU())
    assert yes.applies
    assert str(yes) == "toy: applies (training-free)"
    assert str(no) == "toy: no, needs a ToyHost, got ReLU"


def test_a_method_that_cannot_be_imported_says_so(toy_zoo, monkeypatch):
    monkeypatch.setitem(table.METHODS, "absent", "sparing_absent_module:Twin")
    assert "cannot be imported here" in str(answer("absent", nn.ReLU()))


def test_a_twin_is_built_from_live_weights_and_leaves_the_host_alone(toy_zoo):
    host = toy_zoo.ToyHost()
    before = {key: value.clone() for key, value in host.state_dict().items()}
    twin = sparing.twin(host, "toy", strength=0.25)
    images = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(twin(images), host(images), rtol=0, atol=0)
    assert twin.knobs == {"strength": 0.25}
    with torch.no_grad():
        twin.head.weight.zero_()
    assert all(torch.equal(value, before[key]) for key, value in host.state_dict().items())


@pytest.mark.parametrize(
    ("model", "method", "kind", "message"),
    [
        (nn.ReLU(), "toy", ValueError, "toy does not apply to this ReLU: needs a ToyHost"),
        (nn.ReLU(), "toyy", ValueError, "unknown method 'toyy'; there are .*toy"),
        (ToyHost(), "toy", TypeError, "toy has no knob 'strenght'; closest: strength"),
        ("timm/x", "toy", TypeError, "a live model .* is needed, got str"),
    ],
)
def test_what_cannot_be_built_says_why(toy_zoo, model, method, kind, message):
    with pytest.raises(kind, match=message):
        sparing.twin(model, method, **({"strenght": 1} if "knob" in message else {}))


def test_a_saved_twin_comes_back_without_its_host(toy_zoo, tmp_path):
    twin = sparing.twin(toy_zoo.ToyHost(5), "toy", strength=0.125)
    twin.status = "trained"
    twin.save_pretrained(tmp_path / "a" / "twin")
    config = json.loads((tmp_path / "a" / "twin" / "config.json").read_text())
    assert config["host"] == {"architecture": "toy_host", "classes": 5}
    assert config["license"] == {"code": "apache-2.0", "weights": "mit", "data": None}
    assert config["pretrained_cfg"] == {"input_size": [1, 4, 4], "mean": [0.5], "std": [0.5]}
    assert (config["method"], config["status"], config["sparing_version"]) == ("toy", "trained", sparing.__version__)
    back = sparing.load(tmp_path / "a" / "twin")
    images = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(back(images), twin(images), rtol=0, atol=0)
    assert (back.status, back.knobs, back.training) == ("trained", {"strength": 0.125}, False)
    assert isinstance(sparing.create_model(str(tmp_path / "a" / "twin")), toy_zoo.ToyTwin)


def test_saving_in_half_precision_halves_the_file_and_loading_says_its_dtype(toy_zoo, tmp_path):
    twin = sparing.twin(toy_zoo.ToyHost(), "toy")
    twin.save_pretrained(tmp_path / "twin", dtype=torch.float16)
    assert {t.dtype for t in weights.read_state(tmp_path / "twin").values()} == {torch.float16}
    assert sparing.load(tmp_path / "twin").head.weight.dtype == torch.float32
    assert sparing.load(tmp_path / "twin", dtype=torch.bfloat16).head.weight.dtype == torch.bfloat16


def test_a_failed_save_leaves_the_old_twin_whole_and_nothing_beside_it(toy_zoo, tmp_path, monkeypatch):
    twin = sparing.twin(toy_zoo.ToyHost(), "toy")
    twin.save_pretrained(tmp_path / "twin")
    (tmp_path / "twin" / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in (tmp_path / "twin").iterdir()}

    def full_disk(tensors, path, metadata=None):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        twin.save_pretrained(tmp_path / "twin")
    with pytest.raises(OSError, match="No space left"):
        twin.save_pretrained(tmp_path / "new")
    assert {path.name: path.read_bytes() for path in (tmp_path / "twin").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["twin"]


def test_saving_again_replaces_weights_and_keeps_other_files(toy_zoo, tmp_path):
    twin = sparing.twin(toy_zoo.ToyHost(), "toy")
    twin.save_pretrained(tmp_path / "twin")
    (tmp_path / "twin" / "metrics.json").write_text("{}")
    with torch.no_grad():
        twin.head.bias.fill_(7.0)
    twin.save_pretrained(tmp_path / "twin")
    assert sparing.load(tmp_path / "twin").head.bias.eq(7.0).all()
    assert (tmp_path / "twin" / "metrics.json").is_file()


def test_an_unknown_status_is_not_saved(toy_zoo, tmp_path):
    twin = sparing.twin(toy_zoo.ToyHost(), "toy")
    twin.status = "fine"
    with pytest.raises(ValueError, match=r"status 'fine' .* is none of exact, training-free"):
        twin.save_pretrained(tmp_path / "twin")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_no_saved_twin_says_what_is_wrong(toy_zoo, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config.json"):
        sparing.load(tmp_path)
    (tmp_path / "config.json").write_text("{ not json")
    with pytest.raises(ValueError, match="no valid JSON"):
        sparing.load(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ["X"]}')
    with pytest.raises(ValueError, match="neither a method of sparing nor a diffusers class"):
        sparing.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        sparing.load(tmp_path / "none")
    with pytest.raises(ValueError, match="is a file"):
        sparing.load(tmp_path / "config.json")


def test_weights_of_another_model_in_a_twins_folder_are_refused(toy_zoo, tmp_path):
    sparing.twin(toy_zoo.ToyHost(), "toy").save_pretrained(tmp_path)
    save_file({"other": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing: first.weight.*unexpected: other"):
        sparing.load(tmp_path)


class HubApi:
    """Stands at the network's edge: records what would be uploaded."""

    uploads: list = []

    def __init__(self, token=None):
        self.token = token

    def create_repo(self, repo, private=None, exist_ok=False):
        return type("Repo", (), {"repo_id": repo})

    def upload_folder(self, repo_id, folder_path, commit_message):
        files = {path.name: path.read_bytes() for path in folder_path.iterdir()}
        HubApi.uploads.append((repo_id, files, commit_message, self.token))
        return f"hub:{repo_id}"


def test_pushing_uploads_what_saving_writes_and_the_repository_loads(toy_zoo, tmp_path, monkeypatch):
    HubApi.uploads = []
    monkeypatch.setattr(huggingface_hub, "HfApi", HubApi)
    twin = sparing.twin(toy_zoo.ToyHost(), "toy")
    assert twin.push_to_hub("me/toy-twin", token="t") == "hub:me/toy-twin"
    repo, files, message, token = HubApi.uploads[0]
    assert (repo, sorted(files), token) == ("me/toy-twin", ["config.json", "model.safetensors"], "t")
    assert "toy twin" in message
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, allow_patterns: str(tmp_path))
    assert torch.equal(sparing.load("me/toy-twin").head.weight, twin.head.weight)
