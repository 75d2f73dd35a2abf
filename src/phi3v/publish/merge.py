"""`phi3v merge`: a LoRA adapter merged into its base model, with the logits compared before and after."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from rich.markup import escape
from torch import Tensor

from phi3v.base.console import say
from phi3v.base.errors import InputError
from phi3v.base.files import written_whole
from phi3v.base.hardware import name_of, pick_device, pick_dtype
from phi3v.data.processor import Phi3VProcessor
from phi3v.infer.answering import check_base, model_folder
from phi3v.model.adapter import read_adapter_config
from phi3v.model.loading import ADAPTER_CONFIG, load_model, save_model
from phi3v.model.parts import set_precision, widen
from phi3v.model.quantization import read_quantization

PROBE = "<|user|>\n<|image_1|>\nWhat is shown in this image?<|end|>\n<|assistant|>\nA chart with three bars.<|end|>\n"
# Relative difference of the logits (L2) that rounding may cause: of the merged weights to their own precision (bf16: 8
# bits), and of sums in another order. A wrong merge is off by as much as the adapter changes.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class Merged(NamedTuple):
    """An adapter merged into its base, in the base's own precision."""

    model: Any
    processor: Phi3VProcessor
    base: str
    """A folder, or a name on the Hub."""
    before: Tensor
    """The probe's logits of the base with its adapter."""
    after: Tensor
    """The probe's logits of the merged model."""


def merge(run: str, /, *, out: Path, base: str | None = None) -> Path:
    """Merge the adapter of a LoRA or QLoRA run into its base model.

    The result is a checkpoint in the published layout, in the base model's own precision: not quantized, even if the
    adapter was trained on a quantized base. Its logits are compared with those of the base and the adapter before
    anything is written, and with those of the model that was trained if that was quantized. `phi3v export` merges too,
    and adds a model card and what other programs need.

    Args:
        run: A run folder, or an adapter folder.
        out: Where the merged model goes. It must not exist.
        base: Where the base model is now. Default: where it was in training.
    """
    folder = source_folder(run, out, base)
    if not (folder / ADAPTER_CONFIG).is_file():
        raise InputError(f"{run}: there is no adapter to merge (no {ADAPTER_CONFIG}); is it already a whole model?")
    merged = merge_adapter(folder, pick_device(), base)
    with written_whole(out, new=True) as temporary:
        save_model(merged.model, merged.processor, temporary, carry_from=merged.base)
    say(f"merged model  {escape(str(out))}")
    return out


def source_folder(run: str, out: Path, base: str | None) -> Path:
    """The model folder of a run. Raises InputError if there is none, `out` exists, or `base` is not the run's."""
    check_base(run, base)
    folder = Path(model_folder(run))
    if not folder.is_dir():
        raise InputError(f"{run}: no such model folder")
    if out.exists():
        raise InputError(f"--out {out} exists already: choose another folder")
    return folder


def merge_adapter(folder: Path, device: torch.device, base: str | None = None) -> Merged:
    """Merge the adapter in a folder into its base, on `device`; `base` is where that is now.

    Raises InputError if the merge changes the logits.
    """
    from peft.tuners.lora import LoraLayer  # after phi3v.model.quantization, which silences bitsandbytes

    quantized = None
    if how := read_quantization(folder):
        say(f"loading the model as it was trained, on its base in {how}, then the unquantized one")
        quantized = probe(*load_model(folder, device=device, base=base), device)
    model, processor = load_model(folder, as_trained=False, base=base)
    own = model.dtype
    before = probe(model, processor, device)
    for layer in model.modules():
        if isinstance(layer, LoraLayer):  # summed in float32 and rounded once, one layer after the other
            layer.float().merge(safe_merge=True)
            layer.to(own)
    merged = model.unload().requires_grad_(False)
    set_precision(merged, own)
    after = probe(merged, processor, device)
    difference, limit = distance(after, before), TOLERANCE[own]
    say(f"merging changed the logits by {difference:.1e} (relative, {name_of(own)}; at most {limit:.0e} is allowed)")
    if not difference <= limit:
        raise InputError(f"{folder}: merging changed the logits by {difference:.1e}; nothing was written")
    if quantized is not None:
        gap = distance(after, quantized)
        say(f"the merged model is not quantized: its logits differ by {gap:.1e} (relative) from the trained model's")
    set_precision(merged, own)
    name = base or read_adapter_config(folder)["base_model_name_or_path"]
    return Merged(merged, processor, name, before, after)


def distance(logits: Tensor, expected: Tensor) -> float:
    """L2 norm of the difference relative to that of `expected`; infinite where the shapes differ."""
    return float((logits - expected).norm() / expected.norm()) if logits.shape == expected.shape else float("inf")


def probe(model: Any, processor: Phi3VProcessor, device: torch.device) -> Tensor:
    """Logits [L, V], float32, of one image and a sentence.

    The model is on `device` afterwards, and at least in the precision that the device is fast in: a CPU without units
    for bf16 takes a hundred times as long as in float32.
    """
    model.to(device).eval()
    widen(model, torch.promote_types(model.dtype, pick_dtype("auto", device)))
    inputs = processor(PROBE, [Image.linear_gradient("L").resize((400, 300))]).to(device)
    with torch.no_grad():
        return model(**inputs).logits[0].float()
