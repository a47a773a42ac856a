"""Frozen norms inside of convolutions: the same function, the same gradients, the same state dict."""

import copy

import pytest
import timm
import torch
from timm.layers import freeze_batch_norm_2d
from torch import nn

from codetr.models.frozen_norm import ConvWithNorm, fold_frozen_norms

# Bottlenecks, basic blocks with a deep stem, norms with activations, depthwise convolutions.
NAMES = ["resnet50", "resnet10t", "efficientnet_b0", "regnetx_002", "mobilenetv3_small_050"]


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    """A network with frozen norms that do something, and its folded copy, in float64."""
    torch.manual_seed(0)
    plain = freeze_batch_norm_2d(timm.create_model(name, features_only=True)).double()
    for module in plain.modules():
        if hasattr(module, "running_var"):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_()
    folded = copy.deepcopy(plain)
    fold_frozen_norms(folded)
    return plain, folded


def convolutions(network: nn.Module, kind: type) -> int:
    return sum(type(module) is kind for module in network.modules())


@pytest.mark.parametrize("name", NAMES)
def test_features_and_gradients_are_the_same(name: str) -> None:
    plain, folded = pair(name)
    assert convolutions(folded, ConvWithNorm) >= 0.5 * convolutions(plain, nn.Conv2d) > 0
    image = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    found = [(network(image), network) for network in (plain, copy.deepcopy(folded))]
    for expected, feature in zip(*(features for features, _ in found), strict=True):
        torch.testing.assert_close(feature, expected, rtol=1e-9, atol=1e-9 * float(expected.detach().abs().max()))
    for features, _ in found:
        sum((feature / feature.detach().norm()).square().sum() for feature in features).backward()  # type: ignore
    for (parameter, a), (_, b) in zip(*(network.named_parameters() for _, network in found), strict=True):
        assert a.grad is not None, parameter
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-6, atol=1e-9 * float(a.grad.abs().max()), msg=parameter)


def test_the_state_dict_stays_as_it_is() -> None:
    plain, folded = pair("resnet10t")
    assert list(folded.state_dict()) == list(plain.state_dict())
    other, _ = pair("resnet10t")
    with torch.no_grad():
        for value in other.state_dict().values():
            value.mul_(1.5)
    folded.load_state_dict(other.state_dict())
    image = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    for a, b in zip(other(image), folded(image), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * float(a.detach().abs().max()))


def test_maps_stay_of_half_precision_under_autocast() -> None:
    plain, folded = (network.float() for network in pair("resnet10t"))
    with torch.autocast("cpu", torch.bfloat16):
        image = torch.randn(1, 3, 64, 64)
        assert {feature.dtype for feature in folded(image)} == {torch.bfloat16}
        assert {feature.dtype for feature in plain(image)} == {torch.float32}


def test_what_has_other_readers_is_left_alone() -> None:
    """A convolution whose output is also used elsewhere, one that is used twice, and one without a norm."""

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third, self.fourth = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(4))
            self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(4))
            self.other = nn.ReLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            x = self.norms[0](x) + self.other(x)
            x = self.norms[1](self.second(x))
            x = self.norms[2](self.second(x))
            return self.fourth(self.norms[3](self.third(x)))

    network = freeze_batch_norm_2d(Network())
    fold_frozen_norms(network)
    assert [name for name, module in network.named_modules() if type(module) is ConvWithNorm] == ["third"]
