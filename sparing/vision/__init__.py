"""Vision: STViT and ToMe twins of timm ViTs. Importing this package registers their names with timm."""

from sparing.vision import micro as micro
from sparing.vision import vit_twins as vit_twins
from sparing.vision.stvit import SemanticTokenViT
from sparing.vision.tome import TokenMergingViT

__all__ = ["SemanticTokenViT", "TokenMergingViT"]
