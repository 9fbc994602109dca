"""A host and a method small enough to see through: the toy twin computes what its host computes."""

from typing import Any

from torch import Tensor, nn

from sparing.zoo.twins import Twin


class ToyHost(nn.Module):
    """``(batch, 1, 4, 4)`` images to ``(batch, classes)`` logits; the second layer is tied to the third."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(16, 8)
        self.second = nn.Linear(8, 8)
        self.third = nn.Linear(8, 8)
        self.third.weight = self.second.weight
        self.head = nn.Linear(8, classes)
        self.pretrained_cfg = {"input_size": (1, 4, 4), "mean": (0.5,), "std": (0.5,), "custom_load": None}

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.third(self.second(self.first(images.flatten(1)).relu()).relu()))


class ToyTwin(ToyHost, Twin):
    method = "toy"
    training = "none"

    def __init__(self, classes: int = 3, strength: float = 0.5) -> None:
        super().__init__(classes)
        self.strength = strength
        self.status = "training-free"
        self.license = {"code": "apache-2.0", "weights": "mit", "data": None}

    @property
    def knobs(self) -> dict[str, Any]:
        return {"strength": self.strength}

    @classmethod
    def why_not(cls, host: nn.Module) -> list[str]:
        return [] if isinstance(host, ToyHost) else [f"needs a ToyHost, got {type(host).__name__}"]

    @classmethod
    def from_host(cls, host: nn.Module, *, strength: float = 0.5) -> "ToyTwin":
        twin = cls(host.head.out_features, strength)
        twin.load_state_dict(host.state_dict())
        return twin.eval()

    def twin_config(self) -> dict[str, Any]:
        return {"knobs": self.knobs, "host": {"architecture": "toy_host", "classes": self.head.out_features}}

    @classmethod
    def from_twin_config(cls, config: dict[str, Any]) -> "ToyTwin":
        return cls(config["host"]["classes"], **config["knobs"])
