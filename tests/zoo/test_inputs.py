"""Inputs made for a model: of its own size, seeded, for denoisers by the names of their forward."""

import pytest
import timm
import torch

import sparing
from sparing.zoo.inputs import example_call, example_input

SHAPE = {"num_attention_heads": 2, "attention_head_dim": 4, "in_channels": 4, "num_layers": 1, "sample_size": 4}


def test_images_have_the_models_size_dtype_and_seed():
    model = timm.create_model("test_vit").bfloat16()
    images = example_input(model, batch=2)
    assert (images.shape, images.dtype) == ((2, 3, 160, 160), torch.bfloat16)
    assert torch.equal(images, example_input(model, batch=2))
    assert not torch.equal(images, example_input(model, batch=2, seed=1))


def test_a_size_that_a_fixed_model_cannot_take_is_refused():
    with pytest.raises(ValueError, match="takes 224 x 224 images only, got 96 x 96"):
        example_input(timm.create_model("deit_tiny_patch16_224"), image_size=96)
    assert example_input(timm.create_model("resnet18"), image_size=96).shape[-1] == 96


def _denoisers():
    from diffusers import DiTTransformer2DModel, LatteTransformer3DModel, PixArtTransformer2DModel

    shape = {**SHAPE, "out_channels": 8}
    return {
        "class": DiTTransformer2DModel(**SHAPE, num_embeds_ada_norm=10),
        "text": PixArtTransformer2DModel(**shape, caption_channels=6, cross_attention_dim=8),
        "text and size": PixArtTransformer2DModel(
            **{**shape, "attention_head_dim": 6},
            caption_channels=6,
            cross_attention_dim=12,
            use_additional_conditions=True,
        ),
        "video": LatteTransformer3DModel(
            **shape, patch_size=2, caption_channels=6, cross_attention_dim=8, video_length=3
        ),
    }


@pytest.mark.parametrize("kind", ["class", "text", "text and size", "video"])
def test_denoisers_are_measured_on_latents_of_their_own_size(kind):
    model = _denoisers()[kind]
    _, kwargs = example_call(model, batch=2)
    frames = (3,) if kind == "video" else ()
    assert kwargs["hidden_states"].shape == (2, 4, *frames, 4, 4)
    result = sparing.profile(model, repeats=1, warmup=0)
    assert result.flops == sparing.profile(model, kwargs=example_call(model)[1], measure=False).flops > 0
    assert result.batch_size == 1


def test_a_denoiser_and_its_twin_are_compared_side_by_side():
    result = sparing.compare({"dit": _denoisers()["class"], "again": _denoisers()["class"]}, repeats=1, warmup=0)
    assert result.rows[1].output_error > 0
    assert result.rows[1].flops_ratio == 1.0
