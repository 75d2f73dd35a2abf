"""The configuration of Phi-3.5-vision and Phi-3-vision, read from and written in the published layout.

Invariant: `config.json` in, `config.json` out, key for key; but only our own keys are obeyed, and only with values that
make sense. transformers would let a file choose the attention (a kernel on the Hub, for one), other weights or a
quantisation. What the published file does not know (the sizes of a smaller CLIP, another id for `<|image|>`) is written
only where it differs from the published model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar

from msgspec import Meta
from transformers import GenerationConfig, PreTrainedConfig

from phi3v.base.errors import InputError
from phi3v.base.jsonfile import check_values, read_object

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
PUBLISHED_IMAGE_TOKEN_ID = 32044
PUBLISHED_STOP_TOKEN_IDS = (32007, 32000)  # <|end|>, <|endoftext|>


def _whole(low: int, high: int) -> Any:
    return Annotated[int, Meta(ge=low, le=high)]


def _number(low: float, high: float) -> Any:
    return Annotated[float, Meta(ge=low, le=high)]


TOKEN_ID: Any = _whole(0, 2**20)
TOKEN_IDS: Any = list[Annotated[int, Meta(ge=0, le=2**20)]]
FACTORS: Any = list[Annotated[float, Meta(ge=1e-9, le=1e9)]]

# Sizes are bounded, so that the empty model they describe can be built before a tensor of the checkpoint is looked at.
RULES: dict[str, Any] = {
    "vocab_size": _whole(1, 2**20),
    "hidden_size": _whole(1, 2**16),
    "intermediate_size": _whole(1, 2**18),
    "num_hidden_layers": _whole(1, 2**10),
    "num_attention_heads": _whole(1, 2**12),
    "num_key_value_heads": _whole(1, 2**12),
    "max_position_embeddings": _whole(1, 2**24),
    "original_max_position_embeddings": _whole(2, 2**24),
    "sliding_window": _whole(1, 2**24) | None,
    "rms_norm_eps": _number(0, 1),
    "rope_theta": _number(1, 1e12),
    "initializer_range": _number(0, 100),
    "attention_dropout": _number(0, 0.99),
    "embd_pdrop": _number(0, 0.99),
    "resid_pdrop": _number(0, 0.99),
    "use_cache": bool,
    "tie_word_embeddings": bool,
    "bos_token_id": TOKEN_ID | None,
    "pad_token_id": TOKEN_ID | None,
    "eos_token_id": TOKEN_ID | TOKEN_IDS | None,
    "image_token_id": TOKEN_ID,
    "stop_token_ids": TOKEN_IDS,
    "rope_scaling": dict | None,
    "embd_layer": dict | None,
    "img_processor": dict | None,
    "vision_config": dict | None,
    "auto_map": dict | None,
}
CLIP_RULES = {
    "hidden_size": _whole(1, 2**16),
    "intermediate_size": _whole(1, 2**18),
    "num_hidden_layers": _whole(2, 2**10),
    "num_attention_heads": _whole(1, 2**12),
}
FACTOR_RULES = dict.fromkeys(("short_factor", "long_factor"), FACTORS)
GENERATION_RULES = {
    "bos_token_id": TOKEN_ID,
    "pad_token_id": TOKEN_ID,
    "eos_token_id": TOKEN_ID | TOKEN_IDS,
    "max_new_tokens": _whole(1, 2**24),
    "do_sample": bool,
    "temperature": _number(1e-3, 1e3),
    "top_k": _whole(0, 2**20),
    "top_p": _number(0, 1),
    "repetition_penalty": _number(1e-3, 1e3),
}
DTYPES = ("float32", "bfloat16", "float16")


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
        self.foreign: dict[str, Any] = {}  # what else a file said
        # What defaults are made of comes first; `_check` looks at everything.
        check_values("config.json: ", {"vision_config": self.vision_config}, {"vision_config": RULES["vision_config"]})
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

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The configuration in the content of a config.json; `kwargs` as in transformers.

        Raises InputError for another kind of model, and for a value that cannot be.
        """
        if (kind := config_dict.get("model_type", cls.model_type)) != cls.model_type:
            raise InputError(f"config.json: model_type is {kind!r}, only {cls.model_type!r} can be read")
        if (dtype := config_dict.get("dtype", config_dict.get("torch_dtype"))) not in (None, *DTYPES):
            raise InputError(f"config.json: dtype is {dtype!r}, it must be one of {', '.join(DTYPES)}")
        obeyed = {*RULES, "hidden_act", "dtype", "torch_dtype"}
        made = super().from_dict({key: value for key, value in config_dict.items() if key in obeyed}, **kwargs)
        config = made[0] if isinstance(made, tuple) else made
        obeyed |= {"_commit_hash"}  # which transformers before 5.24 puts among the file's own keys
        config.foreign = {key: value for key, value in config_dict.items() if key not in obeyed}
        return made

    @classmethod
    def _dict_from_json_file(cls, json_file: str | Path) -> dict[str, Any]:
        content = read_object(Path(json_file))
        content.pop("configuration_files", None)  # transformers would go on to one of these
        return {"model_type": cls.model_type, **content}

    def _check(self) -> None:
        check_values("config.json: ", vars(self), RULES)
        check_values("config.json: vision_config.", self.clip, CLIP_RULES)
        if self.hidden_size % (2 * self.num_attention_heads):
            raise InputError(
                f"config.json: hidden_size {self.hidden_size} is not a multiple of twice "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError(
                f"config.json: num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.clip["hidden_size"] % self.clip["num_attention_heads"]:
            raise InputError("config.json: vision_config.hidden_size is not a multiple of its num_attention_heads")
        if self.hidden_act != "silu":
            raise InputError(f"config.json: hidden_act {self.hidden_act!r} is not supported, only 'silu'")
        if any(self.clip[name] != CLIP_VIT_L_336[name] for name in ("image_size", "patch_size", "num_channels")):
            raise InputError("config.json: vision_config must keep image_size 336, patch_size 14 and num_channels 3")
        order = (self.embd_layer or {}).get("hd_transform_order", "sub_glb")
        if order != "sub_glb":
            raise InputError(f"config.json: embd_layer.hd_transform_order {order!r} is not supported, only 'sub_glb'")
        if self.rope_scaling is None:
            return
        kind = self.rope_scaling.get("type", self.rope_scaling.get("rope_type"))
        if kind not in ("su", "longrope", "yarn"):
            raise InputError(f"config.json: rope_scaling.type {kind!r} is not supported, only 'su' and 'yarn'")
        check_values("config.json: rope_scaling.", self.rope_scaling, FACTOR_RULES)
        for name in FACTOR_RULES:
            if (found := len(self.rope_scaling[name])) != self.head_dim // 2:
                raise InputError(f"config.json: rope_scaling.{name} needs {self.head_dim // 2} numbers, found {found}")

    def to_dict(self) -> dict[str, Any]:
        out = super().to_dict()
        out |= out.pop("foreign")
        if out["image_token_id"] == PUBLISHED_IMAGE_TOKEN_ID:
            del out["image_token_id"]
        if tuple(out["stop_token_ids"]) == PUBLISHED_STOP_TOKEN_IDS:
            del out["stop_token_ids"]
        return {key: value for key, value in out.items() if not (key in ("vision_config", "auto_map") and not value)}

    def to_diff_dict(self) -> dict[str, Any]:
        foreign, self.foreign = self.foreign, {}  # transformers would look into its values, and may stumble
        try:
            out = super().to_diff_dict() | foreign
        finally:
            self.foreign = foreign
        if "dtype" in out:
            out["torch_dtype"] = out.pop("dtype")  # the name the published file and its readers know
        return out


def read_generation_config(folder: Path) -> GenerationConfig | None:
    """What a folder's generation_config.json says of the few things that matter here; None if there is none.

    transformers would let the file choose beams by the thousand, an assistant model, a cache, a compiler. Raises
    InputError, naming the file.
    """
    file = folder / "generation_config.json"
    if not file.is_file():
        return None
    content = read_object(file)
    chosen = {name: content[name] for name in GENERATION_RULES if content.get(name) is not None}
    check_values(f"{file}: ", chosen, {name: GENERATION_RULES[name] for name in chosen})
    return GenerationConfig(**chosen)
