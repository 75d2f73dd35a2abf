"""The decoder's linears in fp8 during training (torchao): approximate, for Ada, Hopper and later GPUs.

In every step inputs and weights are scaled to e4m3 and gradients of outputs to e5m2, each tensor by its own maximum.
Weights and checkpoints do not change, and in eval mode the linears are not in fp8, so scores are those of the saved
model.
"""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phi3v.base.errors import InputError
from phi3v.model.phi3v import Phi3VForCausalLM

CAPABILITY = (8, 9)
"""Compute capability of the first GPUs with fp8 products."""


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why fp8 products are not available on this device in this dtype, or None if they are."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < CAPABILITY:
        return "it needs a GPU of the Hopper or Ada generation or later"
    if dtype != torch.bfloat16:
        return "it goes with --dtype bf16"
    return None if importlib.util.find_spec("torchao") else "it needs torchao: pip install 'phi3v[fp8]'"


def learn_in_fp8(model: Phi3VForCausalLM, *, emulate: bool = False) -> None:
    """Convert the decoder's linears in place; their weights remain the same tensors.

    With `emulate` values are rounded to fp8 but multiplied in their own dtype, which runs on any device. Raises
    InputError without torchao.
    """
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
        from torchao.float8.float8_linear import Float8Linear
    except ImportError as error:
        raise InputError("--fp8 needs torchao: pip install 'phi3v[fp8]'") from error

    class Fp8Linear(Float8Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if self.training else F.linear(x, self.weight)

    # The gradient of a weight is a product over tokens, and the kernel needs a multiple of 16.
    convert_to_float8_training(model.model.layers, config=Float8LinearConfig(emulate=emulate, pad_inner_dim=True))
    linear: nn.Module
    for linear in model.model.layers.modules():
        if isinstance(linear, Float8Linear):
            linear.__class__ = Fp8Linear
