"""LoRA adapters loaded from a folder onto their base.

PEFT would follow everything in adapter_config.json (import modules it names, repeat layers), read pickles, and
initialize missing tensors. Here only the settings of a LoRA adapter are accepted, any other setting must have PEFT's
default, and the tensors must be exactly those that the settings describe.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta
from safetensors import SafetensorError

from phi3v.base.errors import InputError
from phi3v.base.jsonfile import Fraction, check_values, read_object
from phi3v.model.weights import check_shapes, file_shapes

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

Rank = Annotated[int, Meta(ge=1, le=2**16)]
Alpha = Annotated[float, Meta(ge=0, le=1e6)]
Name = Annotated[str, Meta(pattern=r"^(?!.*[^/]{256})[^\x00]{1,4095}$")]  # that the file system can look up

REQUIRED: dict[str, Any] = {
    "peft_type": Literal["LORA"],
    "base_model_name_or_path": Name,
    "r": Rank,
    "target_modules": str | list[str],
}
OPTIONAL: dict[str, Any] = {
    "task_type": Literal["CAUSAL_LM"],
    "lora_alpha": Alpha,
    "lora_dropout": Fraction,
    "init_lora_weights": bool | Literal["gaussian", "pissa", "olora"],
    "use_dora": bool,
    "use_rslora": bool,
    "exclude_modules": str | list[str],
    "rank_pattern": dict[str, Rank],
    "alpha_pattern": dict[str, Alpha],
}
WITHOUT_EFFECT = {"auto_mapping", "inference_mode", "peft_version", "revision"}


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The settings of the adapter in a folder. Raises InputError, naming file and setting."""
    from peft import LoraConfig

    file = folder / CONFIG
    content = {name: value for name, value in read_object(file).items() if value is not None}
    settings = {name: value for name, value in content.items() if name in REQUIRED or name in OPTIONAL}
    check_values(f"{file}: ", settings, REQUIRED | {name: OPTIONAL[name] for name in OPTIONAL.keys() & settings.keys()})
    for name, default in LoraConfig().to_dict().items():
        if name not in {*settings, *WITHOUT_EFFECT} and (value := content.get(name)) and value != default:
            raise InputError(f"{file}: {name} is {value!r}, which is not supported")
    return settings


def load_adapter(base: Any, folder: Path) -> Any:
    """The base inside PEFT with the adapter of a folder, for inference. Raises InputError, naming file and tensor."""
    from peft import LoraConfig, PeftModel, get_peft_model_state_dict

    settings, found = read_adapter_config(folder), file_shapes(folder / WEIGHTS)
    rank = max((shape[0] for name, shape in found.items() if ".lora_A." in name and shape), default=0)
    highest = max(settings["r"], *settings.get("rank_pattern", {}).values(), 0)
    if highest > rank:  # checked before PEFT allocates the adapters
        raise InputError(f"{folder / CONFIG}: its rank is {highest}, but the tensors in {WEIGHTS} have {rank}")
    lora = {name: value for name, value in settings.items() if name not in ("peft_type", "task_type")}
    try:
        model = PeftModel(base, LoraConfig(**lora, inference_mode=True))
        expected = get_peft_model_state_dict(model, save_embedding_layers=False)
        check_shapes(str(folder / WEIGHTS), found, {name: tuple(tensor.shape) for name, tensor in expected.items()})
        if unexpected := sorted(found.keys() - expected.keys()):
            raise InputError(f"{folder / WEIGHTS}: {unexpected[0]} does not belong to this adapter and model")
        model.load_adapter(str(folder), "default")
    except InputError:
        raise
    except (OSError, RuntimeError, TypeError, ValueError, re.error, SafetensorError) as error:
        raise InputError(f"{folder}: {error}") from error
    return model
