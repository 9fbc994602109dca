"""The folder of ``adapt_pruned``: finished runs are left alone, other runs refused, killed ones go on and tidy up."""

from dataclasses import replace

import pytest
import torch
from recipes.pruning_task import DATA, FIT, TWO_STAGES, convolutions, run, samples

from sparing.recipes.adapt_pruned import adapt_pruned
from sparing.training import ImageSettings
from sparing.vision.micro import vit_micro_patch4_28

ONE_STAGE = replace(TWO_STAGES, stages=1)
RESULT = ["config.json", "metrics.json", "model.safetensors"]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def stop(step):
    raise KeyboardInterrupt


def never(step):
    raise AssertionError("trained where nothing is to be trained")


def other_weights():
    net = convolutions()
    with torch.no_grad():
        for parameter in net.one.parameters():
            parameter.mul_(1.1)
    return net


OTHERS = [
    ({"settings": replace(ONE_STAGE, density=0.5)}, "density: 0.4 before, 0.5 now"),
    ({"settings": replace(ONE_STAGE, method="sppara")}, "method: splora before, sppara now"),
    ({"fit_settings": replace(FIT, lr=1e-3)}, "lr: 0.005 before, 0.001 now"),
    ({"data": (samples(40, 7), DATA[1])}, r"data: \w+ before, \w+ now"),
    ({"build": other_weights}, r"start: \w+ before, \w+ now"),
    ({"head": "two"}, "head: head before, two now"),
]


def test_a_finished_run_is_said_to_be_finished_and_not_trained_anew(tmp_path, capsys):
    first = run(tmp_path, ONE_STAGE)
    stamps = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    capsys.readouterr()
    again = run(tmp_path, ONE_STAGE, on_step=never)
    assert again == first
    assert "holds the result of this very run: nothing was trained" in capsys.readouterr().err
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == stamps


def test_a_finished_run_is_not_overwritten_by_another(tmp_path):
    run(tmp_path, ONE_STAGE)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for change, words in OTHERS:
        with pytest.raises(ValueError, match=rf"holds the result of another run \(.*{words}"):
            run(tmp_path, **({"settings": ONE_STAGE, "on_step": never} | change))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_stopped_run_is_not_mixed_with_another(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, ONE_STAGE, on_step=stop)
    for change, words in OTHERS:
        with pytest.raises(ValueError, match=rf"holds another run \(.*{words}"):
            run(tmp_path, **({"settings": ONE_STAGE, "on_step": never} | change))
    (tmp_path / "run.json").rename(tmp_path / "kept.json")
    with pytest.raises(ValueError, match=r"kept\.pt is of a run without run\.json"):
        run(tmp_path, ONE_STAGE, on_step=never)
    (tmp_path / "kept.json").rename(tmp_path / "run.json")
    run(tmp_path, ONE_STAGE)
    assert names(tmp_path) == RESULT


def test_image_settings_are_part_of_a_run(tmp_path, idx_folder):
    def adapt(settings, **options):
        torch.manual_seed(0)
        net = vit_micro_patch4_28(embed_dim=24, depth=2, num_heads=2, num_classes=2)
        out = tmp_path / "run"
        prune, fit = replace(ONE_STAGE, method="splopa", block_size=4), replace(FIT, epochs=1)
        return adapt_pruned(
            net, str(idx_folder), out=out, settings=prune, fit_settings=fit, image_settings=settings, **options
        )

    with pytest.raises(KeyboardInterrupt):
        adapt(ImageSettings(), on_step=stop)
    with pytest.raises(ValueError, match=r"holds another run \(max_shift: 2 before, 1 now\)"):
        adapt(ImageSettings(max_shift=1))
    first = adapt(ImageSettings(num_workers=1))  # only speed
    with pytest.raises(ValueError, match=r"result of another run \(flip: True before, False now\)"):
        adapt(ImageSettings(flip=False))
    assert adapt(ImageSettings()) == first


def test_what_a_killed_run_left_is_removed_and_files_of_others_stay(tmp_path):
    run(tmp_path / "straight", ONE_STAGE)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", ONE_STAGE, on_step=stop)
    stage = tmp_path / "killed" / "stage_0"
    (stage / ".checkpoint.pt.x1y2").write_bytes(b"half")  # what a kill leaves of a file that is being written
    (tmp_path / "killed" / ".model.safetensors.x1y2").write_bytes(b"half")
    (stage / "notes.txt").write_text("mine")
    run(tmp_path / "killed", ONE_STAGE)
    assert names(tmp_path / "killed") == [*RESULT, "stage_0"]
    assert names(stage) == ["notes.txt"]
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("straight", "killed"))
    assert one == two


def test_a_run_that_was_killed_while_tidying_up_is_finished_and_tidied(tmp_path):
    first = run(tmp_path, ONE_STAGE)
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "stage_0").mkdir()
    (tmp_path / "stage_0" / "network.pt").write_bytes(b"")
    assert run(tmp_path, ONE_STAGE, on_step=never) == first
    assert names(tmp_path) == RESULT


def test_going_on_with_a_network_that_was_pruned_in_place_is_refused(tmp_path):
    net, fine = convolutions(), replace(TWO_STAGES, method="fine")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, fine, lambda: net, on_step=stop)
    with pytest.raises(ValueError, match="start is a hash of the weights that it began from"):
        run(tmp_path, fine, lambda: net, on_step=never)


@pytest.mark.parametrize("text", ["", "[]", '{"loss": 1}'])
def test_a_run_json_or_metrics_of_something_else_are_named(tmp_path, text):
    (tmp_path / "metrics.json").write_text(text)
    with pytest.raises(ValueError, match=r"metrics\.json is not of this recipe"):
        run(tmp_path, ONE_STAGE)
    (tmp_path / "metrics.json").rename(tmp_path / "run.json")
    with pytest.raises(ValueError, match=r"run\.json is not of this recipe|holds another run"):
        run(tmp_path, ONE_STAGE)
    assert names(tmp_path) == ["run.json"]
