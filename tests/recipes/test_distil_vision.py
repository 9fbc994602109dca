"""Distilling brings a twin nearer to its host without labels, resumes exactly, and writes what load brings back."""

import json

import pytest
import torch

import sparing
from sparing.recipes import distil_vision
from sparing.recipes.distil_vision import DistilSettings, distill
from sparing.recipes.train_vision import save_model
from sparing.training import FitSettings
from sparing.vision.micro import vit_micro_patch4_28

KNOBS = {"num_tokens": 4, "base_depth": 1}
SETTINGS = FitSettings(epochs=12, batch_size=8, lr=2e-3, checkpoint_every=2)
KEEP_MANY = DistilSettings(hold_out=0.25)


def test_the_twin_comes_nearer_to_its_host(tmp_path, idx_folder, tiny_vit):
    host = tiny_vit()
    weights = {name: value.clone() for name, value in host.state_dict().items()}
    metrics = distill(
        host, str(idx_folder), out=tmp_path / "twin", knobs=KNOBS, fit_settings=SETTINGS, settings=KEEP_MANY
    )
    assert metrics["held_out"] == 12
    gap_before, gap_after = (1 - metrics[when]["feature_cosine"] for when in ("before", "after"))
    assert gap_after < 0.5 * gap_before
    assert all(torch.equal(value, weights[name]) for name, value in host.state_dict().items())
    twin = sparing.load(tmp_path / "twin")
    assert twin.status == "trained"
    assert json.loads((tmp_path / "twin" / "metrics.json").read_text())["after"] == metrics["after"]
    assert not (tmp_path / "twin" / "checkpoint.pt").exists()
    held = distil_vision.image_batches(host, str(idx_folder), labelled=False)
    places = distil_vision.epoch_order(48, seed=0, epoch=0)[:12].sort().values
    again = distil_vision.held_out_agreement(twin, host, distil_vision._Part(held, places))
    assert again["feature_cosine"] == pytest.approx(metrics["after"]["feature_cosine"], abs=1e-6)


def test_a_stopped_run_ends_with_the_same_twin(tmp_path, idx_folder, tiny_vit):
    def run(folder, on_step=None):
        return distill(
            tiny_vit(),
            str(idx_folder),
            out=tmp_path / folder,
            knobs=KNOBS,
            fit_settings=FitSettings(epochs=2, batch_size=8, checkpoint_every=2, ema_decay=0.9),
            on_step=on_step,
        )

    def stop(step):
        if step == 5:
            raise KeyboardInterrupt

    straight = run("straight")
    with pytest.raises(KeyboardInterrupt):
        run("stopped", on_step=stop)
    assert not (tmp_path / "stopped" / "model.safetensors").exists()
    resumed = run("stopped")
    assert resumed["after"] == straight["after"]
    one, two = (sparing.load(tmp_path / folder).state_dict() for folder in ("straight", "stopped"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_held_out_images_are_never_trained_on(tmp_path, idx_folder, tiny_vit, monkeypatch):
    seen = set()
    original = distil_vision._Part.batches

    def watch(self, order, *, batch_size, epoch):
        for batch in original(self, order, batch_size=batch_size, epoch=epoch):
            seen.add((self.source.augment is not None, tuple(batch.indices.tolist())))
            yield batch

    monkeypatch.setattr(distil_vision._Part, "batches", watch)
    settings = FitSettings(epochs=1, batch_size=6)
    distill(tiny_vit(), str(idx_folder), out=tmp_path, knobs=KNOBS, fit_settings=settings, settings=KEEP_MANY)
    trained, measured = ({i for flag, part in seen if flag is varied for i in part} for varied in (True, False))
    assert trained | measured == set(range(48))
    assert not trained & measured


def test_a_host_without_a_head_is_distilled_by_its_features(tmp_path, picture_folder, tiny_vit):
    host = tiny_vit(in_chans=3, num_classes=0)
    host.pretrained_cfg |= {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    metrics = distill(
        host,
        str(picture_folder),
        out=tmp_path / "twin",
        knobs=KNOBS,
        fit_settings=FitSettings(epochs=20, batch_size=4, lr=2e-3),
        settings=KEEP_MANY,
    )
    assert set(metrics["after"]) == {"feature_cosine"}
    assert metrics["after"]["feature_cosine"] > metrics["before"]["feature_cosine"]


def _usual_arguments(tmp_path, idx_folder) -> list[str]:
    save_model(vit_micro_patch4_28(), tmp_path / "host")
    return [
        *("--host", "vit_micro_patch4_28.demo_fashion", "--host_weights", str(tmp_path / "host")),
        *("--images", str(idx_folder), "--out", str(tmp_path / "twin"), "--batch_size", "8"),
    ]


def test_the_command_distils_and_prints_agreement(tmp_path, idx_folder, capsys):
    arguments = _usual_arguments(tmp_path, idx_folder)
    code = distil_vision.main([*arguments, "--knobs", '{"num_tokens": 4}', "--images_budget", "100"])
    output = capsys.readouterr()
    assert code == 0, output.err
    assert "feature cosine with the host: 0." in output.out
    metrics = json.loads((tmp_path / "twin" / "metrics.json").read_text())
    assert metrics["fit"]["epochs"] == 2
    assert metrics["knobs"]["num_tokens"] == [2, 2]
    assert sparing.load(tmp_path / "twin").semantic_grid == (2, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--knobs", "{num_tokens: 4}"], "--knobs takes a JSON object"),
        (["--knobs", "[4]"], "--knobs takes a JSON object"),
        (["--knobs", '{"num_tokens": 5}'], "num_tokens 5 is not a perfect square"),
        (["--preset", "a_week"], "unknown preset 'a_week'; there are h100_hour"),
        (["--host", "timm/no_such_vit"], "no_such_vit"),
        (["--images", "nowhere"], "nowhere"),
    ],
)
def test_bad_arguments_give_one_line_and_exit_code_2(tmp_path, idx_folder, capsys, arguments, message):
    assert distil_vision.main([*_usual_arguments(tmp_path, idx_folder), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "twin").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="asserts the message that machines without CUDA give")
def test_a_preset_sets_defaults_that_flags_override(tmp_path, idx_folder, capsys):
    arguments = [*_usual_arguments(tmp_path, idx_folder), "--preset", "h100_hour", "--epochs", "1"]
    assert distil_vision.main([*arguments, "--images_budget", "0"]) == 2
    assert "precision 'bf16' needs a CUDA device" in capsys.readouterr().err
    assert distil_vision.main([*arguments, "--images_budget", "48", "--precision", "fp32"]) == 0
    assert json.loads((tmp_path / "twin" / "metrics.json").read_text())["fit"]["ema_decay"] == 0.9995


def test_settings_that_cannot_work_are_refused(tmp_path, idx_folder, tiny_vit):
    with pytest.raises(ValueError, match=r"hold_out .* got 1.0"):
        distill(tiny_vit(), str(idx_folder), out=tmp_path, knobs=KNOBS, settings=DistilSettings(hold_out=1.0))
    with pytest.raises(TypeError, match="forward_features"):
        distill(torch.nn.Linear(2, 2), str(idx_folder), out=tmp_path)
