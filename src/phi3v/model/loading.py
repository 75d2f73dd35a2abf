"""Models from folders: a checkpoint in the published layout, an adapter on top of one, and back to a folder."""

from __future__ import annotations

import shutil
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
    num_crops: int | None = None,
    as_trained: bool = True,
    device: torch.device | None = None,
) -> tuple[Any, Phi3VProcessor]:
    """The model in a folder (or on the Hub) with its processor; an adapter folder comes on its base, in PEFT.

    `dtype` is the checkpoint's own by default. The base of an adapter is quantised if it was in training, unless not
    `as_trained`: on `device`, where a GPU needs seconds; everything else is on the CPU. Raises InputError, in one
    line, when there is nothing usable.
    """
    folder = Path(name)
    if (folder / ADAPTER_CONFIG).is_file():
        how = read_quantization(folder) if as_trained else None
        return _load_adapter(folder, how, dtype, attention, num_crops, device)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise InputError(f"{name}: no model here, the folder has neither config.json nor {ADAPTER_CONFIG}")
    processor = Phi3VProcessor.from_pretrained(name, num_crops=num_crops)
    transformers_logging.disable_progress_bar()
    try:
        model = Phi3VForCausalLM.from_pretrained(name, dtype=dtype, attn_implementation=attention)
    except InputError:
        raise
    except (OSError, ImportError, ValueError, SafetensorError) as error:
        raise InputError(f"{name}: {first_line(error)}") from error
    if processor.image_token_id != model.config.image_token_id:
        raise InputError(
            f"{name}: the tokenizer's <|image|> is {processor.image_token_id}, "
            f"config.json says {model.config.image_token_id}"
        )
    if (highest := max(processor.tokenizer.get_vocab().values())) >= model.config.vocab_size:
        raise InputError(
            f"{name}: the tokenizer has token {highest}, config.json a vocab_size of {model.config.vocab_size}"
        )
    return model, processor


def _load_adapter(
    folder: Path,
    how: Quantization | None,
    dtype: torch.dtype | str,
    attention: str,
    num_crops: int | None,
    device: torch.device | None,
) -> tuple[Any, Phi3VProcessor]:
    base_name = read_adapter_config(folder)["base_model_name_or_path"]
    try:
        if (Path(base_name) / ADAPTER_CONFIG).is_file():
            raise InputError(f"{base_name} is an adapter itself")
        # What is quantised is the checkpoint in its own precision, as in training, whatever `dtype` is.
        base, _ = load_model(base_name, dtype="auto" if how else dtype, attention=attention)
    except InputError as error:
        raise InputError(f"{folder}: the adapter's base model cannot be loaded: {error}") from error
    if how:
        quantize(base, how, compute_dtype=base.dtype, device=device)
        if isinstance(dtype, torch.dtype):
            set_precision(base.requires_grad_(False), dtype)
    model = load_adapter(base, folder)
    return model, Phi3VProcessor.from_pretrained(folder, num_crops=num_crops)


def save_model(model: Any, processor: Phi3VProcessor, folder: Path, *, carry_from: str | Path | None = None) -> None:
    """Writes the model (if it is inside PEFT, its adapter and how its base is quantised) and the processor's files.

    The published remote code beside the base checkpoint, `carry_from`, is carried along: it is never run here, but
    other readers of the layout look for it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if hasattr(model, "peft_config"):
        for adapter in model.peft_config.values():  # a relative path would only work from this folder
            base = adapter.base_model_name_or_path
            if base and Path(base).is_dir():
                adapter.base_model_name_or_path = str(Path(base).resolve())
        # "auto" would put the whole base lm_head into the adapter file, because lm_head has an adapter
        model.save_pretrained(folder, save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's template for a model card, all blanks
        if how := getattr(model, "quantization", None):
            write_quantization(folder, how)
    else:
        model.save_pretrained(folder)
        if carry_from is not None and Path(carry_from).is_dir():
            for file in Path(carry_from).glob("*_phi3_v.py"):
                shutil.copy(file, folder)
    processor.save_pretrained(folder)


def load_config(name: str | Path) -> Phi3VConfig:
    """The configuration alone, without weights."""
    try:
        return Phi3VConfig.from_pretrained(name)
    except OSError as error:
        raise InputError(f"{name}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """The first sentence of a library's long message."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
