"""Every kind of source, and one clear error for every kind of damage."""

import gzip
import io
import json
import struct
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from sparing.training import ImageSet, TensorImages, open_images, read_idx


def _idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def _picture(value: int, size: tuple[int, int] = (6, 4)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (value, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def _write_idx(folder, *, count: int = 5, name: str = "train", suffix: str = ".gz"):
    images = np.arange(count * 12, dtype=np.uint8).reshape(count, 3, 4)
    pack = gzip.compress if suffix else bytes
    (folder / f"{name}-images-idx3-ubyte{suffix}").write_bytes(pack(_idx(images)))
    (folder / f"{name}-labels-idx1-ubyte{suffix}").write_bytes(pack(_idx(np.arange(count, dtype=np.uint8))))
    return images


@pytest.mark.parametrize("suffix", [".gz", ""])
@pytest.mark.parametrize("channels", [1, 3])
def test_idx_files_come_as_one_tensor(tmp_path, suffix, channels):
    expected = _write_idx(tmp_path, suffix=suffix)
    data = open_images(str(tmp_path), channels=channels)
    assert isinstance(data, TensorImages)
    assert data.images.shape == (5, channels, 3, 4)
    assert np.array_equal(data.images[:, -1].numpy(), expected)
    assert data.labels.tolist() == [0, 1, 2, 3, 4]


def test_the_test_split_of_idx_files_has_its_own_name(tmp_path):
    _write_idx(tmp_path, count=5)
    _write_idx(tmp_path, count=2, name="t10k")
    assert len(open_images(str(tmp_path), split="test", channels=1)) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an idx file"),
        (b"\x00\x00\x0d\x01" + b"\x00" * 8, "not an idx file"),
        (b"\x00\x00\x08\x03\x00\x00", "ends inside its idx header"),
        (_idx(np.zeros((2, 3), np.uint8))[:-1], "announces"),
        (_idx(np.zeros((2, 3), np.uint8)) + b"1", "announces"),
        (gzip.compress(_idx(np.zeros((2, 3), np.uint8)), mtime=0)[:-6], "not a whole gzip file"),
    ],
)
def test_damaged_idx_files_are_refused(tmp_path, content, message):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_idx(path)


def test_labels_that_do_not_go_with_the_images_are_refused(tmp_path):
    _write_idx(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(_idx(np.zeros(4, np.uint8))))
    with pytest.raises(ValueError, match="4 labels"):
        open_images(str(tmp_path), channels=1)


def _tree(root, split="train"):
    for number, name in enumerate(["cat", "ant", "bee"]):
        folder = root / split / name
        folder.mkdir(parents=True)
        (folder / "1.png").write_bytes(_picture(number))
    return root


def test_a_folder_a_class(tmp_path):
    data = open_images(str(_tree(tmp_path)))
    assert isinstance(data, ImageSet)
    assert data.class_names == ("ant", "bee", "cat")
    image, label = data.read(2)
    assert (image.mode, image.size, label, image.getpixel((0, 0))) == ("RGB", (6, 4), 2, (0, 0, 0))
    assert open_images(str(tmp_path), channels=1).read(0)[0].mode == "L"


@pytest.mark.parametrize("split_name", ["test", "val", "validation"])
def test_the_test_split_may_be_called_validation(tmp_path, split_name):
    _tree(tmp_path, split=split_name)
    assert len(open_images(str(tmp_path), split="test")) == 3


def test_a_missing_test_split_is_not_replaced_by_the_training_images(tmp_path):
    with pytest.raises(ValueError, match="has a folder 'train' but none"):
        open_images(str(_tree(tmp_path)), split="test")


def test_any_folder_serves_without_labels(tmp_path):
    _tree(tmp_path)
    (tmp_path / "train" / "loose.PNG").write_bytes(_picture(9))
    data = open_images(str(tmp_path / "train"), labelled=False)
    assert len(data) == 4
    assert {data.read(index)[1] for index in range(4)} == {-1}
    with pytest.raises(ValueError, match=r"loose.PNG lies outside a class folder"):
        open_images(str(tmp_path / "train"))


def test_missing_and_empty_sources_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        open_images(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="holds no images"):
        open_images(str(tmp_path))
    with pytest.raises(ValueError, match="'dev'"):
        open_images(str(tmp_path), split="dev")
    with pytest.raises(ValueError, match="channels must be 1 or 3, got 4"):
        open_images(str(tmp_path), channels=4)


@pytest.mark.parametrize("content", [b"", b"no image", _picture(1)[:-28]])
def test_an_unreadable_image_is_named(tmp_path, content):
    (tmp_path / "broken.png").write_bytes(content)
    data = open_images(str(tmp_path), labelled=False)
    with pytest.raises(ValueError, match=r"broken.png is not a readable image"):
        data.read(0)


def _shard(path, samples):
    with tarfile.open(path, "w") as archive:
        for name, content in samples:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def test_webdataset_shards_are_read_in_any_order(tmp_path):
    for shard in range(2):
        _shard(
            tmp_path / f"part-{shard:03d}.tar",
            [
                entry
                for key in range(3)
                for entry in [
                    (f"a/{key:02d}.png", _picture(10 * shard + key)),
                    (f"a/{key:02d}.cls", str(key).encode())
                    if shard
                    else (f"a/{key:02d}.json", json.dumps({"label": key}).encode()),
                ]
            ],
        )
    for pattern in ("part-{000..001}.tar", "part-*.tar"):
        data = open_images(str(tmp_path / pattern))
        assert len(data) == 6
        found = [(data.read(index)[0].getpixel((0, 0))[0], data.read(index)[1]) for index in (5, 0, 4)]
        assert found == [(12, 2), (0, 0), (11, 1)]
        assert data.class_names == ("0", "1", "2")


def test_webdataset_errors_name_shard_and_sample(tmp_path):
    path = tmp_path / "a.tar"
    _shard(path, [("x.png", _picture(1))])
    assert len(open_images(str(path), labelled=False)) == 1
    with pytest.raises(ValueError, match=r"a.tar:/x has no label"):
        open_images(str(path))
    with pytest.raises(FileNotFoundError, match=r"b-1.tar"):
        open_images(str(tmp_path / "b-{0..1}.tar").replace("{0", "{1"))
    with pytest.raises(ValueError, match=r"FIRST..LAST"):
        open_images(str(tmp_path / "b-{x}.tar"))
    path.write_bytes(b"not a tar")
    with pytest.raises(ValueError, match="not a whole tar file"):
        open_images(str(path))
    _shard(path, [("x.txt", b"words")])
    with pytest.raises(ValueError, match="holds no images"):
        open_images(str(path))


def test_torchvision_sets_are_opened_from_disk(tmp_path):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for name, count in (("train", 4), ("t10k", 2)):
        (raw / f"{name}-images-idx3-ubyte").write_bytes(_idx(np.full((count, 28, 28), 7, np.uint8)))
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(_idx(np.arange(count, dtype=np.uint8)))
    data = open_images(f"torchvision/FashionMNIST@{tmp_path}", split="test", channels=1)
    image, label = data.read(1)
    assert (len(data), image.mode, image.getpixel((3, 3)), label) == (2, "L", 7, 1)
    assert data.class_names[0] == "T-shirt/top"
    with pytest.raises(FileNotFoundError, match="not found"):
        open_images(f"torchvision/KMNIST@{tmp_path}")
    with pytest.raises(ValueError, match=r"torchvision/NAME@ROOT"):
        open_images("torchvision/NoSuchSet@x")


def test_labels_are_int64(tmp_path):
    _write_idx(tmp_path)
    assert open_images(str(tmp_path), channels=1).labels.dtype == torch.int64
