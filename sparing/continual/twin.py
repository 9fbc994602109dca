"""Continual inference as a method of the zoo: ``sparing.twin(clip_network, 'continual', pool_window=8)``.

The twin holds its continual network under ``network``, with the clip network's weights. Its status says what a step
is to the clip network: *exact* where nothing pads in time, so that a step equals the clip network on the last frames;
*training-free* where the clip network sees zeros at the borders of a clip and the stream sees frames; *converted, not
trained* where another function was asked for (``per_frame=True``). :class:`ContinualTwin` is also the form in which
trained clip networks are saved: :meth:`ContinualTwin.named`.
"""

import copy
from typing import Any, ClassVar, Literal, Self, cast

import torch
from torch import Tensor, nn

from sparing.continual.container import Chain, Part
from sparing.continual.convert import convert
from sparing.continual.module import Continual
from sparing.continual.place import check_plain
from sparing.zoo import hosts
from sparing.zoo.registry import create_model
from sparing.zoo.table import MODELS
from sparing.zoo.twins import Status, Twin

__all__ = ["ContinualTwin"]

_VIDEO_HOSTS = ("r3d_18", "mc3_18", "r2plus1d_18", "s3d")


class ContinualTwin(Chain, Twin, nn.Module):
    """A continual network with what is needed to save it and bring it back.

    Clips and frames are those of the network: ``forward`` (N, C, T, ...) to (N, classes, T'), ``step`` as
    :meth:`sparing.continual.Continual.step`.

    Args:
        network: any continual network.
        host: ``{"architecture": name, "arguments": {...}}`` from which the clip network is rebuilt; None when it
            cannot be, which :meth:`save_pretrained` then says.
        knobs: what the conversion was given.
        status: see the module.
    """

    method: ClassVar[str] = "continual"
    training: ClassVar[Literal["none", "required"]] = "none"  # type: ignore[assignment,misc]

    def __init__(
        self,
        network: Continual,
        *,
        host: dict[str, Any] | None = None,
        knobs: dict[str, Any] | None = None,
        status: Status | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.network = cast(Any, network)
        self.host, self._knobs = host, dict(knobs or {})
        self.status: Status = status or ("exact" if network.plan().equals_clip_of_last_frames else "training-free")
        self.pretrained_cfg = dict(getattr(network, "pretrained_cfg", None) or {})
        self.license = {"code": "apache-2.0", "weights": None, "data": None}

    @classmethod
    def named(cls, architecture: str, *, knobs: dict[str, Any] | None = None, **arguments: Any) -> Self:
        """The twin of a network by name, with fresh weights: a continual network of the zoo, or ``torchvision/NAME``.

        Args:
            architecture: the name.
            knobs: of the conversion (torchvision).
            arguments: of the network's entry point, as JSON values.

        Raises:
            ValueError: no such network, or one that does not run on streams.
        """
        network: Any = create_model(architecture, **arguments)
        knobs = dict(knobs or {})
        if not isinstance(network, Continual):
            network = convert(network, **knobs)
        return cls(network, host={"architecture": architecture, "arguments": arguments}, knobs=knobs)

    def parts(self) -> list[Part]:
        return [("network", self.network)]

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        """Clip mode, (N, C, T, ...); options are the network's own (``se``, ``start``)."""
        return self.network(x, **options)

    # ---- the contract of twins

    @property
    def knobs(self) -> dict[str, Any]:
        return dict(self._knobs)

    @classmethod
    def why_not(cls, host: nn.Module) -> list[str]:
        """The module that has no continual form, by path, and the fix; sizes that knobs decide count as given."""
        if isinstance(host, Continual):
            return []
        try:
            check_plain(host)
            convert(_without_memory(host), pool_window=1, sequence_len=1, per_frame=True)
        except (ValueError, TypeError) as error:
            return [str(error)]
        return []

    @classmethod
    def from_host(  # type: ignore[override]
        cls,
        host: nn.Module,
        *,
        pool_window: int | None = None,
        sequence_len: int | None = None,
        per_frame: bool = False,
    ) -> Self:
        """The twin of a live clip network; see :func:`sparing.continual.convert` for the knobs.

        Raises:
            ValueError: a module without continual form, by path and with the fix; or a knob that the network needs.
        """
        given: dict[str, Any] = {"pool_window": pool_window, "sequence_len": sequence_len, "per_frame": per_frame}
        knobs: dict[str, Any] = {name: value for name, value in given.items() if value not in (None, False)}
        if isinstance(host, Continual):
            if knobs:
                raise ValueError(f"{type(host).__name__} is continual already and takes no {', '.join(knobs)}")
            return cls(copy.deepcopy(host))
        network = convert(host, **knobs)
        status: Status | None = "converted, not trained" if per_frame else None
        return cls(network, host=_described(host), knobs=knobs, status=status)

    def twin_config(self) -> dict[str, Any]:
        if self.host is None:
            raise ValueError(
                "this network cannot be rebuilt by name (it is no stock network, or was changed): save its "
                "state_dict, or build a stock one with ContinualTwin.named(NAME, ...) and load_state_dict before saving"
            )
        return {"knobs": self.knobs, "host": self.host}

    @classmethod
    def from_twin_config(cls, config: dict[str, Any]) -> Self:
        host = config["host"]
        twin = cls.named(host["architecture"], knobs=config["knobs"], **host["arguments"])
        twin.pretrained_cfg = config.get("pretrained_cfg") or {}
        twin.license = config.get("license") or twin.license
        return twin


def _without_memory(module: nn.Module) -> nn.Module:
    """A deep copy on the meta device: structure without weights."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach().to("meta")) for p in module.parameters()}
    memo |= {id(b): torch.empty_like(b, device="meta") for b in module.buffers()}
    return copy.deepcopy(module, memo)


def _described(host: nn.Module) -> dict[str, Any] | None:
    """By which name of torchvision a live video network can be rebuilt, None when by none: every layer must be built
    as the stock one is (strides, epsilons, ...), not only hold weights of its shape.
    """
    if not type(host).__module__.startswith("torchvision.models.video"):
        return None
    have = {name: tuple(tensor.shape) for name, tensor in host.state_dict().items()}
    classes = next(reversed(have.values()))[0]  # the last entry is the bias of the classifier
    for name in _VIDEO_HOSTS:
        with torch.device("meta"):
            candidate = hosts.create_host(f"torchvision/{name}", num_classes=classes)
        same_weights = {key: tuple(tensor.shape) for key, tensor in candidate.state_dict().items()} == have
        if same_weights and repr(candidate) == repr(host):
            return {"architecture": f"torchvision/{name}", "arguments": {"num_classes": classes}}
    return None


def known_networks() -> list[str]:
    """Names of the zoo's continual networks."""
    return sorted({name.partition(".")[0] for name, entry in MODELS.items() if entry.method == "continual"})
