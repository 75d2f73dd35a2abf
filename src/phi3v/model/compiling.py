"""torch.compile, layer by layer: all decoder layers share two compiled halves, all CLIP layers one compiled forward.

A graph depends neither on the weights of a layer nor on the length of a pack, so there are only a few graphs for any
number of layers and packs of any length. Names of parameters do not change.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from phi3v.model.decoder import HALVES, Phi3VDecoderLayer
from phi3v.model.vision import CLIPLayer


def compile_layers(model: nn.Module, **how: Any) -> None:
    """Compile the layers of a model, bare or inside PEFT, in place; `how` are arguments of `torch.compile`."""
    how = {"dynamic": True, **how}
    before, after = (torch.compile(half, **how) for half in HALVES)
    for module in model.modules():
        if isinstance(module, Phi3VDecoderLayer):
            module.compiled = (before, after)
        elif isinstance(module, CLIPLayer):
            module.compile(**how)
