"""LoRA adapters from a folder, onto their base.

PEFT would obey all of adapter_config.json (import modules it names, repeat layers), read pickles, and go on with fresh
adapters where a tensor is missing. Here the settings that make a LoRA adapter count; another kind, or another setting
than PEFT's own, is refused by name, and the tensors must be those that the settings ask for.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta
from safetensors import SafetensorError

from phi3v.base.errors import InputError
from phi3v.base.jsonfile import check_values, read_object
from phi3v.model.weights import check_shapes, file_shapes

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

RANK = Annotated[int, Meta(ge=1, le=2**16)]
ALPHA = Annotated[float, Meta(ge=0, le=1e6)]
REQUIRED: dict[str, Any] = {
    "peft_type": Literal["LORA"],
    "base_model_name_or_path": Annotated[str, Meta(pattern=r"^(?!.*[^/]{256})[^\x00]{1,4095}$")],
    "r": RANK,
    "target_modules": str | list[str],
}
OPTIONAL: dict[str, Any] = {
    "task_type": Literal["CAUSAL_LM"],
    "lora_alpha": ALPHA,
    "lora_dropout": Annotated[float, Meta(ge=0, le=0.99)],
    "init_lora_weights": bool | Literal["gaussian", "pissa", "olora"],
    "use_dora": bool,
    "use_rslora": bool,
    "exclude_modules": str | list[str],
    "rank_pattern": dict[str, RANK],
    "alpha_pattern": dict[str, ALPHA],
}
WITHOUT_EFFECT = {"auto_mapping", "inference_mode", "peft_version", "revision"}


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The settings of the adapter in a folder. Raises InputError, naming file and setting."""
    from peft import LoraConfig

    file = folder / CONFIG
    said = {name: value for name, value in read_object(file).items() if value is not None}
    check_values(f"{file}: ", said, REQUIRED | {name: OPTIONAL[name] for name in OPTIONAL.keys() & said.keys()})
    for name, default in LoraConfig().to_dict().items():
        known = name in REQUIRED or name in OPTIONAL or name in WITHOUT_EFFECT
        if not known and (value := said.get(name)) and value != default:
            raise InputError(f"{file}: {name} is {value!r}, which is not supported")
    return {name: said[name] for name in said if name in REQUIRED or name in OPTIONAL}


def load_adapter(base: Any, folder: Path) -> Any:
    """The base inside PEFT with the adapter of a folder, for inference. Raises InputError, naming file and tensor."""
    from peft import LoraConfig, PeftModel, get_peft_model_state_dict

    said, found = read_adapter_config(folder), file_shapes(folder / WEIGHTS)
    rank = max((shape[0] for name, shape in found.items() if ".lora_A." in name and shape), default=0)
    if (most := max(said["r"], *said.get("rank_pattern", {}).values(), 0)) > rank:  # before room is made for it
        raise InputError(f"{folder / CONFIG}: its rank is {most}, but the tensors in {WEIGHTS} have {rank}")
    settings = {name: value for name, value in said.items() if name not in ("peft_type", "task_type")}
    try:
        model = PeftModel(base, LoraConfig(**settings, inference_mode=True))
        wanted = get_peft_model_state_dict(model, save_embedding_layers=False)
        check_shapes(str(folder / WEIGHTS), found, {name: tuple(tensor.shape) for name, tensor in wanted.items()})
        if strangers := sorted(found.keys() - wanted.keys()):
            raise InputError(f"{folder / WEIGHTS}: {strangers[0]} is not of this adapter or this model")
        model.load_adapter(str(folder), "default")
    except InputError:
        raise
    except (OSError, RuntimeError, TypeError, ValueError, re.error, SafetensorError) as error:
        raise InputError(f"{folder}: {error}") from error
    return model
