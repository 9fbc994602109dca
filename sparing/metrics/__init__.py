"""Metrics that torchmetrics and pycocotools do not have, and the few that need no library."""

from sparing.metrics.classification import Agreement, agreement, top1

__all__ = ["Agreement", "agreement", "top1"]
