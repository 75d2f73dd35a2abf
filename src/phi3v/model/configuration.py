"""The configuration of Phi-3.5-vision and Phi-3-vision, read from and written in the published layout.

Invariant: `config.json` is read and written key for key, but only the fields of `Phi3VConfig` have an effect, each
within the limits of its type; transformers would let a file choose an attention kernel on the Hub, other weights or a
quantization. Fields that the published file lacks (the sizes of a smaller CLIP, another id of `<|image|>`) are written
only where they differ from the published model.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta
from transformers import PreTrainedConfig

from phi3v.base.errors import InputError
from phi3v.base.jsonfile import Fraction, NonNegative, Positive, check_values, read_object

# The model is built without memory before its weights are looked at: upper limits keep that cheap for any file.
Size = Annotated[int, Meta(ge=1, le=2**20)]
Layers = Annotated[int, Meta(ge=1, le=2**10)]
Positions = Annotated[int, Meta(ge=2, le=2**24)]
TokenId = Annotated[int, Meta(ge=0, le=2**20)]
Factor = Annotated[float, Meta(ge=1e-9, le=1e9)]

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
CLIP_FIELDS: dict[str, Any] = {
    "hidden_size": Size,
    "intermediate_size": Size,
    "num_hidden_layers": Annotated[int, Meta(ge=2, le=2**10)],  # the features come from the second-to-last layer
    "num_attention_heads": Size,
    "image_size": Literal[336],
    "patch_size": Literal[14],
    "num_channels": Literal[3],
}
ROPE_FIELDS: dict[str, Any] = {
    "type": Literal["su", "longrope", "yarn"],
    "short_factor": list[Factor],
    "long_factor": list[Factor],
}
DTYPES = ("float32", "bfloat16", "float16")
PUBLISHED_IMAGE_TOKEN_ID = 32044
PUBLISHED_STOP_TOKEN_IDS = (32007, 32000)  # <|end|>, <|endoftext|>


class Phi3VConfig(PreTrainedConfig):
    """Defaults are those of `microsoft/Phi-3.5-vision-instruct`, except for the RoPE factors, which have none.

    `rope_scaling` is `{"type": "su" | "yarn", "short_factor": [...], "long_factor": [...]}` with head_dim / 2 factors
    each, or None for plain RoPE. `vision_config` holds only what differs from CLIP ViT-L/14-336. `image_token_id` marks
    image positions in `input_ids`; `stop_token_ids` end an answer. Raises InputError, naming the field, for a value out
    of the limits of its type and for sizes that do not fit together.
    """

    model_type = "phi3_v"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    vocab_size: Size = 32064
    hidden_size: Size = 3072
    intermediate_size: Size = 8192
    num_hidden_layers: Layers = 32
    num_attention_heads: Size = 32
    num_key_value_heads: Size = 0  # 0 or None: as many as num_attention_heads
    hidden_act: Literal["silu"] = "silu"
    resid_pdrop: Fraction = 0.0
    embd_pdrop: Fraction = 0.0
    attention_dropout: Fraction = 0.0
    max_position_embeddings: Positions = 131072
    original_max_position_embeddings: Positions = 4096
    initializer_range: NonNegative = 0.02
    rms_norm_eps: NonNegative = 1e-5
    use_cache: bool = True
    tie_word_embeddings: bool = False
    rope_theta: Positive = 10000.0
    rope_scaling: dict[str, Any] | None = None
    sliding_window: Positions | None = None
    bos_token_id: TokenId | None = 1
    eos_token_id: TokenId | list[TokenId] | None = 2
    pad_token_id: TokenId | None = 32000
    embd_layer: dict[str, Any] | None = None
    img_processor: dict[str, Any] | None = None
    vision_config: dict[str, Any] | None = None
    auto_map: dict[str, Any] | None = None
    image_token_id: TokenId = PUBLISHED_IMAGE_TOKEN_ID
    stop_token_ids: Sequence[TokenId] = PUBLISHED_STOP_TOKEN_IDS

    def __post_init__(self, **kwargs: Any) -> None:
        self.foreign: dict[str, Any] = {}  # other keys of a file
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        check_values("config.json: ", vars(self), FIELDS)
        self._check_sizes()
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
        self.auto_map = self.auto_map or {}  # the Auto classes expect a dict
        super().__post_init__(**kwargs)

    def _check_sizes(self) -> None:
        check_values("config.json: vision_config.", self.clip, CLIP_FIELDS)
        for name, size, unit, divisor in (
            ("hidden_size", self.hidden_size, "twice num_attention_heads", 2 * self.num_attention_heads),
            ("num_attention_heads", self.num_attention_heads, "num_key_value_heads", self.num_key_value_heads),
            ("vision_config.hidden_size", self.clip["hidden_size"], "its heads", self.clip["num_attention_heads"]),
        ):
            if size % divisor:
                raise InputError(f"config.json: {name} {size} is not a multiple of {unit} ({divisor})")
        if (order := (self.embd_layer or {}).get("hd_transform_order", "sub_glb")) != "sub_glb":
            raise InputError(f"config.json: embd_layer.hd_transform_order is {order!r}, it must be sub_glb")
        if self.rope_scaling is not None:
            check_values("config.json: rope_scaling.", self.rope_scaling, ROPE_FIELDS)
            for name in ("short_factor", "long_factor"):
                if (found := len(self.rope_scaling[name])) != (needed := self.head_dim // 2):
                    raise InputError(f"config.json: rope_scaling.{name} needs {needed} numbers, found {found}")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def clip(self) -> dict[str, Any]:
        """The sizes of the CLIP tower: the published constants, overridden by `vision_config`."""
        return {**CLIP_VIT_L_336, **(self.vision_config or {})}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The configuration of a config.json's content; `kwargs` as in transformers.

        Raises InputError for another kind of model, and as the class does.
        """
        if (kind := config_dict.get("model_type", cls.model_type)) != cls.model_type:
            raise InputError(f"config.json: model_type is {kind!r}, it must be {cls.model_type}")
        if (dtype := config_dict.get("dtype", config_dict.get("torch_dtype"))) not in (None, *DTYPES):
            raise InputError(f"config.json: dtype is {dtype!r}, it must be one of {', '.join(DTYPES)}")
        known = {*FIELDS, "dtype", "torch_dtype"}
        made = super().from_dict({key: value for key, value in config_dict.items() if key in known}, **kwargs)
        config = made[0] if isinstance(made, tuple) else made
        known |= {"_commit_hash"}  # transformers before 5.24 adds it to the content of the file
        config.foreign = {key: value for key, value in config_dict.items() if key not in known}
        return made

    @classmethod
    def _dict_from_json_file(cls, json_file: str | Path) -> dict[str, Any]:
        return {"model_type": cls.model_type, **read_object(Path(json_file))}

    def to_dict(self) -> dict[str, Any]:
        out = super().to_dict()
        out |= out.pop("foreign")
        if out["image_token_id"] == PUBLISHED_IMAGE_TOKEN_ID:
            del out["image_token_id"]
        if tuple(out["stop_token_ids"]) == PUBLISHED_STOP_TOKEN_IDS:
            del out["stop_token_ids"]
        return {key: value for key, value in out.items() if not (key in ("vision_config", "auto_map") and not value)}

    def to_diff_dict(self) -> dict[str, Any]:
        out = super().to_diff_dict() | self.foreign
        if "dtype" in out:
            out["torch_dtype"] = out.pop("dtype")  # the name in the published file
        return out


FIELDS: dict[str, Any] = inspect.get_annotations(Phi3VConfig, eval_str=True)
