"""Tiny hosts with random, non-trivial weights."""

import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch import nn

from sparing.diffusion.flexdit import FlexDiTTransformer2DModel

LAYOUT = {"num_pooling": 1, "num_sdtm": 2, "sdtm_group": [1, 1, 1, 1], "num_dense_top": 1}


def randomise(model: nn.Module, seed: int = 0, std: float = 0.1) -> nn.Module:
    """Every parameter N(0, std): no zero-initialised layer hides an error."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model


def build_host(num_layers: int = 10, num_classes: int = 10, sample_size: int = 16, **kwargs) -> DiTTransformer2DModel:
    host = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=num_layers,
        sample_size=sample_size,
        num_embeds_ada_norm=num_classes,
        **kwargs,
    )
    randomise(host)
    for block in host.transformer_blocks[1:]:  # one embedder, stored once per block
        block.norm1.emb.load_state_dict(host.transformer_blocks[0].norm1.emb.state_dict())
    return host.eval()


def build_flexdit(seed: int = 0, **kwargs) -> FlexDiTTransformer2DModel:
    shape = {"num_attention_heads": 4, "attention_head_dim": 8, "num_layers": 10, "sample_size": 16}
    model = FlexDiTTransformer2DModel(**{**shape, "num_embeds_ada_norm": 10, **LAYOUT, **kwargs})
    return randomise(model, seed).eval()


def inputs(batch: int = 2, height: int = 16, width: int = 16, channels: int = 4, seed: int = 1):
    """Latents, timesteps (all different) and labels."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch, channels, height, width, generator=generator)
    timesteps = torch.linspace(30, 950, batch).long()
    return latents, timesteps, torch.arange(batch) % 10


@pytest.fixture
def host() -> DiTTransformer2DModel:
    return build_host()


@pytest.fixture
def flexdit() -> FlexDiTTransformer2DModel:
    return build_flexdit()
