"""The settings that another library needs to build the network of some weights, and whether it can build it at all."""

from typing import Any

from cluster.errors import RequestError
from training.data.tokenizer import FULL_VOCABULARY_SIZE
from training.data.transforms import MEAN_C, STD_C
from training.models.config import ModelConfig
from training.weights.names import Dialect

TIMM_POOLING = {"mean": "avg", "max": "max", "class": "token"}
OPEN_CLIP_POOLING = {"mean": "avg", "class": "tok"}
TIMM_ARCHITECTURES = {1e-5: "vit_base_patch16_clip_224", 1e-6: "vit_base_patch16_224"}
"""timm takes every number of a network from its settings but this one, which comes with the architecture's name."""


def check(dialect: Dialect, model: ModelConfig, parts: list[str]) -> None:
    """Raise RequestError, naming every key that stands against it, when the library cannot express the network."""
    against = list(_obstacles(dialect, model))
    if dialect in ("open_clip", "huggingface"):
        lacking = [part for part in ("image", "text", "image_projection", "text_projection") if part not in parts]
        against += [f"the method has no {part}" for part in lacking]
    if against:
        raise RequestError(
            f"format={dialect}: cannot hold this model: {'; '.join(against)}. format=pairmill holds every model"
        )


def _obstacles(dialect: Dialect, model: ModelConfig) -> list[str]:
    vision, text = model.vision, model.text
    if dialect == "pairmill" or (dialect == "timm" and vision.kind == "timm"):
        return []
    if vision.kind != "vit":
        return [f"model.vision is {vision.timm or vision.size}, no vision transformer"]
    wanted: list[tuple[str, bool]] = [(f"model.vision.stem={vision.stem} (linear)", vision.stem == "linear")]
    pooling = f"model.vision.pooling={vision.pooling}"
    if dialect == "timm":
        wanted.append((f"{pooling} ({', '.join(TIMM_POOLING)})", vision.pooling in TIMM_POOLING))
        known = ", ".join(str(eps) for eps in TIMM_ARCHITECTURES)
        wanted.append((f"model.vision.norm_eps={vision.norm_eps} ({known})", vision.norm_eps in TIMM_ARCHITECTURES))
    else:
        wanted.append(("model.vision.class_token=false (true)", vision.has_class_token))
    if dialect == "mae":
        wanted.append(("model.vision.pre_norm=true (false)", not vision.pre_norm))
    if dialect in ("open_clip", "huggingface"):
        known_pooling = OPEN_CLIP_POOLING if dialect == "open_clip" else {"class"}
        wanted.append((f"{pooling} ({', '.join(sorted(known_pooling))})", vision.pooling in known_pooling))
        wanted.append((f"model.text.pooling={text.pooling} (end)", text.pooling == "end"))
        wanted.append((f"model.text.attention={text.attention} (causal)", text.attention == "causal"))
    if dialect == "open_clip":
        wanted.append(
            ("model.vision.activation and model.text.activation differ", vision.activation == text.activation)
        )
    if dialect == "huggingface":
        wanted.append(("model.vision.pre_norm=false (true)", vision.pre_norm))
    return [said for said, fulfilled in wanted if not fulfilled]


def timm(model: ModelConfig) -> dict[str, Any]:
    """config.json of a timm model folder."""
    vision = model.vision
    normalisation = {"mean": MEAN_C, "std": STD_C, "interpolation": "bilinear", "crop_pct": 1.0}
    size = {"input_size": [3, vision.image_size, vision.image_size], "num_classes": 0}
    if vision.kind == "timm":
        return {"architecture": vision.timm, "num_classes": 0, "pretrained_cfg": normalisation | size}
    shape = vision.shape
    arguments = {
        "img_size": vision.image_size,
        "patch_size": vision.patch_size,
        "embed_dim": shape.width,
        "depth": shape.depth,
        "num_heads": shape.heads,
        "mlp_ratio": shape.mlp_width / shape.width,
        "global_pool": TIMM_POOLING[vision.pooling],
        "class_token": vision.has_class_token,
        "pre_norm": vision.pre_norm,
        "fc_norm": False,
        "act_layer": vision.activation,
    }
    return {
        "architecture": TIMM_ARCHITECTURES[vision.norm_eps],
        "num_classes": 0,
        "num_features": shape.width,
        "model_args": arguments,
        "pretrained_cfg": normalisation | size,
    }


def open_clip(model: ModelConfig) -> dict[str, Any]:
    """open_clip_config.json."""
    vision, shape, text = model.vision, model.vision.shape, model.text
    return {
        "model_cfg": {
            "embed_dim": model.embed_dim,
            "quick_gelu": vision.activation == "quick_gelu",
            "vision_cfg": {
                "image_size": vision.image_size,
                "patch_size": vision.patch_size,
                "width": shape.width,
                "layers": shape.depth,
                "head_width": shape.width // shape.heads,
                "mlp_ratio": shape.mlp_width / shape.width,
                "no_ln_pre": not vision.pre_norm,
                "pool_type": OPEN_CLIP_POOLING[vision.pooling],
                "norm_kwargs": {"eps": vision.norm_eps},
            },
            "text_cfg": {
                "context_length": text.context_length,
                "vocab_size": FULL_VOCABULARY_SIZE,
                "width": text.width,
                "heads": text.heads,
                "layers": text.depth,
            },
        },
        "preprocess_cfg": {
            "size": vision.image_size,
            "mean": MEAN_C,
            "std": STD_C,
            "interpolation": "bilinear",
            "resize_mode": "shortest",
        },
    }


def huggingface(model: ModelConfig, log_scale: float) -> dict[str, Any]:
    """config.json of a CLIPModel."""
    vision, shape, text = model.vision, model.vision.shape, model.text
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": model.embed_dim,
        "logit_scale_init_value": log_scale,
        "vision_config": {
            "model_type": "clip_vision_model",
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "hidden_size": shape.width,
            "intermediate_size": shape.mlp_width,
            "num_hidden_layers": shape.depth,
            "num_attention_heads": shape.heads,
            "hidden_act": vision.activation,
            "layer_norm_eps": vision.norm_eps,
            "projection_dim": model.embed_dim,
        },
        "text_config": {
            "model_type": "clip_text_model",
            "vocab_size": FULL_VOCABULARY_SIZE,
            "max_position_embeddings": text.context_length,
            "hidden_size": text.width,
            "intermediate_size": 4 * text.width,
            "num_hidden_layers": text.depth,
            "num_attention_heads": text.heads,
            "hidden_act": text.activation,
            "layer_norm_eps": text.shape.norm_eps,
            "projection_dim": model.embed_dim,
            "bos_token_id": FULL_VOCABULARY_SIZE - 2,
            "eos_token_id": FULL_VOCABULARY_SIZE - 1,
            "pad_token_id": 0,
        },
    }


def huggingface_preprocessor(model: ModelConfig) -> dict[str, Any]:
    """preprocessor_config.json: what `evaluation_view` does, but for Pillow's rounding to whole numbers."""
    side = model.vision.image_size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": 2,  # bilinear
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": MEAN_C,
        "image_std": STD_C,
    }
