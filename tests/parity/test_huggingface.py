"""Detectors that the `transformers` library saved, converted through the command, find what they find there."""

import json
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.models.conditional_detr.configuration_conditional_detr import ConditionalDetrConfig
from transformers.models.conditional_detr.modeling_conditional_detr import ConditionalDetrForObjectDetection
from transformers.models.dab_detr.configuration_dab_detr import DabDetrConfig
from transformers.models.dab_detr.modeling_dab_detr import DabDetrForObjectDetection
from transformers.models.deformable_detr.configuration_deformable_detr import DeformableDetrConfig
from transformers.models.deformable_detr.modeling_deformable_detr import DeformableDetrForObjectDetection
from transformers.models.resnet.configuration_resnet import ResNetConfig

import codetr
from codetr.checkpoint import load_weights
from codetr.convert.__main__ import convert
from codetr.errors import UserError

TIMM = {"use_timm_backbone": True, "backbone": "resnet18", "use_pretrained_backbone": False}
COMMON = {
    "encoder_layers": 1,
    "decoder_layers": 3,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "num_queries": 9,
    "id2label": {0: "N/A", 1: "cat", 2: "dog", 3: "N/A", 4: "tree"},
}
OWN_RESNET = ResNetConfig(layer_type="basic", depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512])
Kind = tuple[type[nn.Module], type, dict]
CONDITIONAL: Kind = (ConditionalDetrForObjectDetection, ConditionalDetrConfig, {"d_model": 64})
DAB: Kind = (DabDetrForObjectDetection, DabDetrConfig, {"hidden_size": 64})


def deformable(**options: object) -> Kind:
    return DeformableDetrForObjectDetection, DeformableDetrConfig, {"d_model": 64, **options}


KINDS = {
    "conditional_detr": (*CONDITIONAL, TIMM),
    "conditional_detr, dilated": (*CONDITIONAL, {**TIMM, "dilation": True}),
    "dab_detr": (*DAB, TIMM),
    "dab_detr, the library's ResNet": (*DAB, {"use_timm_backbone": False, "backbone_config": OWN_RESNET}),
    "deformable_detr": (*deformable(), TIMM),
    "deformable_detr, one level, dilated": (*deformable(num_feature_levels=1), {**TIMM, "dilation": True}),
    "deformable_detr_refine": (*deformable(with_box_refine=True, decoder_n_points=3, encoder_n_points=3), TIMM),
    "deformable_detr_two_stage": (
        *deformable(with_box_refine=True, two_stage=True, two_stage_num_proposals=7, num_feature_levels=5),
        TIMM,
    ),
}


def saved(kind: str, folder: Path) -> nn.Module:
    """Random weights: the library's own initialisation, and noise, so that every tensor matters."""
    model_class, config_class, options, backbone = KINDS[kind]
    torch.manual_seed(0)
    model = model_class(config_class(**COMMON, **options, **backbone)).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            tensor += 0.0 if "backbone" in name else 0.05 * torch.randn_like(tensor)
        for name, tensor in model.named_buffers():
            if "running" in name:
                tensor.copy_(torch.rand_like(tensor) + name.endswith("var"))
    model.save_pretrained(folder)
    return model


def run(source: Path, **values: object) -> Path:
    given = {"config": None, "overrides": [], "class_names": None, "overwrite": True, **values}
    return convert(OmegaConf.create({"source": str(source), "out": str(source.with_name("ours.ckpt")), **given}))


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_objects(kind: str, tmp_path: Path) -> None:
    theirs = saved(kind, tmp_path)
    ours = codetr.load(run(tmp_path / "model.safetensors"), device="cpu").detector
    image = (torch.rand(1, 3, 96, 128, generator=torch.Generator().manual_seed(1)) * 255).byte()
    found = ours.detect(image, torch.zeros(1, 96, 128, dtype=torch.bool))
    pixels = ours.backbone.normalize(image, torch.zeros(1, 96, 128, dtype=torch.bool))
    expected = theirs(pixels, torch.ones(1, 96, 128, dtype=torch.long))
    named = [1, 2, 4]  # labels 0 and 3 are gaps
    torch.testing.assert_close(found.logits, expected.logits[..., named], rtol=0, atol=1e-5)
    torch.testing.assert_close(found.boxes, expected.pred_boxes, rtol=0, atol=1e-5)
    assert load_weights(tmp_path / "ours.ckpt").class_names == ("cat", "dog", "tree")


def test_pickled_weights_with_every_name_of_shared_heads(tmp_path: Path) -> None:
    """As files from before safetensors are."""
    saved("deformable_detr", tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    heads = {name: tensor for name, tensor in state.items() if name.startswith(("class_embed.0", "bbox_embed.0"))}
    more = {name.replace(".0.", f".{i}.", 1): tensor.clone() for name, tensor in heads.items() for i in (1, 2)}
    torch.save({**state, **more}, tmp_path / "pytorch_model.bin")
    one, other = (load_weights(run(tmp_path / f)).weights for f in ("model.safetensors", "pytorch_model.bin"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_what_is_refused(tmp_path: Path) -> None:
    saved("deformable_detr", tmp_path)
    file, about = tmp_path / "model.safetensors", tmp_path / "config.json"
    state = load_file(file)
    changed: dict[str, Tensor] = {**state, "model.decoder.layers.1.new.weight": torch.zeros(3)}
    del changed["model.decoder.layers.0.self_attn.k_proj.bias"], changed["model.decoder.layers.2.fc1.weight"]
    save_file(changed, file)
    with pytest.raises(UserError) as refused:
        run(file)
    for line in (
        "missing (2): decoder.layers.0.self_attention.query_key.bias, decoder.layers.2.ffn.linear1.weight",
        "unexpected (2): model.decoder.layers.0.self_attn.q_proj.bias, model.decoder.layers.1.new.weight",
    ):
        assert line in str(refused.value)

    save_file(state, file)
    known = json.loads(about.read_text())
    about.write_text(json.dumps({**known, "activation_function": "gelu"}))
    with pytest.raises(UserError, match="activation_function is gelu; only relu or prelu can be converted"):
        run(file)
    about.unlink()  # with it goes the number of heads
    with pytest.raises(UserError, match="5 classes and does not name them: add class_names="):
        run(file, overrides=["model.num_heads=2"])
