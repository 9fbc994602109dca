"""Augmentation of a batch equals augmentation one by one, and is a function of seed, epoch and index."""

import numpy as np
import pytest
import torch
from PIL import Image

from sparing.training import (
    FileBatches,
    ImageSet,
    MemoryBatches,
    MixBatch,
    TensorImages,
    eval_transform,
    shift_and_flip,
    train_transform,
    uniforms,
)


def _images(count: int = 12) -> torch.Tensor:
    return torch.randint(1, 256, (count, 2, 9, 7), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_a_batch_is_augmented_as_its_samples_alone():
    images, indices = _images(), torch.arange(12) * 5
    together = shift_and_flip(images, seed=1, epoch=2, indices=indices)
    for place in (0, 7, 11):
        alone = shift_and_flip(images[place : place + 1], seed=1, epoch=2, indices=indices[place : place + 1])
        assert torch.equal(alone[0], together[place])


def test_each_image_is_the_original_moved_and_perhaps_mirrored():
    images, indices = _images(40), torch.arange(40)
    results = shift_and_flip(images, seed=0, epoch=0, indices=indices, max_shift=2)
    draws = uniforms(0, 0, indices, count=3, stream=2)
    mirrored = 0
    for image, result, draw in zip(images, results, draws):
        down, right = (int(value) - 2 for value in (draw[:2] * 5).floor())
        source = image if draw[2] < 0.5 else image.flip(-1)
        mirrored += int(draw[2] >= 0.5)
        expected = torch.zeros_like(image)
        height, width = image.shape[-2:]
        for row in range(height):
            for column in range(width):
                if 0 <= row + down < height:
                    origin = column + right if draw[2] < 0.5 else column - right
                    if 0 <= origin < width:
                        expected[:, row, column] = source[:, row + down, origin]
        assert torch.equal(result, expected)
    assert 10 < mirrored < 30


def test_no_shift_and_no_flip_change_nothing():
    images = _images()
    assert torch.equal(
        shift_and_flip(images, seed=0, epoch=0, indices=torch.arange(12), max_shift=0, flip=False), images
    )


def test_memory_batches_normalise_and_keep_order():
    data = TensorImages(_images(), torch.arange(12))
    batches = list(
        MemoryBatches(data, mean=(0.5, 0.25), std=(0.5, 2.0)).batches(torch.tensor([3, 1, 2]), batch_size=2, epoch=0)
    )
    assert [batch.labels.tolist() for batch in batches] == [[3, 1], [2]]
    expected = (data.images[3].float() / 255 - torch.tensor([0.5, 0.25])[:, None, None]) / torch.tensor([0.5, 2.0])[
        :, None, None
    ]
    torch.testing.assert_close(batches[0].images[0], expected, atol=1e-6, rtol=0)


def _picture_set() -> ImageSet:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 40, 50, 3), dtype=np.uint8)
    return ImageSet(lambda index: (Image.fromarray(pixels[index]), index % 3), 6)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_file_transforms_are_seeded_by_sample_not_by_batch_or_worker(num_workers):
    transform = train_transform((16, 16), mean=(0.5,) * 3, std=(0.5,) * 3, rand_augment=2)
    sequential = FileBatches(_picture_set(), transform, seed=4)
    first = {}
    for batch in sequential.batches(torch.arange(6), batch_size=6, epoch=1):
        first = dict(zip(batch.indices.tolist(), batch.images))
    other = FileBatches(_picture_set(), transform, seed=4, num_workers=num_workers)
    for batch in other.batches(torch.tensor([5, 0, 3, 1, 4, 2]), batch_size=2, epoch=1):
        for index, image in zip(batch.indices.tolist(), batch.images):
            assert torch.equal(image, first[index])
    following = next(iter(sequential.batches(torch.arange(6), batch_size=6, epoch=2)))
    assert not torch.equal(following.images, torch.stack([first[index] for index in range(6)]))


def test_evaluation_resizes_crops_and_normalises():
    image = Image.fromarray(np.full((30, 60, 3), 255, dtype=np.uint8))
    result = eval_transform((16, 16), mean=(0.5,) * 3, std=(0.25,) * 3, crop_fraction=0.9)(image)
    assert result.shape == (3, 16, 16)
    torch.testing.assert_close(result, torch.full((3, 16, 16), 2.0))


@pytest.mark.parametrize("kind", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}])
def test_mixing_is_a_function_of_seed_epoch_and_first_sample(kind):
    images, labels = torch.rand(6, 1, 8, 8), torch.arange(6) % 3
    mix = MixBatch(3, **kind)
    one = mix(images, labels, seed=0, epoch=0, indices=torch.tensor([4, 1]))
    torch.rand(17)
    again = mix(images, labels, seed=0, epoch=0, indices=torch.tensor([4, 2]))
    assert torch.equal(one[0], again[0])
    assert torch.equal(one[1], again[1])
    torch.testing.assert_close(one[1].sum(-1), torch.ones(6))
    others = [mix(images, labels, seed=0, epoch=epoch, indices=torch.tensor([4]))[0] for epoch in range(1, 5)]
    assert any(not torch.equal(one[0], other) for other in others)


def test_mixing_nothing_is_refused():
    with pytest.raises(ValueError, match="mixup=0"):
        MixBatch(3)
