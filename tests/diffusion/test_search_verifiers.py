"""Leaf verifiers against what defines them: formulas by hand, PIL, timm, open_clip; and what they refuse."""

import io
import json
import math

import numpy as np
import open_clip
import pytest
import timm
import torch
from einops import rearrange
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from sparing.diffusion.search import verifiers as v
from sparing.diffusion.search.verifiers.images import Preprocessing, luma


def pictures(count=3, size=(20, 24), channels=3, seed=0):
    return torch.rand(count, channels, *size, generator=torch.Generator().manual_seed(seed))


def as_pil(images):
    pixels = (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(image) for image in pixels]


def tiny_clip(size=32, context=20, **kwargs):
    torch.manual_seed(0)
    vision = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": size}
    text = {"context_length": context, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    return open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text, **kwargs).eval()


@pytest.fixture(scope="module")
def clip():
    return tiny_clip()


# -- statistics of images


def test_image_statistics_are_their_formulas():
    images = pictures()
    red, green, blue = images.numpy().transpose(1, 0, 2, 3).astype(np.float64)
    grey = 0.299 * red + 0.587 * green + 0.114 * blue
    inner = grey[:, 1:-1, 1:-1]
    edges = grey[:, :-2, 1:-1] + grey[:, 2:, 1:-1] + grey[:, 1:-1, :-2] + grey[:, 1:-1, 2:] - 4 * inner
    np.testing.assert_allclose(v.Sharpness()(images), edges.reshape(3, -1).var(axis=1), rtol=1e-4)
    np.testing.assert_allclose(v.Contrast()(images), grey.reshape(3, -1).std(axis=1), rtol=1e-4)
    np.testing.assert_allclose(v.Brightness()(images), grey.reshape(3, -1).mean(axis=1) - 1, rtol=1e-4)
    np.testing.assert_allclose(v.Brightness(0.5)(images), -abs(grey.reshape(3, -1).mean(axis=1) - 0.5), atol=1e-6)
    rg, yb = (red - green).reshape(3, -1), ((red + green) / 2 - blue).reshape(3, -1)
    wanted = np.sqrt(rg.var(1) + yb.var(1)) + 0.3 * np.sqrt(rg.mean(1) ** 2 + yb.mean(1) ** 2)
    np.testing.assert_allclose(v.Colorfulness()(images), wanted, rtol=1e-4)
    for image, entropy in zip(grey, v.Entropy()(images).tolist(), strict=True):
        share = np.bincount(np.rint(image * 255).astype(int).ravel(), minlength=256) / image.size
        assert entropy == pytest.approx(-(share[share > 0] * np.log2(share[share > 0])).sum(), abs=0.02)


def test_compressibility_is_the_size_of_the_jpeg():
    images = pictures()
    for image, score in zip(as_pil(images), v.Compressibility()(images).tolist(), strict=True):
        buffer = io.BytesIO()
        image.save(buffer, format="JPEG", quality=95)
        assert score == pytest.approx(-len(buffer.getvalue()) / 1000)
    flat = torch.full((1, 3, 20, 24), 0.5)
    assert v.Compressibility()(flat) > v.Compressibility()(images[:1])
    with pytest.raises(ValueError, match="quality of a JPEG is 1 to 100, got 0"):
        v.Compressibility(quality=0)


STATISTICS = [v.Sharpness(), v.Contrast(), v.Colorfulness(), v.Entropy(), v.Compressibility(), v.Brightness()]


@pytest.mark.parametrize("verifier", STATISTICS, ids=lambda x: x.name)
def test_grey_images_pil_images_and_single_images_are_scored_like_their_colour_tensor(verifier):
    grey = (pictures(channels=1) * 255).round() / 255
    colour = grey.expand(-1, 3, -1, -1)
    scores = verifier(colour)
    torch.testing.assert_close(verifier(grey), scores)
    torch.testing.assert_close(verifier(as_pil(colour)), scores)
    torch.testing.assert_close(torch.cat([verifier(image[None]) for image in colour]), scores)
    torch.testing.assert_close(verifier(colour.half()), scores, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("verifier", [v.Sharpness(), v.Contrast(), v.Colorfulness(), v.Brightness()], ids=repr)
def test_what_says_it_is_differentiable_has_finite_gradients_even_for_grey(verifier):
    images = pictures(channels=1).expand(-1, 3, -1, -1).clone().requires_grad_()
    verifier(images).sum().backward()
    assert images.grad.isfinite().all()
    coloured = pictures().requires_grad_()
    verifier(coloured).sum().backward()
    assert coloured.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("samples", "words"),
    [
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "'contrast' takes floats in .0, 1., got torch.uint8"),
        (torch.full((2, 3, 8, 8), 255.0), "got values from 255 to 255"),
        (torch.full((2, 3, 8, 8), -1.0), "got values from -1 to -1"),
        (torch.zeros(2, 5, 3, 8, 8), r"got video \(2, 5, 3, 8, 8\): wrap it in OnFrames"),
        (torch.zeros(2, 4, 8, 8), r"got \(2, 4, 8, 8\)"),
        ([[1, 2]], "takes image tensors or PIL images, got list"),
        ([Image.new("RGB", (4, 4)), Image.new("RGB", (5, 4))], "one size at a time"),
    ],
)
def test_what_is_no_image_is_refused(samples, words):
    with pytest.raises(ValueError, match=words):
        v.Contrast()(samples)


def test_nan_pixels_give_nan_and_not_an_error_about_their_range():
    images = pictures()
    images[1, 0, 0, 0] = math.nan
    assert v.Contrast()(images).isnan().tolist() == [False, True, False]


# -- audio and video


def test_audio_statistics_of_known_waves():
    time = torch.arange(16000) / 16000
    tone = 0.5 * torch.sin(2 * math.pi * 440 * time)
    noise = torch.randn(16000, generator=torch.Generator().manual_seed(0)).clamp(-1, 1) * 0.5
    waves = torch.stack([tone, noise])[:, None].expand(-1, 2, -1)
    loudness = v.LoudnessTarget(-20)(waves)
    assert loudness[0] == pytest.approx(-(20 + 10 * math.log10(0.125)), abs=1e-3)  # a sine at 0.5 has power 1/8
    flat = v.SpectralFlatness()(waves)
    assert flat[0] < 0.01
    assert flat[1] > 0.5
    clipped = torch.cat([torch.ones(1, 1, 25), torch.zeros(1, 1, 75)], dim=2)
    assert v.ClipRatio()(clipped).tolist() == [-0.25]
    assert v.LoudnessTarget()(torch.zeros(1, 2, 100)).tolist() == [-80.0]  # silence is -100 dB
    torch.testing.assert_close(v.ClipRatio()(clipped[:, 0]), v.ClipRatio()(clipped))
    assert v.SpectralFlatness(64)(torch.zeros(1, 1, 40)).isfinite().all()
    for bad in (torch.zeros(2, 3, 4, 5), torch.zeros(2, 2, 0), torch.zeros(2, 2, 9, dtype=torch.int16)):
        with pytest.raises(ValueError, match="'loudness' takes audio"):
            v.LoudnessTarget()(bad)


def test_a_still_video_is_smoothest_unless_motion_is_wanted():
    still = torch.full((1, 4, 3, 8, 8), 0.5)
    moving = still + torch.tensor([0.0, 0.1, 0.0, 0.1]).view(1, 4, 1, 1, 1)
    wild = still + torch.tensor([0.0, 0.4, 0.0, 0.4]).view(1, 4, 1, 1, 1)
    videos = torch.cat([still, moving, wild])
    torch.testing.assert_close(v.TemporalSmoothness()(videos), torch.tensor([0.0, -0.1, -0.4]))
    floored = v.TemporalSmoothness(motion_floor=0.1)(videos)
    assert floored.argmax() == 1
    with pytest.raises(ValueError, match="at least 2 frames, got 1"):
        v.TemporalSmoothness()(videos[:, :1])
    with pytest.raises(ValueError, match=r"takes video \(B, F, 3, H, W\), got \(3, 3, 8, 8\)"):
        v.TemporalSmoothness()(videos[:, 0])


def test_an_image_verifier_sees_first_middle_and_last_frame():
    videos = rearrange(pictures(10), "(b f) c h w -> b f c h w", b=2)
    scores = v.OnFrames(v.Contrast())(videos)
    by_hand = torch.stack([v.Contrast()(videos[:, i]) for i in (0, 2, 4)]).mean(dim=0)
    torch.testing.assert_close(scores, by_hand)
    torch.testing.assert_close(v.OnFrames(v.Contrast())(videos[:, 0]), v.Contrast()(videos[:, 0]))
    torch.testing.assert_close(
        v.OnFrames(v.Contrast(), frames=99)(videos), v.OnFrames(v.Contrast(), frames=None)(videos)
    )
    seen = []
    v.OnFrames(lambda s, prompts: seen.extend(prompts) or s.flatten(1).mean(1))(videos, ["a", "b"])
    assert seen == ["a"] * 3 + ["b"] * 3
    with pytest.raises(ValueError, match="scores a pool"):
        v.OnFrames([v.Contrast(), v.Sharpness()])


# -- CLIP


def test_clip_score_is_the_clamped_cosine_of_what_open_clip_encodes(clip):
    images, prompts = pictures(4, (32, 32)), ["a red cube", "a dog", "", "a red cube"]
    prompts[2] = "something else"
    mean, std = torch.tensor(open_clip.OPENAI_DATASET_MEAN), torch.tensor(open_clip.OPENAI_DATASET_STD)
    with torch.no_grad():
        seen = clip.encode_image((images - mean.view(3, 1, 1)) / std.view(3, 1, 1), normalize=True)
        read = clip.encode_text(open_clip.tokenize(prompts, context_length=20), normalize=True)
    cosine = (seen * read).sum(dim=1)
    scorer = v.CLIPScore(clip)
    torch.testing.assert_close(scorer(images, prompts), 2.5 * cosine.clamp(min=0))
    assert (v.CLIPScore(clip, scale=-1)(images, prompts) <= 0).all()
    with pytest.raises(ValueError, match="verifier 'clip' needs a text prompt"):
        scorer(images, None)


def test_clip_resizes_the_shorter_side_and_crops_the_centre(clip):
    wide = pictures(2, (32, 80))
    prepared = Preprocessing.of_clip(clip)
    torch.testing.assert_close(prepared(wide), prepared(wide[..., 24:56]))
    large = nn.functional.interpolate(pictures(1, (6, 9)), (64, 96), mode="bilinear")  # smooth: PIL clips overshoots
    by_pil = as_pil(large)[0].resize((48, 32), Image.Resampling.BICUBIC).crop((8, 0, 40, 32))
    mean, std = torch.tensor(open_clip.OPENAI_DATASET_MEAN), torch.tensor(open_clip.OPENAI_DATASET_STD)
    wanted = (torch.from_numpy(np.array(by_pil)).permute(2, 0, 1) / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    assert (prepared(large)[0] - wanted).abs().max() < 0.03  # PIL rounds to 8 bits, before division by std


def test_long_prompts_are_cut_with_a_warning_and_every_text_is_encoded_once(clip):
    calls = []
    hook = clip.transformer.register_forward_hook(lambda *_: calls.append(1))
    scorer, long = v.CLIPScore(clip), "word " * 40
    with pytest.warns(UserWarning, match="reads the first 20 tokens"):
        first = scorer(pictures(2, (32, 32)), long)
    assert scorer(pictures(2, (32, 32)), long).equal(first)
    assert len(calls) == 1
    hook.remove()


def test_clip_class_logit_is_open_clips_zero_shot_head(clip):
    classes = ["tench", "goldfish", "cat"]
    head = open_clip.build_zero_shot_classifier(
        clip,
        lambda texts: open_clip.tokenize(texts, context_length=20),
        classes,
        open_clip.OPENAI_IMAGENET_TEMPLATES,
    )
    images = pictures(3, (32, 32))
    verifier = v.CLIPClassLogit(clip, classes=classes)
    with torch.no_grad():
        logits = clip.logit_scale.exp() * clip.encode_image(Preprocessing.of_clip(clip)(images), normalize=True) @ head
    torch.testing.assert_close(verifier(images, [2, 0, "goldfish"]), logits[[0, 1, 2], [2, 0, 1]])
    torch.testing.assert_close(v.CLIPClassLogit(clip, classes=classes, target=1)(images), logits[:, 1])
    assert len(open_clip.OPENAI_IMAGENET_TEMPLATES) == 80
    for bad in (3, -1, None, 1.5, True):
        with pytest.raises(ValueError, match="an index below 3"):
            verifier(images, [bad] * 3)


def test_openai_weights_without_quickgelu_are_refused_and_unknown_names_name_the_closest():
    with pytest.raises(ValueError, match=r"trained with QuickGELU, .* name 'ViT-L-14-quickgelu'"):
        v.CLIPScore("ViT-L-14", pretrained="openai")
    with pytest.raises(ValueError, match="closest"):
        v.CLIPScore("ViT-L-15", pretrained="openai")
    with pytest.raises(ValueError, match="no weights 'opened'"):
        v.CLIPScore("ViT-B-32", pretrained="opened")
    with pytest.raises(ConnectionError, match="cannot be downloaded"):
        v.CLIPScore("ViT-L-14-quickgelu", pretrained="openai")
    with pytest.raises(TypeError, match="Linear is no open_clip model"):
        v.CLIPScore(nn.Linear(2, 2))


# -- learned preferences


@pytest.fixture
def aesthetic_state():
    generator = torch.Generator().manual_seed(3)
    widths = [16, 24, 12, 8, 4, 1]
    state = {}
    for index, rows, columns in zip((0, 2, 4, 6, 7), widths[1:], widths, strict=False):
        state[f"layers.{index}.weight"] = torch.randn(rows, columns, generator=generator)
        state[f"layers.{index}.bias"] = torch.randn(rows, generator=generator)
    return state


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_the_aesthetic_head_reads_the_published_names_and_is_linear_all_the_way(
    clip, aesthetic_state, tmp_path, suffix
):
    path = tmp_path / f"aesthetic-model{suffix}"
    save_file(aesthetic_state, path) if suffix == ".safetensors" else torch.save(aesthetic_state, path)
    verifier, images = v.Aesthetic(path, encoder=clip), pictures(3, (32, 32))
    verifier.head.train()  # dropout must not act, whoever switched it on
    verifier = v.Aesthetic(verifier.head, encoder=v.CLIPEncoder(clip))
    with torch.no_grad():
        x = clip.encode_image(Preprocessing.of_clip(clip)(images), normalize=True)
    for index in (0, 2, 4, 6, 7):
        x = x @ aesthetic_state[f"layers.{index}.weight"].T + aesthetic_state[f"layers.{index}.bias"]
    torch.testing.assert_close(verifier(images), x[:, 0])


def test_files_that_are_no_aesthetic_head_are_refused(aesthetic_state, tmp_path):
    del aesthetic_state["layers.4.weight"]
    save_file(aesthetic_state, tmp_path / "short.safetensors")
    with pytest.raises(ValueError, match="holds no aesthetic head"):
        v.AestheticHead.from_file(tmp_path / "short.safetensors")
    (tmp_path / "empty.pth").touch()
    with pytest.raises(ValueError, match="is empty"):
        v.AestheticHead.from_file(tmp_path / "empty.pth")
    published = v.AestheticHead()
    assert [name for name in published.state_dict() if name.endswith("weight")] == [
        f"layers.{i}.weight" for i in (0, 2, 4, 6, 7)
    ]
    assert [m.p for m in published.layers if isinstance(m, nn.Dropout)] == [0.2, 0.2, 0.1]


def test_a_reward_gets_pil_images_and_prompts_and_is_standardised():
    seen = []

    def reward(images, prompts):
        seen.extend(zip(images, prompts, strict=True))
        return [1.0, 3.0]

    verifier = v.PromptReward(reward, name="image_reward", mean=1.0, std=2.0)
    assert verifier(pictures(2), ["a", "b"]).tolist() == [0.0, 1.0]
    assert [prompt for _, prompt in seen] == ["a", "b"]
    assert all(isinstance(image, Image.Image) and image.size == (24, 20) for image, _ in seen)
    with pytest.raises(ValueError, match="'image_reward' needs a text prompt"):
        verifier(pictures(2), None)


def test_a_grader_asks_once_more_and_then_gives_nan():
    good = 'Here: ```json\n{"accuracy": 7, "overall": 8.5}\n```'
    answers = iter([good, "no idea", good, "{broken", '{"overall": 11}', '{"overall": "high"}', '{"other": 3}'])
    grader = v.VLMGrader(lambda image, question: next(answers))
    assert grader(pictures(2), ["a", "b"]).tolist() == [8.5, 8.5]
    with pytest.warns(UserWarning, match="no grade in two tries"):
        assert grader(pictures(2), ["a", "b"]).isnan().tolist() == [True, True]

    def down(image, question):
        raise ConnectionError("the service is down")

    with pytest.warns(UserWarning, match="ConnectionError: the service is down"):
        assert v.VLMGrader(down)(pictures(1), "a").isnan().all()


def test_a_grader_is_asked_about_the_prompt_and_its_aspects():
    questions = []
    grader = v.VLMGrader(lambda image, question: questions.append(question) or '{"overall": 3, "accuracy": 1}')
    grader(pictures(1), "a red cube")
    assert "'a red cube'" in questions[0]
    assert all(aspect in questions[0] for aspect in ("accuracy", "visual quality", "resonance", "overall"))
    assert grader.last[0]["accuracy"] == 1
    assert json.dumps(grader.last)


# -- classifiers and features


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(0)
    model = timm.create_model("test_vit", img_size=32, num_classes=4)
    model.pretrained_cfg = {
        **model.pretrained_cfg,
        "input_size": (3, 32, 32),
        "crop_pct": 1.0,
        "mean": (0.4, 0.5, 0.6),
        "std": (0.2, 0.3, 0.4),
        "label_names": ["ant", "bee", "cat", "dog"],
    }
    return model.train()


def test_class_scores_are_the_classifiers_own(classifier):
    images = pictures(4, (32, 32))
    with torch.no_grad():
        classifier.eval()
        pixels = (images - torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)) / torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
        logits = classifier(pixels)
        classifier.train()
    rows, wanted = torch.arange(4), torch.tensor([3, 0, 1, 1])
    picked = logits[rows, wanted]
    torch.testing.assert_close(v.ClassifierLogit(classifier, output="logit")(images, [3, 0, "bee", 1]), picked)
    log_prob = logits.log_softmax(dim=1)[rows, wanted]
    torch.testing.assert_close(v.ClassifierLogit(classifier)(images, [3, 0, 1, 1]), log_prob)
    torch.testing.assert_close(v.InceptionClassProb(classifier)(images, [3, 0, 1, 1]), log_prob.exp())
    torch.testing.assert_close(v.ClassifierLogit(classifier, target="cat")(images), logits.log_softmax(dim=1)[:, 2])
    assert classifier.training  # put back


def test_one_channel_classifiers_get_luma():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    model.pretrained_cfg = {"input_size": (1, 8, 8), "mean": (0.5,), "std": (0.5,), "crop_pct": 1.0}
    images = pictures(2, (8, 8))
    wanted = model((luma(images)[:, None] - 0.5) / 0.5).log_softmax(dim=1)[:, 1]
    torch.testing.assert_close(v.ClassifierLogit(model, target=1)(images), wanted.detach())
    grey = pictures(2, (8, 8), channels=1)
    wanted = model((grey - 0.5) / 0.5).log_softmax(dim=1)[:, 1]
    torch.testing.assert_close(v.ClassifierLogit(model, target=1)(grey), wanted.detach())


def test_preprocessing_follows_timms_evaluation_transform(classifier):
    cfg = {
        "input_size": (3, 32, 32),
        "crop_pct": 0.8,
        "interpolation": "bilinear",
        "mean": (0.5,) * 3,
        "std": (0.5,) * 3,
    }
    model = nn.Identity()
    model.pretrained_cfg = cfg
    transform = timm.data.create_transform(
        **{key: value for key, value in timm.data.resolve_data_config(pretrained_cfg=cfg).items() if key != "crop_mode"}
    )
    images = nn.functional.interpolate(pictures(2, (8, 10)), (50, 60), mode="bilinear")
    by_timm = torch.stack([transform(image) for image in as_pil(images)])
    assert (Preprocessing.of(model)(images) - by_timm).abs().max() < 0.03  # PIL works in 8 bits, doubled by std


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (4, "has classes 0 to 3, got 4"),
        (-1, "has classes 0 to 3, got -1"),
        ("cats", "knows no class 'cats'; closest: cat"),
        (None, "needs a class for every sample, got None"),
        (True, "needs a class for every sample, got True"),
    ],
)
def test_classes_that_are_not_there_are_refused(classifier, prompt, words):
    with pytest.raises(ValueError, match=words):
        v.ClassifierLogit(classifier)(pictures(1, (32, 32)), [prompt])


def test_models_that_are_no_classifiers_are_refused(classifier):
    with pytest.raises(ValueError, match=r"needs a classifier \(B, classes\)"):
        v.ClassifierLogit(nn.Identity(), target=0)(pictures(1))
    with pytest.raises(ValueError, match="output must be one of"):
        v.ClassifierLogit(classifier, output="loss")
    with pytest.raises(ValueError, match="closest"):
        v.ClassifierLogit("timm/test_vitt")


def test_nearest_features_of_a_reference_set(classifier):
    encoder = v.Encoder(classifier)
    reference = pictures(6, (32, 32), seed=5)
    with torch.no_grad():
        known, seen = encoder(reference), encoder(pictures(3, (32, 32)))
    distances = (seen[:, None] - known[None]).norm(dim=2).sort(dim=1).values
    torch.testing.assert_close(
        v.FeatureKNN(classifier, reference, k=2)(pictures(3, (32, 32))), -distances[:, :2].mean(dim=1)
    )
    assert v.FeatureKNN(classifier, known)(reference).abs().max() < 1e-4
    with pytest.raises(ValueError, match="k=7"):
        v.FeatureKNN(classifier, reference, k=7)
    with pytest.raises(ValueError, match="features have 64 entries, the reference 3"):
        v.FeatureKNN(classifier, torch.zeros(4, 3))(reference)


def test_linear_and_log_density_keep_float64_and_flatten():
    x = torch.randn(5, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    direction = torch.arange(6.0, dtype=torch.float64)
    torch.testing.assert_close(v.Linear(direction.view(2, 3))(x), x.flatten(1) @ direction, rtol=0, atol=1e-12)
    normal = torch.distributions.MultivariateNormal(torch.zeros(6).double(), torch.eye(6).double())
    torch.testing.assert_close(v.LogDensity(normal)(x), normal.log_prob(x.flatten(1)), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="'linear' has 5 weights for 6 numbers"):
        v.Linear([1.0] * 5)(x)


# -- FID


def test_frechet_distance_has_its_closed_forms():
    generator = torch.Generator().manual_seed(0)
    mean, factor = torch.randn(4, generator=generator).double(), torch.randn(4, 4, generator=generator).double()
    covariance = factor @ factor.T
    assert v.frechet_distance(mean, covariance, mean, covariance) == pytest.approx(0, abs=1e-9)
    assert v.frechet_distance(mean, covariance, mean + 2, covariance) == pytest.approx(16)
    a, b = torch.tensor([1.0, 4.0, 9.0, 0.0]), torch.tensor([4.0, 1.0, 1.0, 2.0])  # commuting: sum (sqrt a - sqrt b)^2
    wanted = (a.sqrt() - b.sqrt()).square().sum()
    assert v.frechet_distance(mean, a.diag(), mean, b.diag()) == pytest.approx(float(wanted), abs=1e-6)
    other = torch.randn(4, 4, generator=generator).double()
    product = covariance @ (other @ other.T)
    trace = covariance.trace() + (other @ other.T).trace() - 2 * torch.linalg.eigvals(product).sqrt().real.sum()
    assert v.frechet_distance(mean, covariance, mean, other @ other.T) == pytest.approx(float(trace))


def test_the_greedy_choice_is_the_one_that_lowers_fid_most():
    def encoder(images):
        return images.flatten(1)[:, :3]

    pool = pictures(40, (2, 2))
    mean, covariance = v.feature_statistics(encoder(pool))
    chooser = v.FIDGreedy(encoder, mean, covariance)
    chosen = []
    for slot in range(5):
        candidates = pool[slot * 6 : slot * 6 + 6]
        before = chooser.count
        scores = chooser(candidates)
        assert chooser.count == before  # looking does not touch
        if slot >= 1:
            sets = [torch.stack([*chosen, candidate]) for candidate in candidates]
            fids = [v.frechet_distance(mean, covariance, *v.feature_statistics(encoder(s))) for s in sets]
            torch.testing.assert_close(scores, -torch.tensor(fids).double(), rtol=1e-6, atol=1e-8)
        index = chooser.choose(candidates)
        assert index == int(scores.argmax())
        chosen.append(candidates[index])
    assert chooser.count == 5
    with pytest.raises(ValueError, match="features have 3 entries, the statistics 2"):
        v.FIDGreedy(encoder, torch.zeros(2), torch.eye(2))(pool)
