"""A stopped run goes on as if it had not been stopped; accumulation equals a larger batch; EMA and checkpoints hold."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from sparing.training import FitSettings, MemoryBatches, TensorImages, fit, load_checkpoint, save_checkpoint

SETTINGS = FitSettings(epochs=3, batch_size=4, lr=1e-2, warmup=0.1, checkpoint_every=2, ema_decay=0.9)


class Stopped(Exception):
    pass


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.Dropout(0.3), nn.GELU(), nn.Linear(12, 3))


def _data() -> MemoryBatches:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (22, 1, 4, 4), generator=generator, dtype=torch.uint8)
    return MemoryBatches(TensorImages(images, torch.arange(22) % 3), mean=(0.5,), std=(0.25,))


def _loss(model, batch):
    return nn.functional.cross_entropy(model(batch.images), batch.labels)


def _weights(model) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("stops", [[1], [2, 5], [6], [3, 8, 14]])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_stopped_anywhere_ends_with_the_same_weights(tmp_path, stops, accumulate):
    settings = replace(SETTINGS, accumulate=accumulate)
    straight, history = fit(_model(), _loss, _data(), settings=settings, out=tmp_path / "straight")
    for stop in stops:

        def interrupt(step, stop=stop):
            if step == stop:
                raise Stopped

        try:
            fit(_model(), _loss, _data(), settings=settings, out=tmp_path / "stopped", on_step=interrupt)
        except Stopped:
            torch.rand(5)  # whatever the process does in between
    resumed, resumed_history = fit(_model(), _loss, _data(), settings=settings, out=tmp_path / "stopped")
    assert torch.equal(_weights(straight), _weights(resumed))
    assert [row["loss"] for row in history] == [row["loss"] for row in resumed_history]
    assert len(history) == 3


def test_resuming_repeats_no_step_before_the_last_checkpoint(tmp_path):
    def interrupt(step):
        if step == 4:
            raise Stopped

    with pytest.raises(Stopped):
        fit(_model(), _loss, _data(), settings=SETTINGS, out=tmp_path, on_step=interrupt)
    steps = []
    fit(_model(), _loss, _data(), settings=SETTINGS, out=tmp_path, on_step=steps.append)
    assert steps == list(range(3, 16))


def test_a_finished_run_is_not_trained_again(tmp_path):
    first, _ = fit(_model(), _loss, _data(), settings=SETTINGS, out=tmp_path)
    steps = []
    again, history = fit(_model(), _loss, _data(), settings=SETTINGS, out=tmp_path, on_step=steps.append)
    assert steps == []
    assert torch.equal(_weights(first), _weights(again))
    assert len(history) == 3


def test_accumulated_passes_equal_one_large_batch(tmp_path):
    def no_dropout():
        model = _model()
        model[2].p = 0.0
        return model

    small = replace(SETTINGS, batch_size=2, accumulate=4, epochs=2)
    large = replace(SETTINGS, batch_size=8, accumulate=1, epochs=2)
    one, _ = fit(no_dropout(), _loss, _data(), settings=small, out=tmp_path / "small")
    two, _ = fit(no_dropout(), _loss, _data(), settings=large, out=tmp_path / "large")
    torch.testing.assert_close(_weights(one), _weights(two), atol=2e-5, rtol=0)  # sums in another order, through Adam


def test_the_average_lags_behind_the_weights(tmp_path):
    model = _model()
    start = _weights(model)
    average, _ = fit(model, _loss, _data(), settings=SETTINGS, out=tmp_path)
    assert average is not model
    assert (_weights(average) - start).norm() < (_weights(model) - start).norm()
    plain, _ = fit(_model(), _loss, _data(), settings=replace(SETTINGS, ema_decay=0.0), out=tmp_path / "plain")
    assert torch.equal(_weights(plain), _weights(model))


def test_training_lowers_the_loss_and_leaves_the_callers_generator(tmp_path):
    torch.manual_seed(3)
    expected = torch.rand(2)
    model, data = _model(), _data()
    torch.manual_seed(3)
    _, history = fit(model, _loss, data, settings=replace(SETTINGS, epochs=30), out=tmp_path)
    assert torch.equal(torch.rand(2), expected)
    assert history[-1]["loss"] < 0.8 * history[0]["loss"]


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    fit(_model(), _loss, _data(), settings=SETTINGS, out=tmp_path)
    with pytest.raises(ValueError, match=r"lr: 0.01 before, 0.5 now"):
        fit(_model(), _loss, _data(), settings=replace(SETTINGS, lr=0.5), out=tmp_path)


def test_a_checkpoint_of_another_identity_is_refused_with_the_fields_that_differ(tmp_path):
    identity = {"mode": "bucket", "table": ((0, 3), (400, 2)), "gamma": 5.0}
    fit(_model(), _loss, _data(), settings=SETTINGS, out=tmp_path, identity=identity)
    fit(_model(), _loss, _data(), settings=SETTINGS, out=tmp_path, identity={**identity, "table": [[0, 3], [400, 2]]})
    with pytest.raises(ValueError, match=r"another run \(gamma: 5.0 before, 0.0 now; warm: None before, 1 now\)"):
        fit(_model(), _loss, _data(), settings=SETTINGS, out=tmp_path, identity={**identity, "gamma": 0.0, "warm": 1})


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    save_checkpoint(tmp_path / "checkpoint.pt", {"a": 1})
    with pytest.raises(ValueError, match="no checkpoint of this training loop"):
        fit(_model(), _loss, _data(), settings=SETTINGS, out=tmp_path)
    (tmp_path / "checkpoint.pt").unlink()
    fit(_model(), _loss, _data(), settings=SETTINGS, out=tmp_path)
    other = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    with pytest.raises(ValueError, match="belongs to another model"):
        fit(other, _loss, _data(), settings=SETTINGS, out=tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": float("nan")}, "lr must be a finite number, at least 0, got nan"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"batch_size": 23}, "22 samples on 1 processes make no step of 1 x 23"),
        ({"precision": "fp8"}, "'fp8'"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"warmup": 1.0}, "warmup"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        fit(_model(), _loss, _data(), settings=replace(SETTINGS, **change), out=tmp_path)


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    with pytest.raises(ValueError, match="loss of epoch 1 is nan"):
        fit(_model(), lambda model, batch: _loss(model, batch) * float("nan"), _data(), settings=SETTINGS, out=tmp_path)


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_what_is_not_finite_is_never_written_over_a_good_checkpoint(tmp_path, broken):
    calls = []

    def loss(model, batch):
        calls.append(batch)
        value = _loss(model, batch)
        if len(calls) != 7:  # in the middle of the second epoch
            return value
        # the gradient of sqrt at 0 is infinite while the loss is not
        return value * float("nan") if broken == "loss" else value + 0 * (0 * value).sqrt()

    settings = replace(SETTINGS, checkpoint_every=1)
    with pytest.raises(ValueError, match=r"\(step 7\).*the data or the weights.*learning rate"):
        fit(_model(), loss, _data(), settings=settings, out=tmp_path)
    kept = load_checkpoint(tmp_path / "checkpoint.pt")
    assert kept["step"] == 6
    assert all(torch.isfinite(tensor).all() for tensor in kept["model"].values())
    straight, _ = fit(_model(), _loss, _data(), settings=settings, out=tmp_path / "straight")
    resumed, _ = fit(_model(), _loss, _data(), settings=settings, out=tmp_path)
    assert torch.equal(_weights(straight), _weights(resumed))


def test_a_failed_write_leaves_the_old_checkpoint_and_no_litter(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"step": 1, "weights": torch.ones(3)})
    with pytest.raises(Exception, match="pickle"):
        save_checkpoint(path, {"step": lambda: 2})
    assert load_checkpoint(path)["step"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_other_files_are_not_taken_for_checkpoints(tmp_path):
    path = tmp_path / "checkpoint.pt"
    for content in (b"", b"text", b"PK\x03\x04"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is not a checkpoint"):
            load_checkpoint(path)
    torch.save(torch.ones(2), path)
    with pytest.raises(ValueError, match="holds a Tensor"):
        load_checkpoint(path)
