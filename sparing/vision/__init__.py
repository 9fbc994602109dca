"""Vision: STViT, STViT-R and ToMe twins of timm ViTs and Swins. Importing it registers their names with timm."""

from sparing.vision import micro as micro
from sparing.vision import vit_twins as vit_twins
from sparing.vision.stvit import SemanticTokenViT
from sparing.vision.stvit_r import STViTR
from sparing.vision.stvit_r_vit import DumbbellViT
from sparing.vision.stvit_swin import STViTSwin
from sparing.vision.tome import TokenMergingViT

__all__ = ["DumbbellViT", "STViTR", "STViTSwin", "SemanticTokenViT", "TokenMergingViT"]
