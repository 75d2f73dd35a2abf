"""4-bit weights (QLoRA): the base in nf4 by bitsandbytes, frozen, under adapters that are trained.

Invariant: quantizing the same weights in the same way gives the same bits. The 4-bit weights are therefore never saved:
an adapter records in `quantization.json` how its base was quantized, and the base is quantized again when it is loaded.

Packed weights are always uint8, so nothing that casts floating-point weights, such as an engine, changes them.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from phi3v.base.errors import InputError
from phi3v.base.jsonfile import convert, read_object

FILE = "quantization.json"

# On CPUs with AVX512-BF16 bitsandbytes warns when it is imported, also by PEFT, that a package for kernels from the Hub
# is missing. Only the repacked weights that `_quantized` rules out would use them.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """How a base is quantized: the linears of its decoder layers and of `parts`, but never `lm_head`."""

    double_quant: bool = True
    """Quantize the scales of the blocks as well: 4.1 bits per weight instead of 4.5."""

    parts: tuple[Literal["vision", "projector"], ...] = ()
    """Parts that are quantized in addition to the decoder."""

    bits: Literal[4] = 4
    type: Literal["nf4"] = "nf4"
    block_size: Literal[64] = 64

    def __str__(self) -> str:
        twice = " with double quantization" if self.double_quant else ""
        return f"4-bit nf4{twice} ({', '.join(['decoder', *self.parts])})"


def read_quantization(folder: Path) -> Quantization | None:
    """How the base of the adapter in a folder was quantized, or None. Raises InputError, naming the file and field."""
    file = folder / FILE
    return convert(read_object(file), Quantization, str(file)) if file.is_file() else None


def write_quantization(folder: Path, how: Quantization) -> None:
    (folder / FILE).write_text(json.dumps(asdict(how), indent=1))


def quantize(
    model: Any,
    how: Quantization,
    *,
    compute_dtype: torch.dtype,
    device: torch.device | None = None,
    advance: Callable[[int], None] = lambda weights: None,
) -> int:
    """Replace linears by 4-bit ones, in place and one by one, so that memory use falls along the way.

    This happens on `device` (default: the device of each weight), to which `model.to(device)` must then move the rest
    of the model. On the meta device the packed weights have no memory either. `advance` is called with the number of
    weights of each linear. Returns the number of quantized weights. Raises InputError without bitsandbytes.
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
    model.is_loaded_in_4bit = True  # lets PEFT use its layer for 4-bit linears
    model.quantization = how
    return total


def compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Set the dtype in which 4-bit weights are multiplied, in the forward and the backward pass.

    bitsandbytes leaves that of the backward pass, which is in the quantization state, at the dtype of the unquantized
    weights: a float32 run on a bf16 checkpoint would compute gradients with other weights than the loss.
    """
    linear: Any
    for linear in model.modules():
        if getattr(linear, "quant_state", None) is not None:
            linear.compute_dtype = linear.weight.quant_state.dtype = dtype
            linear.compute_type_is_set = True  # otherwise the first input decides


def _linears(model: Any, how: Quantization) -> Iterator[tuple[nn.Module, str]]:
    """Parent and name of every linear to quantize. CLIP's last layer never runs and is left as it is."""
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
    # bitsandbytes 0.50: on a CPU with AVX512-BF16 a forward pass in eval mode repacks the weights in place for a kernel
    # without a backward pass, and every later gradient is wrong, without an error.
    new.support_avx512bf16_for_cpu = False
    new.bias = linear.bias
    weight, settings = linear.weight.detach(), {"quant_type": "nf4", "compress_statistics": how.double_quant}
    if weight.is_meta:
        packed = torch.empty((weight.numel() + 1) // 2, 1, dtype=torch.uint8, device="meta")
        new.weight = bnb.Params4bit(packed, bnb_quantized=True, module=new, **settings)
    else:
        target = weight.device if device is None else device
        new.weight = bnb.Params4bit(weight.to(target), module=new, **settings).to(target)  # quantizes
    return new.train(linear.training)
