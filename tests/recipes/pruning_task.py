"""A task of two classes and two small networks for the tests of ``adapt_pruned``."""

import torch
from torch import nn

from sparing.recipes.adapt_pruned import PruneSettings, adapt_pruned
from sparing.training import FitSettings, MemoryBatches, TensorImages

FIT = FitSettings(epochs=2, batch_size=8, lr=5e-3, fresh_lr_multiplier=2.0, warmup=0.0, checkpoint_every=2)
TWO_STAGES = PruneSettings(density=0.4, rank=2, stages=2, least=1)


def samples(count, seed):
    """Grey 12 x 12 images in which the brighter half names the class."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 60, (count, 1, 12, 12), dtype=torch.uint8, generator=generator)
    labels = torch.arange(count) % 2
    images[labels == 0, :, :6] += 150
    images[labels == 1, :, 6:] += 150
    return MemoryBatches(TensorImages(images, labels), mean=[0.4], std=[0.3])


DATA = (samples(40, 0), samples(20, 1))


def convolutions():
    torch.manual_seed(0)
    net = nn.Sequential()
    net.one = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3))
    net.two = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())
    net.head = nn.Linear(128, 2)
    return net


def linear():
    torch.manual_seed(0)
    net = nn.Sequential()
    net.body = nn.Sequential(nn.Flatten(), nn.Linear(144, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU())
    net.head = nn.Linear(8, 2)
    return net


def run(folder, settings, build=convolutions, *, data=DATA, fit_settings=FIT, head="head", **extra):
    return adapt_pruned(build(), data, out=folder, settings=settings, fit_settings=fit_settings, head=head, **extra)
