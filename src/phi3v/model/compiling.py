"""torch.compile, layer by layer: all decoder layers run the same two compiled halves, all CLIP layers the same whole.

The graphs are those of a layer, not of its weights or of a pack's length: whatever the number of layers and however
long the packs, there are a few of them. Names of parameters stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from phi3v.model.decoder import HALVES, Phi3VDecoderLayer
from phi3v.model.vision import CLIPLayer


def compile_layers(model: nn.Module, **how: Any) -> None:
    """Compiles the layers of a model, bare or inside PEFT, in place; `how` is for `torch.compile`."""
    how = {"dynamic": True, **how}
    before, after = (torch.compile(half, **how) for half in HALVES)
    for module in model.modules():
        if isinstance(module, Phi3VDecoderLayer):
            module.compiled = (before, after)
        elif isinstance(module, CLIPLayer):
            module.compile(**how)
