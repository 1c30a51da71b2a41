"""Small random two-tower models of transformers, each with what its forward wants beside input_ids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

N = 12
TEXT = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 1, "num_attention_heads": 2}
IMAGE = {"image_size": 16, "patch_size": 8}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

Built = tuple[Any, dict[str, Any]]


def images() -> dict[str, Any]:
    return {"pixel_values": torch.randn(N, 3, 16, 16)}


def clip(t: Any) -> Built:
    text = {**TEXT, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 49}
    config = t.CLIPConfig(text_config=text, vision_config={**VISION, **IMAGE}, projection_dim=16)
    return t.CLIPModel(config), images()


def siglip(t: Any) -> Built:
    config = t.SiglipConfig(
        text_config={**TEXT, "max_position_embeddings": 16, "projection_size": 32},
        vision_config={**VISION, **IMAGE},
    )
    return t.SiglipModel(config), images()


def align(t: Any) -> Built:
    vision = {
        "image_size": 32,
        "width_coefficient": 1.0,
        "depth_coefficient": 0.25,
        "depth_divisor": 8,
        "kernel_sizes": [3, 3],
        "in_channels": [32, 16],
        "out_channels": [16, 32],
        "strides": [1, 2],
        "depthwise_padding": [],
        "num_block_repeats": [1, 1],
        "expand_ratios": [1, 2],
        "hidden_dim": 32,
        "drop_connect_rate": 0.0,
    }
    text = {**TEXT, "max_position_embeddings": 16, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = t.AlignConfig(text_config=text, vision_config=vision, projection_dim=32)
    return t.AlignModel(config), {"pixel_values": torch.randn(N, 3, 32, 32)}


def clap(t: Any) -> Built:
    text = {
        **TEXT,
        "max_position_embeddings": 20,
        "projection_dim": 16,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    audio = {
        "spec_size": 32,
        "num_mel_bins": 8,
        "patch_size": 4,
        "patch_stride": [4, 4],
        "window_size": 4,
        "patch_embeds_hidden_size": 16,
        "hidden_size": 32,
        "depths": [1, 1],
        "num_attention_heads": [2, 2],
        "num_classes": 4,
        "projection_dim": 16,
        "drop_path_rate": 0.0,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "enable_fusion": False,
    }
    model = t.ClapModel(t.ClapConfig(text_config=text, audio_config=audio, projection_dim=16))
    return model, {"input_features": torch.randn(N, 1, 128, 8), "is_longer": torch.zeros(N, 1, dtype=torch.bool)}


def clipseg(t: Any) -> Built:
    text = {**TEXT, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 49}
    config = t.CLIPSegConfig(text_config=text, vision_config={**VISION, **IMAGE}, projection_dim=16)
    return t.CLIPSegModel(config), images()


def altclip(t: Any) -> Built:
    text = {**TEXT, **NO_DROPOUT, "max_position_embeddings": 20, "project_dim": 16, "pad_token_id": 1}
    config = t.AltCLIPConfig(text_config=text, vision_config={**VISION, **IMAGE}, projection_dim=16)
    return t.AltCLIPModel(config), images()


def chinese_clip(t: Any) -> Built:
    text = {**TEXT, **NO_DROPOUT, "max_position_embeddings": 16}
    config = t.ChineseCLIPConfig(text_config=text, vision_config={**VISION, **IMAGE}, projection_dim=16)
    return t.ChineseCLIPModel(config), images()


def metaclip_2(t: Any) -> Built:
    text = {**TEXT, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 49}
    config = t.MetaClip2Config(text_config=text, vision_config={**VISION, **IMAGE}, projection_dim=16)
    return t.MetaClip2Model(config), images()


def blip(t: Any) -> Built:
    text = {**TEXT, **NO_DROPOUT, "max_position_embeddings": 16, "encoder_hidden_size": 32, "bos_token_id": 0}
    config = t.BlipConfig(text_config=text, vision_config={**VISION, **IMAGE}, projection_dim=16)
    return t.BlipModel(config), images()


def groupvit(t: Any) -> Built:
    text = {**TEXT, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 49}
    vision = {**VISION, **IMAGE, "depths": [1, 1, 1], "num_group_tokens": [4, 2, 0], "num_output_groups": [4, 2, 0]}
    config = t.GroupViTConfig(text_config=text, vision_config=vision, projection_dim=16, projection_intermediate_dim=24)
    return t.GroupViTModel(config), images()


def siglip2(t: Any) -> Built:
    config = t.Siglip2Config(
        text_config={**TEXT, "max_position_embeddings": 16, "projection_size": 32},
        vision_config={**VISION, "patch_size": 8, "num_patches": 4},
    )
    inputs = {
        "pixel_values": torch.randn(N, 4, 3 * 8 * 8),
        "pixel_attention_mask": torch.ones(N, 4, dtype=torch.long),
        "spatial_shapes": torch.full((N, 2), 2),
    }
    return t.Siglip2Model(config), inputs


def vision_text_dual_encoder(t: Any) -> Built:
    config = t.VisionTextDualEncoderConfig.from_vision_text_configs(
        t.ViTConfig(**VISION, **IMAGE, **NO_DROPOUT),
        t.BertConfig(**TEXT, **NO_DROPOUT, max_position_embeddings=16),
        projection_dim=16,
    )
    return t.VisionTextDualEncoderModel(config), images()


def x_clip(t: Any) -> Built:
    """A video of two frames for each text; its loss is not among ours."""
    text = {**TEXT, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 49}
    vision = {**VISION, **IMAGE, "num_frames": 2, "drop_path_rate": 0.0}
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        vision[f"mit_{name}"] = VISION[name]
    config = t.XCLIPConfig(
        text_config=text, vision_config=vision, projection_dim=32, prompt_layers=1, prompt_num_attention_heads=2
    )
    return t.XCLIPModel(config).eval(), {
        "pixel_values": torch.randn(N, 2, 3, 16, 16),
        "input_ids": torch.cat([torch.randint(3, 48, (N, 7)), torch.full((N, 1), 49)], 1),
    }


MODELS: dict[str, Callable[[Any], Built]] = {
    make.__name__: make
    for make in (
        *(clip, siglip, align, clap),
        *(altclip, blip, chinese_clip, clipseg, groupvit, metaclip_2, siglip2, vision_text_dual_encoder),
    )
}


def build(t: Any, name: str) -> Built:
    """A model in evaluation mode and all of its inputs."""
    torch.manual_seed(0)
    model, inputs = MODELS[name](t)
    inputs["input_ids"] = torch.randint(3, 48, (N, 8))
    inputs["input_ids"][:, -1] = 49
    return model.eval(), inputs
