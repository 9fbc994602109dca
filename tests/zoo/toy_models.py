"""Entry points of the toy zoo."""

from torch import nn

from sparing.zoo.registry import register_model
from zoo.toy import ToyHost, ToyTwin


@register_model
def toy_host(pretrained: bool = False, **kwargs) -> nn.Module:
    return ToyHost(**kwargs)


@register_model()
def toy_toy_host(pretrained: bool = False, host_pretrained: bool = False, **kwargs) -> nn.Module:
    twin = ToyTwin(**kwargs)
    twin.started_from_host = host_pretrained
    return twin


def checkpoint_filter_fn(state, model):
    return {key.removeprefix("published."): value for key, value in state.items()}
