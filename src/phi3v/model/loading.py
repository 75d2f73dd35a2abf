"""Loading and saving models: checkpoints in the published layout, and adapters on top of them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from phi3v.base.errors import InputError
from phi3v.data.processor import Phi3VProcessor
from phi3v.model.adapter import CONFIG as ADAPTER_CONFIG
from phi3v.model.adapter import load_adapter, read_adapter_config
from phi3v.model.configuration import Phi3VConfig
from phi3v.model.parts import set_precision
from phi3v.model.phi3v import Phi3VForCausalLM
from phi3v.model.quantization import Quantization, quantize, read_quantization, write_quantization


def load_model(
    name: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    attention: str = "sdpa",
    as_trained: bool = True,
    device: torch.device | None = None,
    base: str | None = None,
    **seeing: Any,
) -> tuple[Any, Phi3VProcessor]:
    """The model in a folder or on the Hub, and its processor. An adapter is loaded onto its base, inside PEFT.

    `base` is where the base of an adapter is now, if not where the adapter says.

    `dtype` is by default that of the checkpoint, and `seeing` are keywords of `Phi3VProcessor.from_pretrained`. With
    `as_trained` the base of an adapter is quantized if it was quantized in training, on `device`; everything else is on
    the CPU. Raises InputError if the model cannot be loaded.
    """
    folder = Path(name)
    if (folder / ADAPTER_CONFIG).is_file():
        how = read_quantization(folder) if as_trained else None
        return _load_adapter(folder, how, dtype, attention, device, base, seeing)
    if base is not None:
        raise InputError(f"--base {base} has no effect: {name} is no adapter")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise InputError(f"{name}: no model here, the folder has neither config.json nor {ADAPTER_CONFIG}")
    processor = Phi3VProcessor.from_pretrained(name, **seeing)
    transformers_logging.disable_progress_bar()
    try:
        model = Phi3VForCausalLM.from_pretrained(name, dtype=dtype, attn_implementation=attention)
    except InputError:
        raise
    except (OSError, ImportError, ValueError, SafetensorError) as error:
        raise InputError(f"{name}: {first_line(error)}") from error
    config, image = model.config, processor.image_token_id
    if image != config.image_token_id:
        raise InputError(f"{name}: the tokenizer's <|image|> is {image}, config.json says {config.image_token_id}")
    if (highest := max(processor.tokenizer.get_vocab().values())) >= config.vocab_size:
        raise InputError(f"{name}: the tokenizer has token {highest}, config.json a vocab_size of {config.vocab_size}")
    return model, processor


def _load_adapter(
    folder: Path,
    how: Quantization | None,
    dtype: torch.dtype | str,
    attention: str,
    device: torch.device | None,
    base_name: str | None,
    seeing: Mapping[str, Any],
) -> tuple[Any, Phi3VProcessor]:
    base_name = base_name or read_adapter_config(folder)["base_model_name_or_path"]
    try:
        if (Path(base_name) / ADAPTER_CONFIG).is_file():
            raise InputError(f"{base_name} is an adapter itself")
        # For any `dtype`, the checkpoint is quantized in its own precision, as in training.
        base, _ = load_model(base_name, dtype="auto" if how else dtype, attention=attention)
    except InputError as error:
        raise InputError(f"{folder}: the adapter's base model cannot be loaded: {error} (--base DIR)") from error
    if how:
        quantize(base, how, compute_dtype=base.dtype, device=device)
        if isinstance(dtype, torch.dtype):
            set_precision(base.requires_grad_(False), dtype)
    model = load_adapter(base, folder)
    return model, Phi3VProcessor.from_pretrained(folder, **seeing)


def save_model(model: Any, processor: Phi3VProcessor, folder: Path, *, carry_from: str | Path | None = None) -> None:
    """Save the model and the files of the processor; of a model inside PEFT, the adapter and how its base is quantized.

    The published remote code in `carry_from`, the folder of the base checkpoint, is copied: it never runs here, but
    other programs that read the layout expect it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if hasattr(model, "peft_config"):
        for adapter in model.peft_config.values():  # a relative path would depend on the working directory
            base = adapter.base_model_name_or_path
            if base and Path(base).is_dir():
                adapter.base_model_name_or_path = str(Path(base).resolve())
        # "auto" would save the lm_head of the base in the adapter file, because lm_head has an adapter
        model.save_pretrained(folder, save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty template of a model card
        if how := getattr(model, "quantization", None):
            write_quantization(folder, how)
    else:
        model.save_pretrained(folder)
        if carry_from is not None and Path(carry_from).is_dir():
            for file in Path(carry_from).glob("*_phi3_v.py"):
                shutil.copy(file, folder)
    processor.save_pretrained(folder)


def load_config(name: str | Path) -> Phi3VConfig:
    """The configuration of a model. Raises InputError if it cannot be read."""
    try:
        return Phi3VConfig.from_pretrained(name)
    except OSError as error:
        raise InputError(f"{name}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """The first line of an error message, or the type of an error without one."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
