"""The static table: every name of the zoo, the module that holds it, and what its card says.

It imports nothing, so listing models and printing cards loads neither torch nor a family. ``tests/zoo/test_table.py``
checks it against what the modules register. A family adds its names by calls of :func:`_add` at the end of this file,
its methods to ``METHODS``, and (denoisers, whose folders name a class instead of a method) its classes to
``CLASSES``.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from typing import Any, Literal

Loader = Literal["verified", "keys only", "untested"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What is known of one name before anything is imported.

    ``license_weights``, ``license_data`` and ``derived_from`` are those of the host for a twin that starts from its
    host. ``source`` says where weights of this very model come from: ``'shipped'`` (a file of this name in
    ``sparing/zoo/weights``), ``'hf:OWNER/REPO/FILE'``, or None when there are none. ``loader`` is 'verified' when
    published weights were loaded here and gave the published outputs, 'keys only' when nobody could load the real
    file here but names and shapes are covered by tests, 'untested' otherwise.
    """

    module: str
    task: str
    method: str | None = None
    host: str | None = None
    params: int | None = None
    license_code: str = "apache-2.0"
    license_weights: str | None = None
    license_data: str | None = None
    derived_from: str | None = None
    source: str | None = None
    loader: Loader = "untested"
    demo: bool = False
    notes: str = ""
    measured: Mapping[str, Any] = field(default_factory=dict)


MODELS: dict[str, Entry] = {}

# method -> 'module:Class'; the class meets the contract of sparing.zoo.twins.Twin
METHODS: dict[str, str] = {
    "stvit": "sparing.vision.stvit:SemanticTokenViT",
    "tome": "sparing.vision.tome:TokenMergingViT",
}

# diffusers-style class name (`_class_name` in config.json) -> 'module:Class'
CLASSES: dict[str, str] = {}

# method -> the paper that a card names
PAPERS: dict[str, str] = {
    "stvit": "Chang et al., Making Vision Transformers Efficient from A Token Sparsification View, CVPR 2023 "
    "(arXiv:2303.08685)",
    "tome": "Bolya et al., Token Merging: Your ViT But Faster, ICLR 2023 (arXiv:2210.09461)",
    "fmvit": "Tan et al., FMViT: A multiple-frequency mixing Vision Transformer, 2023 (arXiv:2311.05707); "
    "no code was published, ours is FMViT-style",
}


def _add(module: str, task: str, method: str | None, rows: Mapping[str, Mapping[str, Any]], **shared: Any) -> None:
    """Adds ``rows`` (name -> further fields of Entry) that share a module, a task, a method and the fields in
    ``shared``.
    """
    for name, row in rows.items():
        if name in MODELS:
            raise ValueError(f"{name!r} stands twice in the table")
        MODELS[name] = Entry(module=module, task=task, method=method, **{**shared, **row})


def find_entry(name: str) -> Entry:
    """The entry of a name; a bare name that has none of its own stands for its first tag.

    Raises:
        ValueError: the name is unknown; the message names the closest ones.
    """
    if name in MODELS:
        return MODELS[name]
    for tagged, entry in MODELS.items():
        if name == tagged.partition(".")[0]:
            return entry
    raise ValueError(
        f"unknown model {name!r}; {closest(name, MODELS) or 'see sparing.list_models()'}; "
        "hosts are named timm/NAME, torchvision/NAME, open_clip/NAME"
    )


def closest(name: str, known: Iterable[str], *, most: int = 4) -> str:
    """``'closest: a, b'`` for an unknown name, or ``''`` when nothing comes near; beginnings count as much as whole
    names.
    """

    def likeness(candidate: str) -> float:
        whole = SequenceMatcher(None, name, candidate)
        beginning = SequenceMatcher(None, name, candidate[: len(name)])
        return max(whole.ratio(), beginning.ratio() - 0.02)

    near = sorted(((likeness(candidate), candidate) for candidate in known), key=lambda pair: (-pair[0], pair[1]))
    names = [candidate for score, candidate in near[:most] if score >= 0.55]
    return f"closest: {', '.join(names)}" if names else ""


# -- vision: the small host of the demo and its twin, trained by benchmarks/fashion_table.py
_DEMO = {
    "license_weights": "apache-2.0",
    "license_data": "mit",
    "source": "shipped",
    "loader": "verified",
    "demo": True,
    "notes": "Fashion-MNIST, 28 x 28 grey",
}
_add(
    "sparing.vision.micro",
    "image-classification",
    None,
    {"vit_micro_patch4_28.demo_fashion": {"params": 902_218}},
    **_DEMO,
)
_add(
    "sparing.vision.micro",
    "image-classification",
    "stvit",
    {
        "stvit_vit_micro_patch4_28.demo_fashion": {
            "params": 904_330,
            "host": "vit_micro_patch4_28.demo_fashion",
        }
    },
    **_DEMO,
)

_IMAGENET = "ImageNet (terms of access: non-commercial research)"
_LAION = f"LAION-2B and {_IMAGENET}"
_WEBLI = "undisclosed (WebLI)"
_LVD = "undisclosed (LVD-142M)"
# timm host -> parameters of its STViT and of its ToMe twin, task, data of the host's published weights
_VIT_HOSTS: dict[str, tuple[int, int, str, str]] = {
    "deit_tiny_patch16_224": (5_722_984, 5_717_416, "image-classification", _IMAGENET),
    "deit_small_patch16_224": (22_061_800, 22_050_664, "image-classification", _IMAGENET),
    "deit_base_patch16_224": (86_589_928, 86_567_656, "image-classification", _IMAGENET),
    "deit_base_patch16_384": (86_907_112, 86_859_496, "image-classification", _IMAGENET),
    "deit_tiny_distilled_patch16_224": (5_916_368, 5_910_800, "image-classification", _IMAGENET),
    "deit_small_distilled_patch16_224": (22_447_568, 22_436_432, "image-classification", _IMAGENET),
    "deit_base_distilled_patch16_224": (87_360_464, 87_338_192, "image-classification", _IMAGENET),
    "deit3_small_patch16_224": (22_070_632, 22_059_496, "image-classification", _IMAGENET),
    "deit3_small_patch16_384": (22_229_224, 22_205_416, "image-classification", _IMAGENET),
    "deit3_base_patch16_224": (86_607_592, 86_585_320, "image-classification", _IMAGENET),
    "deit3_base_patch16_384": (86_924_776, 86_877_160, "image-classification", _IMAGENET),
    "deit3_large_patch16_224": (304_404_456, 304_374_760, "image-classification", _IMAGENET),
    "vit_small_patch16_224": (22_061_800, 22_050_664, "image-classification", _IMAGENET),
    "vit_small_patch16_384": (22_220_392, 22_196_584, "image-classification", _IMAGENET),
    "vit_base_patch16_224": (86_589_928, 86_567_656, "image-classification", _IMAGENET),
    "vit_base_patch16_384": (86_907_112, 86_859_496, "image-classification", _IMAGENET),
    "vit_large_patch16_224": (304_356_328, 304_326_632, "image-classification", _IMAGENET),
    "vit_large_patch16_384": (304_779_240, 304_715_752, "image-classification", _IMAGENET),
    "vit_base_patch16_clip_224": (86_590_696, 86_568_424, "image-classification", _LAION),
    "vit_base_patch16_clip_384": (86_907_880, 86_860_264, "image-classification", _LAION),
    "vit_large_patch14_clip_224": (304_243_688, 304_204_776, "image-classification", _LAION),
    "vit_base_patch16_siglip_224": (92_906_496, 92_884_224, "image-features", _WEBLI),
    "vit_base_patch16_siglip_384": (93_223_680, 93_176_064, "image-features", _WEBLI),
    "vit_large_patch16_siglip_256": (315_995_136, 315_956_224, "image-features", _WEBLI),
    "vit_so400m_patch14_siglip_384": (428_314_304, 428_225_600, "image-features", _WEBLI),
    "vit_so150m_patch16_reg4_gap_256": (134_158_440, 134_131_560, "image-classification", _IMAGENET),
    "vit_small_patch14_dinov2": (22_107_648, 22_056_192, "image-features", _LVD),
    "vit_base_patch14_dinov2": (86_682_624, 86_579_712, "image-features", _LVD),
    "vit_large_patch14_dinov2": (304_504_832, 304_367_616, "image-features", _LVD),
    "vit_small_patch14_reg4_dinov2": (22_108_800, 22_057_344, "image-features", _LVD),
    "vit_base_patch14_reg4_dinov2": (86_684_928, 86_582_016, "image-features", _LVD),
    "vit_large_patch14_reg4_dinov2": (304_507_904, 304_370_688, "image-features", _LVD),
}
for _column, _method in enumerate(("stvit", "tome")):
    for _host, _row in _VIT_HOSTS.items():
        _add(
            "sparing.vision.vit_twins",
            _row[2],
            _method,
            {f"{_method}_{_host}": {"host": f"timm/{_host}", "params": _row[_column]}},
            license_weights="apache-2.0",
            license_data=_row[3],
            derived_from=f"timm/{_host}",
        )

# -- vision: STViT-R on Swin. Published files load by name; none of them could be loaded here.
_STVIT_R_FILES = (
    "the published files, csncsn/STViT-R on the hub, are not fetched: download one and load it with "
    "sparing.vision.stvit_r.load_reference(model, FILE)"
)
_add(
    "sparing.vision.stvit_r",
    "image-classification",
    "stvit_r",
    {
        f"stvit_r_swin_{_size}_patch4_window7_224": {
            "host": f"timm/swin_{_size}_patch4_window7_224",
            "params": _params,
            "loader": _loader,
            "notes": _notes,
        }
        for _size, _params, _loader, _notes in (
            ("tiny", 28_320_214, "untested", "no weights of this size were published"),
            ("small", 49_625_518, "keys only", _STVIT_R_FILES),
            ("base", 87_812_336, "keys only", _STVIT_R_FILES),
        )
    },
)
METHODS["stvit_r"] = "sparing.vision.stvit_r:STViTR"
METHODS["stvit_r_vit"] = "sparing.vision.stvit_r_vit:DumbbellViT"
METHODS["stvit_swin"] = "sparing.vision.stvit_swin:STViTSwin"
PAPERS["stvit_r"] = PAPERS["stvit_r_vit"] = PAPERS["stvit_swin"] = PAPERS["stvit"]

# -- diffusion: FlexDiT. Only DiT-XL/2 is published as a dense host (its weights: CC-BY-NC); no FlexDiT weights are.
_XL = {"license_weights": "cc-by-nc-4.0", "license_data": _IMAGENET}
_add(
    "sparing.diffusion.flexdit_zoo",
    "class-conditional-generation",
    "flexdit",
    {
        "flexdit_s_2_256": {"params": 33160736},
        "flexdit_s_2_512": {"params": 33160736},
        "flexdit_b_2_256": {"params": 131496992},
        "flexdit_b_2_512": {"params": 131496992},
        "flexdit_l_2_256": {"params": 459939872},
        "flexdit_l_2_512": {"params": 459939872},
        "flexdit_xl_2_256": {
            "params": 682804256,
            "host": "facebook/DiT-XL-2-256",
            "derived_from": "facebook/DiT-XL-2-256",
            **_XL,
        },
        "flexdit_xl_2_512": {
            "params": 680147744,
            "host": "facebook/DiT-XL-2-512",
            "derived_from": "facebook/DiT-XL-2-512",
            **_XL,
        },
    },
    loader="keys only",
)
# the small pair in pixel space, trained by benchmarks/flexdit_quality.py
_add(
    "sparing.diffusion.micro",
    "class-conditional-generation",
    None,
    {"dit_micro_patch4_28.demo_fashion": {"params": 929_056}},
    **_DEMO,
)
_add(
    "sparing.diffusion.micro",
    "class-conditional-generation",
    "flexdit",
    {
        f"flexdit_dit_micro_patch4_28{_low}.demo_fashion": {
            "params": 937_376,
            "host": "dit_micro_patch4_28.demo_fashion",
        }
        for _low in ("", "_low")
    },
    **_DEMO,
)
METHODS["flexdit"] = "sparing.diffusion.flexdit:FlexDiTTransformer2DModel"
METHODS["flexdit_pixart"] = "sparing.diffusion.flexdit_pixart:FlexDiTPixArtTransformer2DModel"
METHODS["flexdit_video"] = "sparing.diffusion.flexdit_video:FlexDiTVideoTransformer3DModel"
for _method in ("flexdit", "flexdit_pixart", "flexdit_video"):
    CLASSES[METHODS[_method].partition(":")[2]] = METHODS[_method]
PAPERS["flexdit"] = (
    "Chang et al., SparseDiT: Token Sparsification for Efficient Diffusion Transformer (first version: FlexDiT), "
    "NeurIPS 2025 (arXiv:2412.06028)"
)
PAPERS["flexdit_pixart"] = PAPERS["flexdit_video"] = PAPERS["flexdit"]

# -- continual inference. Keys follow the published checkpoints; none of them could be loaded here.
_add(
    "sparing.continual.oadtr",
    "online-action-detection",
    "continual",
    {
        "co_oadtr_b1": {"params": 9469974},
        "co_oadtr_b2": {"params": 15768598},
        "co_oadtr_b3": {"params": 22067222, "loader": "untested", "notes": "deeper than any published network"},
    },
    loader="keys only",
)
_add("sparing.continual.oadtr", "audio-event-detection", "continual", {"co_audio_transformer": {"params": 613667}})
PAPERS["continual"] = (
    "Hedegaard and Iosifidis, Continual 3D Convolutional Neural Networks, ECCV 2022 (arXiv:2106.00050); Hedegaard et "
    "al., Continual Transformers, ICLR 2023 (arXiv:2201.06268)"
)
_add(
    "sparing.continual.x3d",
    "video-classification",
    "continual",
    {f"co_x3d_{_size}": {"params": 6153432 if _size == "l" else 3794322} for _size in ("xs", "s", "m", "l")},
    loader="keys only",
)
_add(
    "sparing.continual.resnet3d",
    "video-classification",
    "continual",
    {"co_slow_r50": {"params": 32454096}, "co_i3d_r50": {"params": 28043472}},
    loader="keys only",
)
_add(
    "sparing.continual.skeleton",
    "skeleton-action-recognition",
    "continual",
    {
        f"{_name}{_star}": {"params": _params}
        for _name, _params in (("co_st_gcn", 3141478), ("co_agcn", 3469510), ("co_s_tr", 3073345))
        for _star in ("", "_star")
    },
    loader="keys only",
)
METHODS["continual"] = "sparing.continual.twin:ContinualTwin"
# two small ones trained by recipes/train_clip.py and shipped
_add(
    "sparing.continual.spotter",
    "audio-event-detection",
    "continual",
    {"co_spotter_micro.demo_digits": {"params": 154843}},
    **{**_DEMO, "license_weights": "cc-by-sa-4.0", "license_data": "cc-by-sa-4.0", "notes": "spoken digits, 8 kHz"},
)
_add(
    "sparing.continual.x3d",
    "video-classification",
    "continual",
    {"co_x3d_micro.demo_motions": {"params": 166086}},
    **{**_DEMO, "license_data": "apache-2.0", "notes": "motions of emoji, 12 frames of 32 x 32"},
)
