"""Log-mel spectra and the spotter on a stream; the two shipped networks on held-out recordings and videos."""

import csv
from pathlib import Path

import pytest
import torch
import torchaudio

import sparing
from sparing import continual as co
from sparing.continual.spotter import CoSpotter
from sparing.media.audio import read_audio
from sparing.recipes import stream
from sparing.zoo.weights import SHIPPED

DATA = Path(__file__).parent / "data"
NAMES = ["co_spotter_micro.demo_digits", "co_x3d_micro.demo_motions"]


def tiny_spotter():
    torch.manual_seed(0)
    sizes = {"embed_dim": 16, "num_heads": 2, "mlp_dim": 32, "num_layers": 2, "sequence_len": 8}
    return CoSpotter(5, num_mels=12, hop=64, n_fft=128, **sizes).eval()


@pytest.mark.parametrize(("hop", "n_fft"), [(128, 256), (128, 128), (100, 400)])
def test_spectra_are_torchaudios(hop, n_fft):
    samples = torch.randn(2, 20 * hop)
    layer = co.LogMel(20, hop=hop, n_fft=n_fft)
    theirs = torchaudio.transforms.MelSpectrogram(8000, n_fft, hop_length=hop, n_mels=20, center=False)(samples)
    got = layer(co.hops_of(samples, hop))
    torch.testing.assert_close(got, (theirs + layer.floor).log(), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("lockstep", [True, False])
def test_steps_and_chunks_of_a_spotter_are_its_clip_form(lockstep):
    network = tiny_spotter()
    hops = co.hops_of(torch.randn(3, 64 * 24), 64)
    with torch.inference_mode():
        want = network(hops, start=0)
        state, said = network.init_state(3, (64,), lockstep=lockstep), []
        for frame in hops.unbind(2):
            y, valid, state = network.step(frame, state)
            if bool(torch.as_tensor(valid).all()):
                said.append(y)
        torch.testing.assert_close(torch.stack(said, 2).flatten(2), want, atol=1e-5, rtol=1e-5)
        first, _, state = network.steps(hops[:, :, :15], network.init_state(3, (64,), lockstep=True))
        second, _, _ = network.steps(hops[:, :, 15:], state)
    torch.testing.assert_close(torch.cat([first, second], 2), want, atol=1e-5, rtol=1e-5)


def test_tables_stay_float32_and_come_back_from_the_meta_device():
    samples = torch.randn(1, 64 * 9)
    want = co.LogMel(12, hop=64, n_fft=128)(co.hops_of(samples.bfloat16().float(), 64))
    half = co.LogMel(12, hop=64, n_fft=128).bfloat16()
    torch.testing.assert_close(half(co.hops_of(samples.bfloat16(), 64)), want.bfloat16(), atol=0, rtol=0)
    with torch.autocast("cpu", torch.bfloat16):
        again = co.LogMel(12, hop=64, n_fft=128)(co.hops_of(samples.bfloat16().float(), 64))
    torch.testing.assert_close(again, want, atol=0, rtol=0)
    with torch.device("meta"):
        empty = co.LogMel(12, hop=64, n_fft=128)
    got = empty.to_empty(device="cpu")(co.hops_of(samples.bfloat16().float(), 64))
    torch.testing.assert_close(got, want, atol=0, rtol=0)


def test_a_spotter_compiles_to_one_graph_and_exports():
    network = tiny_spotter()
    frames = co.hops_of(torch.randn(2, 64 * 12), 64)
    step = torch.compile(network.step, backend="aot_eager", fullgraph=True)
    program, _ = co.export_step(network, (64,))
    state = other = network.init_state(2, (64,))
    exported = (other.clock, *(leaf for _, leaf in co.leaves(other.memory)))
    with torch.no_grad():
        for frame in frames.unbind(2):
            want, valid, state_next = network.step(frame, state)
            y, _, state = step(frame, state)
            z, _, *exported = program.module()(frame, *exported)
            torch.testing.assert_close(y, want)
            torch.testing.assert_close(z, want)
            state = state_next
    assert bool(valid.all())


def test_a_torchvision_network_becomes_a_twin_that_is_saved_and_comes_back(tmp_path):
    import torchvision

    from sparing.continual.twin import ContinualTwin

    torch.manual_seed(0)
    host = torchvision.models.video.mc3_18(num_classes=5).eval()
    twin = sparing.twin(host, "continual", pool_window=1)
    assert twin.status == "training-free"
    twin.save_pretrained(tmp_path / "mc3")
    back = sparing.load(tmp_path / "mc3")
    frames = torch.rand(1, 3, 12, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(back.eval()(frames), co.convert(host, pool_window=1)(frames), atol=0, rtol=0)
    assert ContinualTwin.why_not(torch.nn.LSTM(3, 3, bidirectional=True))


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="multiple of hop, got n_fft 300 and hop 128"):
        co.LogMel(n_fft=300)
    with pytest.raises(ValueError, match=r"\(128,\), got frames \(64,\)"):
        co.LogMel().init_state(1, (64,))
    with pytest.raises(ValueError, match=r"clips must have shape \(N, 128, T\)"):
        co.LogMel()(torch.zeros(1, 128, 1))


@pytest.mark.parametrize("name", NAMES)
def test_shipped_files_are_small_and_a_twin_of_them_is_saved_and_comes_back(name, tmp_path):
    from sparing.continual.twin import ContinualTwin

    card = sparing.model_card(name)
    assert (SHIPPED / f"{name}.safetensors").stat().st_size == card.measured["file_bytes"] < 2e6
    network = sparing.create_model(name, pretrained=True)
    twin = ContinualTwin.named(name.partition(".")[0])
    twin.network.load_state_dict(network.state_dict())
    twin.save_pretrained(tmp_path / "twin")
    back = sparing.load(tmp_path / "twin").network.state_dict()
    assert all(torch.equal(value, back[key]) for key, value in network.state_dict().items())


def test_the_shipped_spotter_hears_most_digits_of_a_held_out_speaker_file():
    """What is said most often during a span, shifted by the lag, is its label."""
    network = stream.load_network(NAMES[0])
    path = DATA / "digits_lucas.wav"
    rows = list(stream.watch([path], network, topk=1))
    config = network.pretrained_cfg
    lag, first = config["lag_frames"] * config["hop"] / config["sample_rate"], rows[0].seconds
    spans = [
        (label, float(start) + lag, float(end) + lag)
        for label, start, end in csv.reader((DATA / "digits_lucas.csv").read_text().splitlines()[1:])
    ]
    right = total = 0
    for label, start, end in spans:
        said = [row.top[0][0] for row in rows if start < row.seconds <= end]
        if label != "none" and start >= first and said:
            total += 1
            right += max(set(said), key=said.count) == label
    assert total >= 4
    assert right / total >= 0.75  # chance: 0.1
    assert read_audio(path, rate=8000)[1] == 8000


def test_the_shipped_video_network_names_most_motions():
    network = stream.load_network(NAMES[1])
    paths = sorted(DATA.glob("motion_*.mp4"))
    said = {name: [] for name in range(len(paths))}
    for row in stream.watch(paths, network, topk=1):
        said[int(row.stream.partition(":")[0])].append(row.top[0][0])
    right = sum(
        max(set(said[i]), key=said[i].count) == path.stem.removeprefix("motion_") for i, path in enumerate(paths)
    )
    assert right >= 5  # of six; chance: 0.1


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_shipped_networks_do_not_drift_in_a_hundred_thousand_steps(name, dtype):
    """The end of a long stream equals a stream that begins shortly before, its positions in the same phase."""
    network = stream.load_network(name).to(dtype)
    config = network.pretrained_cfg
    shape = (config["hop"],) if config["kind"] == "audio" else (3, config["image_size"], config["image_size"])
    tail = 200
    cycle = next((m.num_embeds for m in network.modules() if isinstance(m, co.RecyclingPositionalEncoding)), 1)
    total = 100_000 // cycle * cycle + tail
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(509, 1, *shape, generator=generator).to(dtype)  # a prime: no period of the network divides it
    assert network.plan().receptive_field < tail
    with torch.inference_mode():
        state = network.init_state(1, shape, dtype=dtype, lockstep=True)
        for t in range(total):
            y, _, state = network.step(pool[t % 509], state, inplace=True)
        fresh = network.init_state(1, shape, dtype=dtype, lockstep=True)
        for t in range(total - tail, total):
            z, _, fresh = network.step(pool[t % 509], fresh)
    assert torch.equal(y, z)
