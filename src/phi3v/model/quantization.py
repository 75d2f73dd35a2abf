"""4-bit weights (QLoRA): the base in nf4 by bitsandbytes, frozen; what learns are adapters on top.

Invariant: quantising the same weights the same way gives the same bits. The 4-bit weights are therefore never
saved: an adapter remembers in `quantization.json` how its base was quantised, and the base is quantised anew.

Packed weights are always uint8, so nothing that casts floating-point weights, an engine for one, can touch them.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from phi3v.base.errors import InputError
from phi3v.base.jsonfile import read_object

Part = Literal["vision", "projector"]
"""What may be quantised beside the decoder."""

FILE = "quantization.json"
FORMAT = {"bits": 4, "type": "nf4", "block_size": 64}

# On CPUs with AVX512-BF16, importing bitsandbytes (PEFT does, too) complains that a package for kernels from the Hub is
# missing. Only the repacked weights that `_quantized` rules out would use them.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """How a base is quantised: the linears of its decoder layers, and those of `parts`; never `lm_head`."""

    double_quant: bool = True
    """Quantise the scale of every block, too: 4.1 bits a weight instead of 4.5."""

    parts: tuple[Part, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(part for part in get_args(Part) if part in self.parts))

    def __str__(self) -> str:
        twice = " with double quantisation" if self.double_quant else ""
        return f"4-bit nf4{twice} ({', '.join(['decoder', *self.parts])})"

    def to_dict(self) -> dict[str, Any]:
        return {**FORMAT, **asdict(self), "parts": list(self.parts)}


def read_quantization(folder: Path) -> Quantization | None:
    """How the base of the adapter in a folder was quantised; None if it was not. Raises InputError."""
    file = folder / FILE
    if not file.is_file():
        return None
    found = read_object(file)
    parts, double_quant = found.get("parts"), found.get("double_quant")
    how = Quantization(double_quant=double_quant is True, parts=tuple(parts) if isinstance(parts, list) else ())
    if how.to_dict() != found:
        raise InputError(f"{file}: describes no quantisation that this version knows")
    return how


def write_quantization(folder: Path, how: Quantization) -> None:
    (folder / FILE).write_text(json.dumps(how.to_dict(), indent=1))


def quantize(
    model: Any,
    how: Quantization,
    *,
    compute_dtype: torch.dtype,
    device: torch.device | None = None,
    advance: Callable[[int], None] = lambda weights: None,
) -> int:
    """Replaces linears by 4-bit ones, in place and one by one, so that memory falls as it goes.

    On `device` (default: where each weight is), which must be where the model goes; `model.to(device)` moves the rest.
    `advance` is told the weights of every linear that is done. Returns how many weights were quantised; a model without
    memory (on the meta device) gets packed weights without memory. Raises InputError without bitsandbytes.
    """
    try:
        import bitsandbytes
    except ImportError as error:
        raise InputError("4-bit weights need bitsandbytes: pip install 'phi3v[qlora]'") from error
    total = 0
    for parent, name in list(_linears(model, how)):
        linear = getattr(parent, name)
        setattr(parent, name, _quantized(linear, how, device, bitsandbytes.nn))
        total += linear.weight.numel()
        advance(linear.weight.numel())
    compute_in(model, compute_dtype)
    model.is_loaded_in_4bit = True  # PEFT asks for this before it takes its own layer for 4-bit linears
    model.quantization = how
    return total


def compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    """The precision 4-bit weights are multiplied in: in the forward pass the module's, in the backward the state's.

    bitsandbytes leaves the latter at the unquantised weights' own: a float32 run on a bf16 checkpoint would
    differentiate with weights rounded to bf16, other than those it computes with.
    """
    linear: Any
    for linear in model.modules():
        if getattr(linear, "quant_state", None) is not None:
            linear.compute_dtype = linear.weight.quant_state.dtype = dtype
            linear.compute_type_is_set = True  # or the first input decides


def _linears(model: Any, how: Quantization) -> Iterator[tuple[nn.Module, str]]:
    """Parent and name of every linear to quantise. CLIP's last layer is never run and stays as it is."""
    embedder = model.model.vision_embed_tokens
    roots = [model.model.layers]
    roots += [embedder.img_processor.vision_model.encoder.layers[:-1]] if "vision" in how.parts else []
    roots += [embedder.img_projection] if "projector" in how.parts else []
    for root in roots:
        for parent in root.modules():
            for name, child in parent.named_children():
                if type(child) is nn.Linear:
                    yield parent, name


def _quantized(linear: nn.Linear, how: Quantization, device: torch.device | None, bnb: Any) -> nn.Module:
    new = bnb.Linear4bit(linear.in_features, linear.out_features, bias=False, quant_type="nf4", device="meta")
    # bitsandbytes 0.50: on a CPU with AVX512-BF16, one forward pass in eval mode repacks the weights in place for a
    # kernel without a backward pass; every later gradient is wrong, without an error.
    new.support_avx512bf16_for_cpu = False
    new.bias = linear.bias
    weight, settings = linear.weight.detach(), {"quant_type": "nf4", "compress_statistics": how.double_quant}
    if weight.is_meta:
        packed = torch.empty((weight.numel() + 1) // 2, 1, dtype=torch.uint8, device="meta")
        new.weight = bnb.Params4bit(packed, bnb_quantized=True, module=new, **settings)
    else:
        target = weight.device if device is None else device
        new.weight = bnb.Params4bit(weight.to(target), module=new, **settings).to(target)  # quantises
    return new.train(linear.training)
