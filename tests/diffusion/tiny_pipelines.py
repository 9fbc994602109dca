"""Tiny random diffusers pipelines of every kind that a search meets; text comes as embeddings or from a toy encoder."""

import json

import torch
from diffusers import (
    AudioLDMPipeline,
    AutoencoderKL,
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)

LATENT_VAE = {"block_out_channels": (8,), "norm_num_groups": 4, "latent_channels": 4, "sample_size": 16}


def _rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _unet(**kwargs):
    return UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        **kwargs,
    ).eval()


def _text_unet(cross_attention_dim=16, **kwargs):
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=cross_attention_dim,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        **kwargs,
    ).eval()


def dit(scheduler=None):
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=1000,
    )
    pipe = DiTPipeline(transformer.eval(), AutoencoderKL(**LATENT_VAE).eval(), scheduler or DDIMScheduler())
    return pipe, {"class_labels": [3]}


def ddpm(scheduler=None):
    return DDPMPipeline(_unet(), scheduler or DDPMScheduler()), {}


def ddim(scheduler=None):
    return DDIMPipeline(_unet(), scheduler or DDIMScheduler()), {}


def consistency(scheduler=None):
    kind = scheduler or CMStochasticIterativeScheduler(num_train_timesteps=40, sigma_min=0.002, sigma_max=80.0)
    return ConsistencyModelPipeline(_unet(), kind), {}


def flux(scheduler=None):
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=[4, 4, 8],
    )
    pipe = FluxPipeline(
        scheduler or FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        AutoencoderKL(shift_factor=0.1, **LATENT_VAE).eval(),
        *[None] * 4,
        transformer.eval(),
    )
    kwargs = {"prompt_embeds": _rand(1, 5, 16), "pooled_prompt_embeds": _rand(1, 16), "height": 8, "width": 8}
    return pipe, kwargs


def stable_diffusion(scheduler=None):
    vae = AutoencoderKL(**LATENT_VAE).eval()
    pipe = StableDiffusionPipeline(
        vae, None, None, _text_unet(), scheduler or DDIMScheduler(), None, None, requires_safety_checker=False
    )
    return pipe, {"prompt_embeds": _rand(1, 5, 16), "negative_prompt_embeds": _rand(1, 5, 16, seed=1)}


def toy_tokenizer(folder):
    """A CLIP tokenizer of single letters."""
    from transformers import CLIPTokenizer

    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    words = ["ab", *letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=8)


def prompted(folder, scheduler=None):
    """Stable Diffusion with a real (tiny, random) CLIP text encoder."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
        bos_token_id=53,
        eos_token_id=54,
    )
    pipe, _ = stable_diffusion(scheduler)
    pipe.register_modules(text_encoder=CLIPTextModel(config).eval(), tokenizer=toy_tokenizer(folder))
    return pipe


def pixart(scheduler=None):
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        sample_size=8,
        cross_attention_dim=16,
        caption_channels=16,
        use_additional_conditions=False,
    )
    kind = scheduler or DPMSolverMultistepScheduler()
    pipe = PixArtSigmaPipeline(None, None, AutoencoderKL(**LATENT_VAE).eval(), transformer.eval(), kind)
    kwargs = {
        "prompt_embeds": _rand(1, 5, 16),
        "prompt_attention_mask": torch.ones(1, 5),
        "negative_prompt_embeds": _rand(1, 5, 16, seed=1),
        "negative_prompt_attention_mask": torch.ones(1, 5),
        "negative_prompt": None,
        "use_resolution_binning": False,
        "height": 8,
        "width": 8,
    }
    return pipe, kwargs


def wan(scheduler=None):
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=1,
        cross_attn_norm=True,
        rope_max_seq_len=32,
    )
    vae = AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    kind = scheduler or UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipe = WanPipeline(None, None, vae.eval(), kind, transformer.eval())
    kwargs = {
        "prompt_embeds": _rand(1, 5, 16),
        "negative_prompt_embeds": _rand(1, 5, 16, seed=1),
        "max_sequence_length": 5,
    }
    return pipe, {**kwargs, "height": 16, "width": 16, "num_frames": 5}


def ltx(scheduler=None):
    transformer = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        patch_size=1,
        patch_size_t=1,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=1,
        caption_channels=16,
    )
    vae = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False, False, False, False, False),
        upsample_residual=(False, False, False, False),
        upsample_factor=(1, 1, 1, 1),
        timestep_conditioning=False,
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    )
    vae.use_framewise_encoding = vae.use_framewise_decoding = False
    pipe = LTXPipeline(scheduler or FlowMatchEulerDiscreteScheduler(), vae.eval(), None, None, transformer.eval())
    kwargs = {
        "prompt_embeds": _rand(1, 5, 16),
        "prompt_attention_mask": torch.ones(1, 5),
        "negative_prompt_embeds": _rand(1, 5, 16, seed=1),
        "negative_prompt_attention_mask": torch.ones(1, 5),
    }
    return pipe, {**kwargs, "height": 32, "width": 32, "num_frames": 9}


def audio_ldm(scheduler=None):
    from transformers import ClapTextConfig, ClapTextModelWithProjection, SpeechT5HifiGan, SpeechT5HifiGanConfig

    projected = {"class_embed_type": "simple_projection", "projection_class_embeddings_input_dim": 16}
    unet = _text_unet((8, 16), class_embeddings_concat=True, **projected)  # it has no text tokens to attend to
    vae = AutoencoderKL(in_channels=1, out_channels=1, **LATENT_VAE).eval()
    vocoder = SpeechT5HifiGan(
        SpeechT5HifiGanConfig(
            model_in_dim=8,
            sampling_rate=16000,
            upsample_initial_channel=16,
            upsample_rates=[2, 2],
            upsample_kernel_sizes=[4, 4],
            resblock_kernel_sizes=[3],
            resblock_dilation_sizes=[[1]],
            normalize_before=False,
        )
    ).eval()
    text = ClapTextConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        projection_dim=16,
        max_position_embeddings=16,
    )
    encoder = ClapTextModelWithProjection(text).eval()
    pipe = AudioLDMPipeline(vae, encoder, None, unet, scheduler or DDIMScheduler(), vocoder)
    kwargs = {"prompt_embeds": _rand(1, 16), "negative_prompt_embeds": _rand(1, 16, seed=1)}
    return pipe, {**kwargs, "audio_length_in_s": 0.004}


def euler_stable_diffusion():
    return stable_diffusion(EulerDiscreteScheduler())


ALL = {
    "dit": dit,
    "ddpm": ddpm,
    "ddim": ddim,
    "consistency": consistency,
    "flux": flux,
    "sd": stable_diffusion,
    "sd-euler": euler_stable_diffusion,
    "pixart": pixart,
    "wan": wan,
    "ltx": ltx,
    "audioldm": audio_ldm,
}


def build(name):
    torch.manual_seed(0)
    return ALL[name]()


def build_with(name, scheduler):
    pipe, kwargs = build(name)
    pipe.scheduler = scheduler
    return pipe, kwargs
