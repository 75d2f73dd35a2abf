"""Linears of the decoder multiplied in fp8 while they learn (torchao): approximate, and for Hopper and later.

Inputs and weights are scaled to e4m3, gradients of outputs to e5m2, each tensor by its own largest value, in every
step. The weights stay what they are, and so do checkpoints; in eval mode the products are the usual ones, so that a
score is one of the model that is saved.
"""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phi3v.base.errors import InputError
from phi3v.model.phi3v import Phi3VForCausalLM

CAPABILITY = (8, 9)
"""Of the first cards that multiply in fp8."""


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why fp8 products cannot be had here, in words; None if they can."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < CAPABILITY:
        return "it needs a GPU of the Hopper or Ada generation or later"
    if dtype != torch.bfloat16:
        return "it goes with --dtype bf16"
    return None if importlib.util.find_spec("torchao") else "it needs torchao: pip install 'phi3v[fp8]'"


def learn_in_fp8(model: Phi3VForCausalLM, *, emulate: bool = False) -> None:
    """Changes the decoder's linears in place; their weights are the same tensors.

    `emulate` rounds as the hardware does but multiplies as ever, anywhere. Raises InputError without torchao.
    """
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
        from torchao.float8.float8_linear import Float8Linear
    except ImportError as error:
        raise InputError("--fp8 needs torchao: pip install 'phi3v[fp8]'") from error

    class Fp8Linear(Float8Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if self.training else F.linear(x, self.weight)

    # A weight's gradient is a product over tokens, whose number is any: the kernel wants a multiple of 16.
    convert_to_float8_training(model.model.layers, config=Float8LinearConfig(emulate=emulate, pad_inner_dim=True))
    linear: nn.Module
    for linear in model.model.layers.modules():
        if isinstance(linear, Float8Linear):
            linear.__class__ = Fp8Linear
