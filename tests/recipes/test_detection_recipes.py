"""Detection recipes: scenes with true masks, data sets and their mistakes, training that resumes, drawn detections."""

import io
import json
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from typer.testing import CliRunner

from sparing.cli import app
from sparing.recipes.detection_data import DetectionBatches, open_detection
from sparing.recipes.emoji_scenes import GROUPS, emoji_scenes
from sparing.recipes.finetune_detection import finetune_detection, main, mean_average_precision
from sparing.training import FitSettings
from sparing.vision.detection import DetectorConfig, build_detector, load_detector

BACKBONE = {
    "embed_dim": 8, "depths": [1, 1, 6, 1], "num_heads": [1, 2, 4, 4], "mlp_ratio": 1.0, "dense": True,
    "layer_scale_init": 1.0,
}  # fmt: skip


def config(**changes):
    values = {
        "classes": list(GROUPS), "backbone": "stvit_r_swin_tiny_patch4_window7_224", "backbone_arguments": BACKBONE,
        "out_channels": 16, "min_size": 64, "max_size": 64,
    }  # fmt: skip
    return DetectorConfig(**{**values, **changes})


@pytest.fixture(scope="module")
def emoji(tmp_path_factory):
    """A tar as the Noto emoji come: discs of one colour a group instead of pictures."""
    path = tmp_path_factory.mktemp("emoji") / "discs.tar"
    with tarfile.open(path, "w") as archive:
        for number in range(10 * len(GROUPS)):
            picture = Image.new("RGBA", (32, 32))
            ImageDraw.Draw(picture).ellipse((2, 2, 30, 30), fill=(40 * (number % 5), 20 * (number // 10), 200, 255))
            buffer = io.BytesIO()
            picture.save(buffer, "PNG")
            label = json.dumps({"group": GROUPS[number % len(GROUPS)]}).encode()
            for kind, content in (("png", buffer.getvalue()), ("json", label)):
                member = tarfile.TarInfo(f"e{number:03d}.{kind}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture(scope="module")
def scenes(emoji, tmp_path_factory):
    return emoji_scenes(emoji, tmp_path_factory.mktemp("scenes") / "set", train=4, test=2, size=64)


def test_scenes_have_boxes_that_fit_their_masks_and_are_a_function_of_the_seed(emoji, scenes, tmp_path):
    data = open_detection(scenes, split="train")
    assert data.classes == list(GROUPS)
    for index in range(len(data)):
        image, target = data.sample(index)
        assert image.size == (64, 64)
        total = target["masks"].sum(0)
        assert total.max() == 1  # visible parts do not overlap
        for box, mask in zip(target["boxes"], target["masks"]):
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            assert box.tolist() == [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    again = emoji_scenes(emoji, tmp_path / "again", train=4, test=2, size=64)
    assert (again / "train.json").read_bytes() == (scenes / "train.json").read_bytes()
    other = emoji_scenes(emoji, tmp_path / "other", train=4, test=2, size=64, seed=1)
    assert (other / "train.json").read_bytes() != (scenes / "train.json").read_bytes()


def test_a_true_prediction_scores_one(scenes):
    data = DetectionBatches(open_detection(scenes, split="test"))

    class Oracle(torch.nn.Linear):
        config = config()
        place = 0

        def forward(self, images):
            _, target = data.load(self.place, None)
            self.place += 1
            masks = target["masks"][:, None].float()
            return [{**target, "masks": masks, "scores": torch.ones(len(masks))}]

    scores = mean_average_precision(Oracle(1, 1), data)
    assert scores["box_ap"] == scores["mask_ap"] == 1.0
    assert set(scores) == {"box_ap", "box_ap50", "box_ap75", "mask_ap", "mask_ap50", "mask_ap75"}


def test_flips_move_boxes_and_masks_together_and_depend_on_the_epoch_alone(scenes):
    data = DetectionBatches(open_detection(scenes, split="train"), seed=0)
    plain = data.load(0, None)
    seen = set()
    for epoch in range(8):
        image, target = data.load(0, epoch)
        flipped = not torch.equal(image, plain[0])
        seen.add(flipped)
        if flipped:
            assert torch.equal(image, plain[0].flip(2))
            assert torch.equal(target["masks"], plain[1]["masks"].flip(2))
            assert torch.equal(target["boxes"][:, 0], 64 - plain[1]["boxes"][:, 2])
        assert torch.equal(image, data.load(0, epoch)[0])
    assert seen == {True, False}


def test_a_run_that_was_stopped_goes_on_to_the_same_weights_and_detect_draws(scenes, tmp_path):
    settings = FitSettings(epochs=2, batch_size=2, lr=1e-3, checkpoint_every=1)
    whole = finetune_detection(config(), str(scenes), out=tmp_path / "whole", fit_settings=settings)

    class Stop(Exception):
        pass

    def stop(step):
        if step == 3:
            raise Stop

    with pytest.raises(Stop):
        finetune_detection(config(), str(scenes), out=tmp_path / "parts", fit_settings=settings, on_step=stop)
    parts = finetune_detection(config(), str(scenes), out=tmp_path / "parts", fit_settings=settings)
    first, second = (load_detector(tmp_path / name).state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert whole["box_ap"] == parts["box_ap"]
    assert (tmp_path / "whole" / "metrics.json").is_file()
    assert not (tmp_path / "whole" / "checkpoint.pt").exists()

    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    pictures = [str(p) for p in sorted((scenes / "images").glob("test_*"))]
    arguments = ["detect", *pictures, str(broken), "--weights", str(tmp_path / "whole"), "--threshold", "0"]
    report = tmp_path / "found.json"
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "drawn"), "--json", str(report)])
    assert result.exit_code == 2, result.output  # one picture could not be read, the others were drawn
    assert "backbone: stvit_r twin, status: trained" in result.output
    found = json.loads(report.read_text())
    assert [item["path"] for item in found] == pictures
    drawn = [np.asarray(Image.open(item["drawn"])) for item in found]
    assert all(d.shape == (64, 64, 3) for d in drawn)
    assert any((d != np.asarray(Image.open(p).convert("RGB"))).any() for d, p in zip(drawn, pictures))


def test_a_run_begins_from_another_detector_but_for_what_has_another_shape(scenes, tmp_path):
    settings = FitSettings(epochs=1, batch_size=2, lr=1e-3)
    finetune_detection(config(), str(scenes), out=tmp_path / "first", fit_settings=settings)
    folder = penn_fudan(tmp_path / "other")
    still = FitSettings(epochs=1, batch_size=2, lr=0.0)  # so that what it begins from is what it ends with
    pedestrians = config(classes=["pedestrian"])
    first = load_detector(tmp_path / "first").state_dict()
    torch.manual_seed(7)
    body = build_detector(pedestrians).backbone.body
    for name, backbone in (("whole", None), ("own_body", body)):
        start = tmp_path / "first"
        finetune_detection(
            pedestrians, str(folder), out=tmp_path / name, fit_settings=still, backbone=backbone, start=start
        )
        second = load_detector(tmp_path / name).state_dict()
        for key, value in second.items():
            if first[key].shape != value.shape:
                assert "predictor" in key
            elif name == "own_body" and key.startswith("backbone.body."):
                assert torch.equal(value, body.state_dict()[key.removeprefix("backbone.body.")]), key
            else:
                assert torch.equal(value, first[key]), key
    small = DetectorConfig(classes=["pedestrian"], backbone="timm/resnet10t", detector="fcos", out_channels=32)
    with pytest.raises(ValueError, match=r"nothing of the detector in .* fits"):
        finetune_detection(small, str(folder), out=tmp_path / "no", fit_settings=still, start=tmp_path / "first")


def voc(root, names=("000001", "000002"), image_set="train"):
    """The layout of VOCdevkit as torchvision reads it (VOC2012)."""
    base = root / "VOCdevkit" / "VOC2012"
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (base / folder).mkdir(parents=True, exist_ok=True)
    objects = [("dog", (4, 6, 20, 30)), ("person", (10, 2, 38, 44))]
    for name in names:
        Image.new("RGB", (40, 48), (90, 90, 90)).save(base / "JPEGImages" / f"{name}.jpg")
        boxes = "".join(
            f"<object><name>{kind}</name><bndbox><xmin>{box[0]}</xmin><ymin>{box[1]}</ymin><xmax>{box[2]}</xmax>"
            f"<ymax>{box[3]}</ymax></bndbox></object>"
            for kind, box in objects
        )
        (base / "Annotations" / f"{name}.xml").write_text(
            f"<annotation><filename>{name}.jpg</filename><size><width>40</width><height>48</height><depth>3</depth>"
            f"</size>{boxes}</annotation>"
        )
    (base / "ImageSets" / "Main" / f"{image_set}.txt").write_text("\n".join(names) + "\n")
    return root


def test_voc_is_read_through_torchvision_with_its_own_splits(tmp_path):
    voc(tmp_path)
    voc(tmp_path, names=("000003",), image_set="val")
    source = f"torchvision/VOCDetection@{tmp_path}"
    train, test = open_detection(source, split="train"), open_detection(source, split="test")
    assert (len(train), len(test), train.has_masks) == (2, 1, False)
    image, target = train.sample(1)
    assert (image.size, image.mode) == ((40, 48), "RGB")
    assert target["boxes"].tolist() == [[4, 6, 20, 30], [10, 2, 38, 44]]
    assert [train.classes[label - 1] for label in target["labels"]] == ["dog", "person"]
    batch = next(DetectionBatches(train).batches(torch.arange(2), batch_size=2, epoch=0))
    assert [sorted(labels) for labels in batch.labels] == [["boxes", "labels"]] * 2
    with pytest.raises(FileNotFoundError, match=r"VOCDetection@.*not found"):
        open_detection(f"torchvision/VOCDetection@{tmp_path / 'nowhere'}", split="train")


def test_a_tar_with_other_groups_is_refused_with_those_it_has(tmp_path):
    with tarfile.open(tmp_path / "other.tar", "w") as archive:
        for name, content in (("a.png", b""), ("a.json", b'{"group": "symbols"}')):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    with pytest.raises(ValueError, match=r"fewer than 5 emoji of group smileys & emotion, .* its groups are symbols"):
        emoji_scenes(tmp_path / "other.tar", tmp_path / "out", train=1, test=1, size=64)


# ---- bad input -------------------------------------------------------------------------------------------------------


def broken(scenes, tmp_path, change):
    """A copy of the training json after ``change``, beside the images."""
    content = json.loads((scenes / "train.json").read_text())
    change(content)
    (tmp_path / "images").symlink_to(scenes / "images")
    path = tmp_path / "train.json"
    path.write_text(json.dumps(content))
    return tmp_path


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda c: c["annotations"][0].pop("bbox"), ValueError, r"annotation 1 .* a mask without a box"),
        (
            lambda c: c["images"][0].update(file_name="gone.png"),
            FileNotFoundError,
            r"names the image 'gone.png', not there",
        ),
        (lambda c: c.update(images=[], annotations=[]), ValueError, "is empty: 0 images, 0 annotations"),
        (lambda c: c["annotations"][0].update(category_id=99), ValueError, r"class id 99, outside the 5 declared"),
        (lambda c: c["annotations"][0].update(image_id=77), ValueError, "names image 77, which the file does not list"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, -3, 4]), ValueError, "with positive sides"),
        (lambda c: c["annotations"][0].update(segmentation=[[1, 1, 2, 2]]), ValueError, "polygons of 3 or more points"),
        (lambda c: c["annotations"][0].update(segmentation={"counts": "a"}), ValueError, "run lengths with size"),
        (lambda c: c.pop("categories"), ValueError, "is no COCO instances file"),
    ],
)
def test_annotations_that_do_not_hold_are_named_before_training(scenes, tmp_path, change, error, message):
    with pytest.raises(error, match=message):
        open_detection(broken(scenes, tmp_path, change), split="train")


def test_boxes_without_area_are_left_out_and_counted(scenes, tmp_path):
    whole = open_detection(scenes, split="train")
    folder = broken(scenes, tmp_path, lambda c: c["annotations"][0].update(bbox=[1, 2, 0, 4]))
    with pytest.warns(UserWarning, match=r"1 boxes of zero width or height are left out \(annotation 1 first\)"):
        data = open_detection(folder, split="train")

    def count(given):
        return sum(len(given.sample(index)[1]["boxes"]) for index in range(len(given)))

    assert count(data) == count(whole) - 1


def penn_fudan(path, names=("A1", "A2", "A3", "A4", "A5"), masks=None):
    for name in names:
        (path / "images").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 48), (90, 90, 90)).save(path / "images" / f"{name}.jpg")
    for name in masks or names:
        (path / "masks").mkdir(parents=True, exist_ok=True)
        mask = np.zeros((48, 40), np.uint8)
        mask[4:20, 5:15], mask[10:30, 20:35] = 1, 2
        Image.fromarray(mask).save(path / "masks" / f"{name}_mask.png")
    return path


def test_penn_fudan_is_read_from_folder_and_zip_with_every_fifth_image_held_out(tmp_path):
    folder = penn_fudan(tmp_path / "PennFudanPed")
    with zipfile.ZipFile(tmp_path / "p.zip", "w") as archive:
        for file in sorted(folder.rglob("*.*")):
            archive.write(file, file.relative_to(tmp_path))
    for source in (folder, tmp_path / "p.zip"):
        train, test = open_detection(source, split="train"), open_detection(source, split="test")
        assert (len(train), len(test), train.classes) == (4, 1, ["pedestrian"])
        image, target = test.sample(0)
        assert image.size == (40, 48)
        assert target["boxes"].tolist() == [[5, 4, 15, 20], [20, 10, 35, 30]]
        assert target["masks"].shape == (2, 48, 40)
        assert target["labels"].tolist() == [1, 1]


def test_other_mistakes_are_named(tmp_path, scenes):
    with pytest.raises(FileNotFoundError, match="no data set at"):
        open_detection(tmp_path / "nowhere", split="train")
    with pytest.raises(ValueError, match="has no known layout"):
        open_detection(tmp_path, split="train")
    with pytest.raises(FileNotFoundError, match=r"the mask 'B9_mask.png' .* belongs to an image that is not there"):
        open_detection(penn_fudan(tmp_path / "m", masks=("A1", "B9")), split="train")
    with pytest.raises(ValueError, match="is empty: 1 pictures with masks give no test samples"):
        open_detection(penn_fudan(tmp_path / "e", names=("A1",)), split="test")
    with pytest.raises(ValueError, match=r"VOCDetection@ROOT is read"):
        open_detection("torchvision/CIFAR10@x", split="train")
    with pytest.raises(ValueError, match=r"the detector's classes are \['x'\], the data's"):
        finetune_detection(config(classes=["x"]), str(scenes), out=tmp_path / "o")
    assert main(["--data", str(tmp_path / "no"), "--out", str(tmp_path / "o"), "--backbone", "timm/resnet10t"]) == 2
    with pytest.raises(ValueError, match="31x40 pixels is too small"):
        build_detector(config()).backbone(torch.zeros(1, 3, 31, 40))


def test_masks_are_needed_where_masks_are_predicted(scenes, tmp_path):
    def without_masks(content):
        for item in content["annotations"]:
            item.pop("segmentation")

    folder = broken(scenes, tmp_path, without_masks)
    (folder / "test.json").write_text((folder / "train.json").read_text())
    with pytest.raises(ValueError, match=r"mask_rcnn needs masks, .* has boxes only"):
        finetune_detection(config(), str(folder), out=tmp_path / "o")
