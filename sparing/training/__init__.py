"""Functions for training, no trainer: seeded sampling, readers, augmentation, optimizers, checkpoints, a loop."""

from sparing.training.augment import MixBatch, eval_transform, shift_and_flip, train_transform
from sparing.training.batches import Batch, BatchSource, FileBatches, MemoryBatches
from sparing.training.checkpoint import atomic_file, load_checkpoint, save_checkpoint, save_weights, write_json
from sparing.training.images import ImageSettings, image_batches
from sparing.training.loop import FitSettings, fit
from sparing.training.optim import build_optimizers, parameter_groups
from sparing.training.progress import progress
from sparing.training.readers import ImageSet, TensorImages, open_images, read_idx
from sparing.training.schedule import set_learning_rates, warmup_cosine
from sparing.training.seeding import epoch_order, sample_keys, seeded, uniforms

__all__ = [
    "Batch",
    "BatchSource",
    "FileBatches",
    "FitSettings",
    "ImageSet",
    "ImageSettings",
    "MemoryBatches",
    "MixBatch",
    "TensorImages",
    "atomic_file",
    "build_optimizers",
    "epoch_order",
    "eval_transform",
    "fit",
    "image_batches",
    "load_checkpoint",
    "open_images",
    "parameter_groups",
    "progress",
    "read_idx",
    "sample_keys",
    "save_checkpoint",
    "save_weights",
    "seeded",
    "set_learning_rates",
    "shift_and_flip",
    "train_transform",
    "uniforms",
    "warmup_cosine",
    "write_json",
]
