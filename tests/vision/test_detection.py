"""Backbones under torchvision's detectors: any image size, every detector, hosts and twins alike; saved and brought
back.
"""

import dataclasses

import pytest
import timm
import torch
from torch import nn
from torchvision.models.detection import RetinaNet
from torchvision.ops import FrozenBatchNorm2d

from sparing.vision.detection import (
    DetectorConfig,
    backbone_twin,
    build_detector,
    load_detector,
    save_detector,
    timm_fpn,
)
from sparing.vision.stvit import SemanticTokenViT
from sparing.vision.stvit_r import STViTR
from sparing.vision.stvit_r_vit import DumbbellViT

SWIN = {"embed_dim": 8, "depths": (1, 1, 6, 1), "num_heads": (1, 2, 4, 4), "mlp_ratio": 1.0, "num_classes": 5}


def swin() -> nn.Module:
    return timm.models.SwinTransformer(**SWIN)


def vit(**kwargs) -> nn.Module:
    sizes = {"img_size": 64, "patch_size": 16, "embed_dim": 16, "depth": 6, "num_heads": 2, "num_classes": 5}
    return timm.models.VisionTransformer(**{**sizes, **kwargs})


def swin_v2() -> nn.Module:
    model = timm.models.SwinTransformerV2(img_size=64, window_size=4, **SWIN)
    for name, parameter in model.named_parameters():
        if "norm1" in name or "norm2" in name:  # zeros at the start: every block would be the identity
            nn.init.normal_(parameter)
    return model


BACKBONES = {
    "dense STViT-R": lambda: STViTR(**SWIN, dense=True),
    "dense twin of Swin": lambda: STViTR.from_host(swin(), dense=True),
    "Swin host": swin,
    "Swin features_only": lambda: timm.create_model(
        "swin_tiny_patch4_window7_224", features_only=True, img_size=(96, 160)
    ),
    "Swin-V2": lambda: swin_v2(),
    "XCiT": lambda: timm.create_model("xcit_nano_12_p16_224", num_classes=0),
    "ResNet": lambda: timm.create_model("resnet10t", num_classes=3),
    "ViT host": vit,
    "ViT, patch 14": lambda: vit(img_size=56, patch_size=14),
    "STViT-R twin of a ViT": lambda: DumbbellViT.from_host(vit(), num_tokens=4),
}


@pytest.mark.parametrize("name", BACKBONES)
@torch.no_grad()
def test_every_backbone_gives_a_pyramid_of_equal_width_for_images_of_other_sizes(name):
    torch.manual_seed(0)
    host = BACKBONES[name]()
    before = {key: value.clone() for key, value in host.state_dict().items()}
    levels = (1, 2, 3, 4) if name == "ResNet" else (0, 1, 2, 3)
    backbone = timm_fpn(host, out_channels=16, levels=levels).eval()
    maps = backbone(torch.rand(2, 3, 96, 160))
    assert list(maps) == ["0", "1", "2", "3", "pool"]
    assert {m.shape[1] for m in maps.values()} == {16}
    if "patch 14" not in name:
        assert [tuple(maps[str(i)].shape[2:]) for i in range(4)] == [(24, 40), (12, 20), (6, 10), (3, 5)]
    assert all(
        torch.equal(before[key], value) for key, value in host.state_dict().items()
    )  # the user's model is untouched


@pytest.mark.parametrize("name", ["dense STViT-R", "Swin host", "Swin-V2", "STViT-R twin of a ViT"])
@torch.no_grad()
def test_an_image_alone_gives_what_it_gives_in_a_batch(name):
    torch.manual_seed(0)
    backbone = timm_fpn(BACKBONES[name](), out_channels=16).eval().double()
    images = torch.rand(3, 3, 64, 96, dtype=torch.float64)
    batch, alone = backbone(images), backbone(images[1:2])
    for level in batch:
        torch.testing.assert_close(alone[level], batch[level][1:2], atol=1e-9, rtol=0)


@pytest.mark.parametrize("detector", ["faster_rcnn", "mask_rcnn", "retinanet", "fcos"])
def test_g13_detectors_train_a_step_and_predict_on_images_of_different_sizes(detector):
    torch.manual_seed(0)
    config = DetectorConfig(["cat", "dog"], "none", detector=detector, out_channels=32, min_size=64, max_size=96)
    model = build_detector(config, STViTR(**SWIN, dense=True, layer_scale_init=1.0))
    images = [torch.rand(3, 50, 70), torch.rand(3, 90, 64)]
    targets = []
    for image in images:
        masks = torch.zeros(2, *image.shape[1:], dtype=torch.uint8)
        masks[0, 5:30, 5:30] = masks[1, 20:45, 10:60] = 1
        boxes = torch.tensor([[5.0, 5.0, 30.0, 30.0], [10.0, 20.0, 60.0, 45.0]])
        targets.append({"boxes": boxes, "labels": torch.tensor([1, 2]), "masks": masks})
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    before = model.backbone.body.layers[2].blocks[5].attn.q.weight.clone()
    loss = sum(model(images, targets).values())
    loss.backward()
    optimizer.step()
    assert torch.isfinite(loss)
    assert not torch.equal(before, model.backbone.body.layers[2].blocks[5].attn.q.weight)
    predictions = model.eval()(images)
    assert len(predictions) == 2
    assert all(p["boxes"].shape == (len(p["scores"]), 4) for p in predictions)
    if detector == "mask_rcnn":
        assert predictions[1]["masks"].shape[2:] == (90, 64)


def test_retinanet_gets_five_levels_for_its_five_anchor_sizes():
    model = build_detector(
        DetectorConfig(["a"], "unused", detector="retinanet", out_channels=8), STViTR(**SWIN, dense=True)
    )
    assert isinstance(model, RetinaNet)
    assert list(model.backbone(torch.rand(1, 3, 64, 64))) == ["0", "1", "2", "p6", "p7"]


def test_batch_norm_of_the_backbone_is_frozen_with_its_statistics_unless_asked_otherwise():
    host = STViTR(**SWIN, dense=True)
    host.patch_embed.proj[0].bn.running_mean.fill_(3.0)
    frozen = timm_fpn(host).body.patch_embed.proj[0].bn
    assert isinstance(frozen, FrozenBatchNorm2d)
    assert (frozen.running_mean == 3.0).all()
    free = timm_fpn(host, freeze_batch_norm=False).body.patch_embed.proj[0].bn
    assert isinstance(free, nn.BatchNorm2d)


@torch.no_grad()
def test_a_saved_detector_comes_back_with_its_twin_and_predicts_the_same(tmp_path):
    torch.manual_seed(0)
    arguments = {name: list(v) if isinstance(v, tuple) else v for name, v in SWIN.items()}
    config = DetectorConfig(
        ["cat"],
        "timm/swin_tiny_patch4_window7_224",
        backbone_arguments=arguments,
        twin="stvit_r",
        knobs={"dense": True},
        out_channels=8,
        min_size=64,
        max_size=64,
    )
    model = build_detector(config).eval()
    assert backbone_twin(model).status == "converted, not trained"
    backbone_twin(model).status = "trained"
    save_detector(model, tmp_path / "d")
    back = load_detector(tmp_path / "d")
    assert back.config == config
    assert backbone_twin(back).status == "trained"
    images = [torch.rand(3, 64, 64)]
    first, second = model(images)[0], back(images)[0]
    assert torch.equal(first["boxes"], second["boxes"])


def test_a_backbone_of_a_fixed_image_size_works_at_it_and_says_so_at_another():
    model = timm.create_model("mixer_s32_224", num_classes=0).eval()
    backbone = timm_fpn(model, out_channels=8).eval()
    assert list(backbone(torch.rand(1, 3, 224, 224))) == ["0", "1", "2", "3", "pool"]
    with pytest.raises(ValueError, match=r"MlpMixer was built for images of 224x224 and fails on 96x160 \(Input"):
        backbone(torch.rand(1, 3, 96, 160))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: STViTR(**SWIN), ValueError, "is a classifier: build it with dense=True"),
        (lambda: SemanticTokenViT.from_host(vit(), num_tokens=4), ValueError, "ends with a map of stride 32"),
        (lambda: nn.Linear(3, 3), TypeError, "Linear gives no intermediate maps"),
    ],
)
def test_models_without_full_maps_are_refused_with_the_reason(make, error, message):
    with pytest.raises(error, match=message):
        timm_fpn(make())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"detector": "yolo"}, "detector='yolo', accepted are 'faster_rcnn'"),
        ({"classes": []}, "needs the names of its classes"),
        ({"min_size": 16}, "32 <= min_size <= max_size, got 16"),
    ],
)
def test_configs_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        DetectorConfig(**{"classes": ["a"], "backbone": "b", **change})


def test_widths_and_keywords_of_the_heads_are_those_of_the_config(tmp_path):
    config = DetectorConfig(
        classes=["a", "b"], backbone="timm/resnet10t", out_channels=16, min_size=64, max_size=64, mask_channels=8,
        detector_arguments={"box_batch_size_per_image": 7, "box_detections_per_img": 3},
    )  # fmt: skip
    model = build_detector(config, timm_resnet := timm.create_model("resnet10t", num_classes=3)).eval()
    assert timm_resnet.num_classes == 3
    heads = model.roi_heads
    assert [m.out_channels for m in heads.mask_head.modules() if isinstance(m, nn.Conv2d)] == [8] * 4
    assert heads.mask_predictor.mask_fcn_logits.out_channels == 3
    assert (heads.fg_bg_sampler.batch_size_per_image, heads.detections_per_img) == (7, 3)
    back = load_detector(save_detector(model, tmp_path / "d"))
    assert back.config == config
    assert backbone_twin(back) is None
    with pytest.raises(ValueError, match=r"detector_arguments min_size, wrong are none of torchvision's MaskRCNN: it"):
        dataclasses.replace(config, detector_arguments={"wrong": 1, "box_nms_thresh": 0.5, "min_size": 32})
    with pytest.raises(ValueError, match="mask_channels=0, at least 1"):
        dataclasses.replace(config, mask_channels=0)


def test_a_folder_that_holds_no_detector_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no config"):
        load_detector(tmp_path)
    (tmp_path / "config.json").write_text('{"classes": 3}')
    with pytest.raises(ValueError, match="describes no detector"):
        load_detector(tmp_path)
