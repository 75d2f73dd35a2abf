"""The configuration of Phi-3.5-vision and Phi-3-vision, read from and written in the published layout.

Invariant: `config.json` in, `config.json` out, key for key. What the published file does not know (the sizes of a
smaller CLIP, another id for `<|image|>`) is written only where it differs from the published model.
"""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PreTrainedConfig

from phi3v.errors import InputError

# The published code keeps CLIP ViT-L/14-336 in code, not in config.json; so do we.
CLIP_VIT_L_336: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "num_channels": 3,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "max_position_embeddings", "original_max_position_embeddings"),
)
PUBLISHED_IMAGE_TOKEN_ID = 32044
PUBLISHED_STOP_TOKEN_IDS = (32007, 32000)  # <|end|>, <|endoftext|>


class Phi3VConfig(PreTrainedConfig):
    """Defaults are those of `microsoft/Phi-3.5-vision-instruct`, except for the RoPE factors, which have none.

    `rope_scaling` is `{"type": "su" | "yarn", "short_factor": [...], "long_factor": [...]}` with head_dim / 2 factors
    each, or None for plain RoPE. `vision_config` holds only what differs from CLIP ViT-L/14-336. `image_token_id` marks
    image positions in `input_ids`; `stop_token_ids` end an answer.
    """

    model_type = "phi3_v"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    vocab_size: int = 32064
    hidden_size: int = 3072
    intermediate_size: int = 8192
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 0  # 0 or None: as many as num_attention_heads
    hidden_act: str = "silu"
    resid_pdrop: float = 0.0
    embd_pdrop: float = 0.0
    attention_dropout: float = 0.0
    max_position_embeddings: int = 131072
    original_max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    tie_word_embeddings: bool = False
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None
    sliding_window: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    pad_token_id: int | None = 32000
    embd_layer: dict | None = None
    img_processor: dict | None = None
    vision_config: dict | None = None
    auto_map: dict | None = None
    image_token_id: int = PUBLISHED_IMAGE_TOKEN_ID
    stop_token_ids: list[int] | tuple[int, ...] = PUBLISHED_STOP_TOKEN_IDS

    def __post_init__(self, **kwargs: Any) -> None:
        # The published config.json asks for flash_attention_2, and transformers would let that override the caller.
        # It is carried along and written back, and never obeyed.
        self.published_attn_implementation = kwargs.pop("_attn_implementation", None)
        self.published_name = kwargs.pop("_name_or_path", None)
        if not self.num_key_value_heads:
            self.num_key_value_heads = self.num_attention_heads
        if self.embd_layer is None:
            self.embd_layer = {
                "embedding_cls": "image",
                "hd_transform_order": "sub_glb",
                "projection_cls": "mlp",
                "use_hd_transform": True,
                "with_learnable_separator": True,
            }
        if self.img_processor is None:
            self.img_processor = {
                "image_dim_out": self.clip["hidden_size"],
                "model_name": "openai/clip-vit-large-patch14-336",
                "name": "clip_vision_model",
                "num_img_tokens": 144,
            }
        if self.auto_map is None:
            self.auto_map = {}  # the Auto classes look into it without asking
        super().__post_init__(**kwargs)
        self._check()

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def clip(self) -> dict[str, Any]:
        """The sizes of the CLIP tower: the published constants, overridden by `vision_config`."""
        return {**CLIP_VIT_L_336, **(self.vision_config or {})}

    def _check(self) -> None:
        for name in SIZES:
            if not isinstance(value := getattr(self, name), int) or value < 1:
                raise InputError(f"config.json: {name} is {value!r}, it must be a whole number above 0")
        if self.hidden_size % self.num_attention_heads:
            raise InputError(
                f"config.json: hidden_size {self.hidden_size} is not a multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if self.hidden_act != "silu":
            raise InputError(f"config.json: hidden_act {self.hidden_act!r} is not supported, only 'silu'")
        if self.clip["image_size"] != 336 or self.clip["patch_size"] != 14:
            raise InputError("config.json: vision_config must keep image_size 336 and patch_size 14")
        order = (self.embd_layer or {}).get("hd_transform_order", "sub_glb")
        if order != "sub_glb":
            raise InputError(f"config.json: embd_layer.hd_transform_order {order!r} is not supported, only 'sub_glb'")
        if self.rope_scaling is None:
            return
        kind = self.rope_scaling.get("type", self.rope_scaling.get("rope_type"))
        if kind not in ("su", "longrope", "yarn"):
            raise InputError(f"config.json: rope_scaling.type {kind!r} is not supported, only 'su' and 'yarn'")
        for name in ("short_factor", "long_factor"):
            factors = self.rope_scaling.get(name)
            if not isinstance(factors, list) or len(factors) != self.head_dim // 2:
                found = len(factors) if isinstance(factors, list) else factors
                raise InputError(f"config.json: rope_scaling.{name} needs {self.head_dim // 2} numbers, found {found}")

    def to_dict(self) -> dict[str, Any]:
        out = super().to_dict()
        for name, ours in (
            ("_name_or_path", "published_name"),
            ("_attn_implementation", "published_attn_implementation"),
        ):
            if (value := out.pop(ours, None)) is not None:
                out[name] = value
        if out["image_token_id"] == PUBLISHED_IMAGE_TOKEN_ID:
            del out["image_token_id"]
        if tuple(out["stop_token_ids"]) == PUBLISHED_STOP_TOKEN_IDS:
            del out["stop_token_ids"]
        return {key: value for key, value in out.items() if not (key in ("vision_config", "auto_map") and not value)}

    def to_diff_dict(self) -> dict[str, Any]:
        out = super().to_diff_dict()
        if self.published_name is not None:
            out["_name_or_path"] = self.published_name
        if "dtype" in out:
            out["torch_dtype"] = out.pop("dtype")  # the name the published file and its readers know
        return out
