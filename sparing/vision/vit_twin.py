"""What the twins of a timm ViT share: how they are made of a live host, described, and rebuilt without it."""

import copy
from typing import Any, ClassVar, Self

from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from sparing.vision.vit_hosts import adopt, build_vit, check_vit, describe_vit, model_name
from sparing.zoo.twins import Twin

__all__ = ["ViTTwin"]


class ViTTwin(Twin, VisionTransformer):
    """A twin whose constructor takes a timm ViT over as it is (no copy) and keywords, its knobs.

    A subclass calls :meth:`take_over` in its constructor, keeps ``_knobs`` (or its own ``knobs``), and names in
    ``own_parts`` the modules and parameters that it adds to its host's. ``distilled`` is its form for distilled DeiTs,
    whose class has a second head.
    """

    own_parts: ClassVar[tuple[str, ...]] = ()
    distilled: ClassVar[type[VisionTransformerDistilled]]
    _knobs: dict[str, Any]

    def take_over(self, host: VisionTransformer) -> None:
        """Become ``host``: its modules and attributes, its name, and the licence of its weights."""
        adopt(self, host)
        config = getattr(host, "pretrained_cfg", None) or {}
        self.host_name = model_name(host)
        self.license = {"code": "apache-2.0", "weights": config.get("license"), "data": None}

    @classmethod
    def from_host(cls, host: nn.Module, **knobs: Any) -> Self:
        """The twin of a live host, from a copy of its modules; ``knobs`` are the constructor's keywords.

        Raises:
            TypeError: the host is no timm ViT.
            NotImplementedError: it is one of a kind that is not handled (block class and model are named).
            ValueError: a knob does not fit the host.
        """
        check_vit(host, method=cls.method)
        return cls.taking_over(copy.deepcopy(host), **knobs)  # type: ignore[arg-type]

    @classmethod
    def taking_over(cls, host: VisionTransformer, **knobs: Any) -> Self:
        """As ``from_host``, without the copy: the twin's modules are the host's, which is of no use afterwards."""
        kind: Any = cls.distilled if isinstance(host, VisionTransformerDistilled) else cls
        return kind(host, **knobs)  # type: ignore[no-any-return]

    @classmethod
    def why_not(cls, host: nn.Module) -> list[str]:
        """Reasons why the method does not apply to ``host``; empty when it does."""
        try:
            check_vit(host, method=cls.method)
        except (TypeError, NotImplementedError) as reason:
            return [str(reason)]
        return []

    @property
    def knobs(self) -> dict[str, Any]:
        """The constructor's keywords with every default resolved."""
        return dict(self._knobs)

    def twin_config(self) -> dict[str, Any]:
        """Knobs and the host's class and arguments.

        Raises:
            ValueError: the modules differ from what timm's constructor builds; the first difference is named.
        """
        return {"knobs": self.knobs, "host": {"name": self.host_name, **describe_vit(self, own=self.own_parts)}}

    @classmethod
    def from_twin_config(cls, config: dict[str, Any]) -> Self:
        """The architecture that ``twin_config`` described, with fresh weights."""
        knobs = dict(config["knobs"])
        if isinstance(knobs.get("num_tokens"), list):  # (rows, columns), as JSON has it
            knobs["num_tokens"] = tuple(knobs["num_tokens"])
        host = build_vit(config["host"])
        host.pretrained_cfg = host.default_cfg = dict(config.get("pretrained_cfg") or {})
        twin = cls.taking_over(host, **knobs)
        twin.license = config.get("license") or twin.license
        twin.host_name = config["host"].get("name", twin.host_name)
        return twin
