"""A LoRA adapter into its base model, checked: the merged model must say what the two said together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.markup import escape
from torch import Tensor

from phi3v.checkpoint import written_whole
from phi3v.data.processor import Phi3VProcessor
from phi3v.errors import InputError
from phi3v.evaluate import model_folder
from phi3v.hardware import pick_device
from phi3v.model.loading import ADAPTER_CONFIG, load_model, save_model
from phi3v.runlog import say

PROBE = "<|user|>\n<|image_1|>\nWhat is shown in this image?<|end|>\n<|assistant|>\nA chart with three bars.<|end|>\n"
# Relative difference of the logits (L2) that rounding may cause: of the merged weights to their own precision (bf16: 8
# bits), and of sums in another order. A merge gone wrong is off by as much as the adapter changed.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def merge(run: str, /, *, out: Path) -> Path:
    """Merge the adapter of a LoRA run into its base model.

    The result is a checkpoint in the published layout, in the base model's own precision. Its logits are compared with
    those of the base and the adapter before anything is written.

    Args:
        run: A run folder, or an adapter folder.
        out: Where the merged model goes. It must not exist.
    """
    folder = Path(model_folder(run))
    if not folder.is_dir():
        raise InputError(f"{run}: no such model folder")
    if not (folder / ADAPTER_CONFIG).is_file():
        raise InputError(f"{run}: there is no adapter to merge (no {ADAPTER_CONFIG}); is it already a whole model?")
    if out.exists():
        raise InputError(f"--out {out} exists already: choose another folder")
    model, processor = load_model(folder)
    device = pick_device()
    model.to(device).eval()
    before = _probe(model, processor, device)
    base = json.loads((folder / ADAPTER_CONFIG).read_text())["base_model_name_or_path"]
    merged = model.merge_and_unload(safe_merge=True)
    after = _probe(merged, processor, device)
    difference = float((after - before).norm() / before.norm())
    limit = TOLERANCE[merged.dtype]
    say(
        f"logits before and after merging differ by {difference:.1e} "
        f"(relative, {merged.dtype}; at most {limit:.0e} allowed)"
    )
    if not difference <= limit:
        raise InputError(
            f"{run}: merging changed the model, its logits differ by {difference:.1e}; nothing was written"
        )
    with written_whole(out) as temporary:
        save_model(merged, processor, temporary, carry_from=base)
    say(f"merged model  {escape(str(out))}")
    return out


def _probe(model: Any, processor: Phi3VProcessor, device: torch.device) -> Tensor:
    """Logits [L, V], float32, of one picture and a sentence."""
    picture = Image.linear_gradient("L").resize((336, 336))
    inputs = processor(PROBE, [picture]).to(device)
    with torch.no_grad():
        return model(**inputs).logits[0].float()
