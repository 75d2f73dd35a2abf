"""How much memory a run will need, by part: arithmetic on sizes, before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import nn

from phi3v.base.config import Optimizer
from phi3v.model.configuration import Phi3VConfig
from phi3v.model.parts import part_of
from phi3v.model.vision import PATCHES
from phi3v.packing.loss import ROWS_PER_CHUNK
from phi3v.packing.schedule import PackTrees
from phi3v.packing.trees import Lengths
from phi3v.train.adamw import BYTES
from phi3v.train.engines import Parallel

BUCKET, DEEPSPEED_BUFFERS = 5e8, 9
"""Weights that DeepSpeed sends at once (`parallel.zero`), and how often it holds as many: by its documentation, with
overlapping communication, 4.5 times for gradients and 4.5 for weights."""

CONTEXT_GB = 1.0
"""Memory of a GPU that CUDA's context, cuBLAS and NCCL take before the first weight. It is in no estimate."""

MEMORY_TO_USE, STEPS_LOOKED_AT = 0.9, 100
"""`--activation-checkpointing auto` plans with this share of the free memory, for the packs of this many steps."""

# What the ranks of an engine share out.
SHARED: dict[Parallel, tuple[str, ...]] = {
    "ddp": (),
    "zero1": ("optimizer",),
    "zero2": ("optimizer", "gradients"),
    "zero3": ("optimizer", "gradients", "weights"),
    "fsdp2": ("optimizer", "gradients", "weights"),
}


def largest_pack(lengths: Lengths, steps: Iterable[list[list[PackTrees]]]) -> dict[str, int]:
    """Most tokens, crops and target rows of any pack of some steps, whose packs are given by rank."""
    packs = [pack for step in steps for of_rank in step for pack in of_rank]
    return {
        "tokens": max(sum(tree.tokens for tree in pack) for pack in packs),
        "crops": max(sum(tree.crops for tree in pack) for pack in packs),
        "rows": max(sum(int(lengths.num_targets[i]) for tree in pack for i in tree.examples) for pack in packs),
    }


def estimate(
    model: nn.Module,
    config: Phi3VConfig,
    *,
    tokens: int,
    crops: int,
    rows: int,
    bytes_per_value: int,
    recompute: int,
    engine: Parallel = "ddp",
    num_ranks: int = 1,
    optimizer: Optimizer = "adamw",
) -> dict[str, float]:
    """GB of a device by part for the largest pack: `tokens` and `crops` run through the layers, `rows` get logits.

    `optimizer` says what a weight that learns takes, with its gradient and both moments, `engine` what `num_ranks`
    share out. Activations are what the layers keep for the backward pass (`_kept_by`); the first `recompute` layers (of
    the decoder, then of CLIP) keep their input alone. An estimate: the allocator and the CUDA context come on top.
    Checked by `benchmarks/memory.py` against measured peaks and the guide's table; compiled layers keep less.
    """
    learn = frozen = outside = layer = 0.0
    learns, norms = set[str](), False
    for name, parameter in model.named_parameters():
        number = parameter.numel()
        if parameter.requires_grad:
            learn += number
            learns.add(part_of(name))
            norms |= name.endswith("layernorm.weight")
        else:
            frozen += number * (bytes_per_value if parameter.is_floating_point() else parameter.element_size())
        outside += 0 if ".layers." in name else number
        layer += number if ".layers.0." in name and part_of(name) == "decoder" else 0
    each, clip, half = BYTES[optimizer], config.clip, bytes_per_value < 4
    weight, moments = each.weight, each.moments
    if engine.startswith("zero") and half:  # DeepSpeed holds the model in that precision, and masters with the moments
        weight, moments = bytes_per_value, moments + 4
    stream = weight if "embeddings" in learns else bytes_per_value
    decoder, tower = _kept_by(config, bytes_per_value, stream=stream, norms=norms)
    in_decoder = min(recompute, config.num_hidden_layers)
    clip_layers = clip["num_hidden_layers"] - 1 if "vision" in learns else 0
    in_clip, patches = min(recompute - in_decoder, clip_layers), crops * PATCHES
    kept = (config.num_hidden_layers - in_decoder) * decoder * tokens + (clip_layers - in_clip) * tower * patches
    kept += in_decoder * stream * config.hidden_size * tokens + in_clip * 4 * clip["hidden_size"] * patches
    # A layer that is computed again finds what later ones held free. Where there are none, it needs room of its own,
    # and for the gradients that go through it; decoder and CLIP one after the other.
    again = [decoder * tokens] if in_decoder == config.num_hidden_layers else []
    again += [tower * patches] if 0 < in_clip == clip_layers else []
    kept += 2 * max(again, default=0.0)
    # Autocast keeps a copy, in the precision of the arithmetic, of every wider weight it has met.
    copies = bytes_per_value if engine == "ddp" and bytes_per_value < each.weight else 0
    parts = {
        "weights": (weight + copies) * learn + frozen,
        "gradients": each.gradient * learn,
        "optimizer": moments * learn,
        "activations": kept,
        "logits": 3 * 4 * min(rows, ROWS_PER_CHUNK) * config.vocab_size,
    }
    shared = {name: size / (num_ranks if name in SHARED[engine] else 1) for name, size in parts.items()}
    if num_ranks > 1 and "weights" in SHARED[engine]:  # a layer, the next one, and what is in none are whole
        shared["weights"] += weight * (2 * layer + outside)
        shared["gradients"] += each.gradient * (layer + outside) * bool(learns & {"decoder"})
    if num_ranks > 1 and engine in ("zero1", "zero2"):
        shared["gradients"] += DEEPSPEED_BUFFERS * min(BUCKET, learn) * bytes_per_value
    gigabytes = {name: size / 1e9 for name, size in shared.items()}
    return {**gigabytes, "total": sum(gigabytes.values())}


def _kept_by(config: Phi3VConfig, size: int, *, stream: float, norms: bool) -> tuple[float, float]:
    """Bytes that a decoder layer keeps for a token, and a CLIP layer for a patch; counted on tensors that are kept.

    Of the decoder (H, F its widths, arithmetic in `size` bytes a value, `stream` bytes between the layers): each of two
    norms its input in float32, its result twice (once, if its weight does not learn); attention 7 H (q, k, the product
    that q, k and v come from, and the result twice); the MLP 4 F. The last layer, of which most rows are spared, stands
    for embeddings and projector. Of CLIP: two norms 8 D in float32, what goes into the linears, q, k, v and the result;
    the MLP 3 F.
    """
    decoder = (2 * (4 + norms * stream + size) + 7 * size) * config.hidden_size + 4 * size * config.intermediate_size
    clip = config.clip
    return decoder, (16 + 4 * size) * clip["hidden_size"] + 3 * size * clip["intermediate_size"]


def layers_to_recompute(free_gb: float, most: int, needed: Callable[[int], float]) -> int:
    """The fewest layers, up to `most`, such that `needed(layers)` GB fit into `free_gb`; `most` if nothing fits."""
    return next((layers for layers in range(most) if needed(layers) <= free_gb), most)
