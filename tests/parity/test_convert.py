"""Every official state dict has a place in ours, tensor by tensor, and the way back is the inverse."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from codetr import application
from codetr.convert import mmdet3, official, recognise, weights
from codetr.convert.__main__ import build, official_configs

CONFIGS = official_configs()


def keys(official: Path, config: str) -> dict[str, Tensor]:
    """The official state dict, without memory."""
    content = json.loads((official / "keys" / f"{config}.json").read_text())
    return {name: torch.empty(shape, device="meta") for name, shape, _ in content["keys"]}


def shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def test_there_is_an_experiment_for_every_official_config(official: Path) -> None:
    assert {file.stem for file in (official / "keys").glob("*.json")} == set(CONFIGS)


@pytest.mark.parametrize("config", CONFIGS)
def test_every_tensor_has_its_place_in_both_directions(official: Path, config: str) -> None:
    theirs = keys(official, config)
    number = recognise.num_classes(theirs)
    detector = build(application.compose("train", [f"experiment=official/{config}", f"model.num_classes={number}"]))
    there, report = weights.to_ours(theirs, detector)
    report.require_fit(config)
    assert shapes(there) == shapes(detector.state_dict())
    back, way_back = weights.to_official(there, detector)
    assert not way_back.unexpected
    left_out = {name for names in report.special.values() for name in names}
    assert shapes(back) == {name: shape for name, shape in shapes(theirs).items() if name not in left_out}


@pytest.mark.parametrize("config", CONFIGS)
def test_weights_tell_their_config(official: Path, config: str) -> None:
    """Up to configurations of the same tensors, among which the file's name decides."""
    theirs = keys(official, config)
    found = recognise.candidates(theirs, CONFIGS, f"{config}-69a72d67")
    assert found[0] == config
    assert all(shapes(keys(official, other)) == shapes(theirs) for other in found)


def test_split_and_join_are_inverse() -> None:
    given = {
        "query_head.transformer.decoder.layers.0.attentions.0.attn.in_proj_weight": torch.randn(12, 4),
        "query_head.transformer.decoder.layers.0.attentions.0.attn.in_proj_bias": torch.randn(12),
        "query_head.transformer.head_pos_embed.weight": torch.randn(2, 1),
        **{f"bbox_head.0.scales.{i}.scale": torch.randn(()) for i in range(6)},
        "neck.convs.0.conv.weight": torch.randn(4, 3, 1, 1),
    }
    cut = official.split(given)
    packed = given["query_head.transformer.decoder.layers.0.attentions.0.attn.in_proj_weight"]
    assert torch.equal(cut["query_head.transformer.decoder.layers.0.attentions.0.value.weight"], packed[8:])
    assert torch.equal(cut["bbox_head.0.scales"][3], given["bbox_head.0.scales.3.scale"])
    assert torch.equal(
        cut["query_head.transformer.head_pos_embed.1"],
        torch.tensor([given["query_head.transformer.head_pos_embed.weight"][1, 0]]),
    )
    back = official.join(cut)
    assert back.keys() == given.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in given.items())


def test_mmdet_3_merges_the_patches_of_a_swin_in_another_order() -> None:
    """Its unfold yields, per channel, the four neighbours row by row; the original concatenates whole patches:
    upper left, lower left, upper right, lower right."""
    channels = 3
    original = torch.nn.Linear(4 * channels, 2 * channels, bias=False)
    image = torch.randn(1, channels, 6, 8)
    corners = [image[:, :, i::2, j::2] for i, j in ((0, 0), (1, 0), (0, 1), (1, 1))]
    expected = original(torch.cat(corners, 1).permute(0, 2, 3, 1))
    unfolded = torch.nn.functional.unfold(image, 2, stride=2)  # [1, channels x 4, cells]
    order = torch.arange(4 * channels).view(4, channels)[[0, 2, 1, 3]].t().flatten()
    theirs = {"backbone.stages.1.downsample.reduction.weight": original.weight.detach()[:, order]}
    result = unfolded.transpose(1, 2) @ theirs["backbone.stages.1.downsample.reduction.weight"].t()
    torch.testing.assert_close(result.view(1, 3, 4, -1), expected)
    ((name, ours),) = mmdet3.to_mmdet2(theirs).items()
    assert name == "backbone.layers.1.downsample.reduction.weight"
    assert torch.equal(ours, original.weight)
