"""How much faster than the original recipe, and by what: `phi3v bench`.

The original runs one example at a time: every picture padded to `num_crops` + 1 crops, all layers of CLIP, logits of
all tokens in float32, every layer's activations computed twice. Here that is our own model with every saving switched
off, and then one saving after the other is switched on, for the same weights, pictures and examples and with the same
attention kernel and optimizer. All variants take turns in one run, so that a busy machine slows all of them alike, and
all compute the same loss.
"""

from __future__ import annotations

import ctypes
import gc
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import DynamicCache
from tyro.conf import arg

from phi3v.config import Optim
from phi3v.data.chat import Encoded, Example, Turn, encode
from phi3v.data.chat import questions as questions_of
from phi3v.data.loader import Reading, prompt_packs, training_packs
from phi3v.data.pack import Pack
from phi3v.data.plan import PlanSettings, Step, plan_epoch
from phi3v.data.processor import Phi3VProcessor
from phi3v.data.tree import Lengths, PackLimits
from phi3v.errors import InputError
from phi3v.evaluate import answer
from phi3v.files import write_text
from phi3v.hardware import environment, pick_device, pick_dtype, pick_tokens_per_pack
from phi3v.labels import score_labels
from phi3v.loss import weighted_cross_entropy
from phi3v.model import Phi3VConfig, Phi3VForCausalLM
from phi3v.model.parts import add_lora, freeze, set_precision
from phi3v.model.quantization import Quantization, quantize
from phi3v.optim import build_optimizer
from phi3v.parallel.engine import bare
from phi3v.perf import Products, device_peak_tflops, training_flops
from phi3v.recipes.easy_vqa import build_tokenizer
from phi3v.runlog import console, progress_bar, say

Mode = Literal["full", "frozen", "lora", "qlora"]
Task = Literal["docvqa", "nlvr2", "memes", "ucf101"]

SAVINGS = {
    "recompute": "activations are kept, not computed again",
    "logits": "logits at supervised rows only",
    "rows": "the last layer at supervised rows only",
    "crops": "CLIP without its last layer and without padding",
    "packs": "several pages in one pass",
    "pages": "a page once for all its questions",
}
"""In the order in which they are switched on."""

WORDS = ("what", "is", "written", "in", "line", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ANSWER = "seven eight nine"


class Shape(NamedTuple):
    """What an example of a task looks at."""

    images: int
    size: tuple[int, int]
    """Width and height in pixels."""
    num_crops: int


SHAPES: dict[Task, Shape] = {
    "docvqa": Shape(1, (1275, 1650), 16),
    "nlvr2": Shape(2, (1024, 768), 16),
    "memes": Shape(1, (800, 600), 16),
    "ucf101": Shape(8, (320, 240), 4),
}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to compute the same loss."""

    name: str
    savings: frozenset[str]
    questions: int = 1
    """Asked about each page. The original computes each by itself, so that one tells what four cost."""


def variants(questions: int, *, ablation: bool) -> list[Variant]:
    """The original; one more saving at a time, or only all of them; and all of them with activations computed twice."""
    names = [name for name in SAVINGS if name != "pages"]
    found = [Variant(name="original", savings=frozenset())]
    if ablation:
        steps = [(f"+ {SAVINGS[names[n - 1]]}", frozenset(names[:n])) for n in range(1, len(names))]
        found += [Variant(name=name, savings=savings) for name, savings in steps]
    everything = frozenset(SAVINGS)
    for each in dict.fromkeys((1, questions)):
        name = f"phi3v, {each} question{'s' if each > 1 else ''} a page"
        found.append(Variant(name=name, savings=everything, questions=each))
        found.append(Variant(name=f"{name}, recomputing", savings=everything - {"recompute"}, questions=each))
    return found


# -- the model, with savings switched off ------------------------------------------------------------------------------


def loss_of(model: Any, pack: Pack, savings: frozenset[str], num_crops: int) -> Tensor:
    """The pack's loss, a float32 scalar, the way `savings` say. `model` is plain or inside PEFT."""
    inner: Phi3VForCausalLM = bare(model)
    with nullcontext() if "crops" in savings else _wasteful(inner, pack, num_crops):
        x = inner.model.embed_pack(pack)
    hidden = inner.model.decode_layout(x, pack.layout, pack.rows if "rows" in savings else None)
    if "rows" not in savings and "logits" in savings:
        hidden = hidden[pack.rows]
    logits = inner.lm_head(hidden).float()
    if "rows" in savings or "logits" in savings:
        return weighted_cross_entropy(logits, pack.targets, pack.weights)
    targets = torch.full((pack.tokens,), -100, device=logits.device).index_copy(0, pack.rows, pack.targets)
    weights = torch.zeros(pack.tokens, device=logits.device).index_copy(0, pack.rows, pack.weights)
    return (F.cross_entropy(logits, targets, ignore_index=-100, reduction="none") * weights).sum()


@contextmanager
def _wasteful(model: Phi3VForCausalLM, pack: Pack, num_crops: int) -> Iterator[None]:
    """CLIP as the original runs it: all layers, and every picture filled up with crops of zeros."""
    tower = model.model.vision_embed_tokens.img_processor.vision_model
    wanted = pack.image_sizes.shape[0] * (num_crops + 1)

    def forward(crops: Tensor) -> Tensor:
        padded = torch.cat([crops, crops.new_zeros(max(0, wanted - crops.shape[0]), *crops.shape[1:])])
        x = before_last = tower.pre_layrnorm(tower.embeddings(padded))
        for layer in tower.encoder.layers:
            before_last = x
            if tower.gradient_checkpointing and torch.is_grad_enabled():
                assert tower._gradient_checkpointing_func is not None
                x = tower._gradient_checkpointing_func(layer.__call__, x)
            else:
                x = layer(x)
        return before_last[: crops.shape[0], 1:]

    tower.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del tower.forward


# -- what it costs on paper --------------------------------------------------------------------------------------------


def hardware_flops(model: Any, config: Phi3VConfig, step: Step, savings: frozenset[str], shape: Shape) -> float:
    """Floating-point operations that a variant runs for a step, those that are run twice included."""
    needed, one = training_flops(model, config), Products.of(config)
    layers, clip_layers = config.num_hidden_layers, config.clip["num_hidden_layers"] - 1
    times = needed.per_row / (one.rest + one.head)  # 2 for each pass: forward, and backward with or without weights
    pairs, clip_layer = 2.0 * one.pair * step.pairs, 2.0 * (one.clip_layer + one.clip_pairs)
    work, crops = needed.of(step), step.crops
    if "rows" not in savings:
        work += times * one.rest * (step.tokens - step.rows) + 3 * pairs
        if "logits" not in savings:
            work += times * one.head * (step.tokens - step.rows)
    if "crops" not in savings:
        crops = step.examples * shape.images * (shape.num_crops + 1)
        # Crops of zeros go through CLIP, forward and backward, but not through the projector; the last layer forward.
        work += (crops - step.crops) * (needed.per_crop - times * sum(one.projector)) + crops * clip_layer
    if "recompute" not in savings:
        work += (2.0 * (one.keys + one.rest) * step.tokens + pairs) * (layers - ("rows" in savings))
        learns = any(p.requires_grad for name, p in model.named_parameters() if "img_processor" in name)
        work += learns * crops * clip_layer * clip_layers
    return work


# -- the examples ------------------------------------------------------------------------------------------------------


SIZES: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 512,
    "intermediate_size": 1365,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "vision_config": {"hidden_size": 160, "intermediate_size": 640, "num_hidden_layers": 6, "num_attention_heads": 5},
}
"""The real model's proportions: head and vision weigh about what they weigh there."""


def build_model(mode: Mode, processor: Phi3VProcessor, device: torch.device, dtype: torch.dtype) -> Any:
    """Random weights, 24 million of them instead of four billion."""
    ones = [1.0] * (SIZES["hidden_size"] // SIZES["num_attention_heads"] // 2)
    config = Phi3VConfig(
        rope_scaling={"type": "su", "short_factor": ones, "long_factor": ones},
        image_token_id=processor.image_token_id,
        pad_token_id=processor.pad_token_id,
        **SIZES,
    )
    torch.manual_seed(0)
    return prepare(Phi3VForCausalLM(config).to(device), mode, dtype)


def prepare(model: Any, mode: Mode, dtype: torch.dtype) -> Any:
    """Sets what learns: all of it, all but the image embedder, or adapters everywhere, over 4-bit weights or not."""
    if mode == "qlora":
        where = next(model.parameters()).device
        freeze(model, ())
        quantize(model, Quantization(), compute_dtype=dtype, device=None if where.type == "meta" else where)
    if mode in ("lora", "qlora"):
        model = add_lora(model, frozen=(), rank=64, alpha=256, dropout=0.0, init="default", dora=False, rslora=False)
    else:
        freeze(model, ("vision", "projector") if mode == "frozen" else ())
    set_precision(model, dtype)
    return model.train()


def make_examples(folder: Path, shape: Shape, pages: int, questions: int) -> list[Example]:
    """Pages of noise with questions about them, page by page."""
    pick, noise, found = random.Random(0), np.random.default_rng(0), []
    for page in range(pages):
        files = []
        for number in range(shape.images):
            file = folder / f"{page}-{number}.png"
            if not file.exists():
                width, height = shape.size
                picture = noise.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
                Image.fromarray(picture).resize(shape.size).save(file, compress_level=1)
            files.append(str(file))
        for question in range(questions):
            turn = Turn(user=" ".join(pick.choices(WORDS, k=12)), assistant=ANSWER, images=tuple(files))
            found.append(Example(id=f"{page}-{question}", turns=(turn,)))
    return found


def packs_of(
    encoded: Sequence[Encoded], processor: Phi3VProcessor, savings: frozenset[str], limits: PackLimits
) -> tuple[list[Pack], Step]:
    """One optimizer step over all the examples, laid out as `savings` say."""
    limits = replace(limits, share_prefix="pages" in savings, pack="packs" in savings)
    plan = plan_epoch(Lengths.of(encoded), PlanSettings(batch_size=len(encoded), limits=limits), seed=0, epoch=0)
    reading = Reading(image_token_id=processor.image_token_id, num_crops=processor.num_crops)
    micros = list(training_packs(encoded, plan, reading))
    return [micro.pack for micro in micros], micros[0].step


# -- timing ------------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Timed:
    """A variant and what was seen of it."""

    variant: Variant
    packs: list[Pack]
    step: Step
    flops: float
    """Operations that it runs."""
    needed: float
    """Operations that its step needs, however computed."""
    seconds: list[float] = field(default_factory=list)
    peak_gb: float = 0.0
    loss: float = 0.0

    def questions_per_s(self) -> list[float]:
        return [self.step.examples / seconds for seconds in self.seconds]


def run_step(model: Any, optimizer: torch.optim.Optimizer, timed: Timed, num_crops: int, dtype: torch.dtype) -> None:
    """One optimizer step of a variant, timed. The learning rate is zero: all variants see the same weights."""
    device = next(model.parameters()).device
    inner = bare(model)
    savings = timed.variant.savings
    if "recompute" in savings:
        inner.gradient_checkpointing_disable()
    else:
        inner.gradient_checkpointing_enable({"use_reentrant": False})
    _forget_peak(device)
    started, loss = time.perf_counter(), torch.zeros((), device=device)
    for pack in timed.packs:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            part = loss_of(model, pack.to(device), savings, num_crops)
        part.backward()
        loss += part.detach()
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    timed.loss = float(loss)
    timed.seconds.append(time.perf_counter() - started)
    timed.peak_gb = max(timed.peak_gb, _peak_gb(device))


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():
        gc.collect()
        if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # glibc keeps what an earlier variant gave back
            libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def _peak_gb(device: torch.device) -> float:
    """Most memory held since `_forget_peak`: of the GPU, or of this process (0 where the system does not tell)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 / 1e9 for line in lines if line.startswith("VmHWM")), 0.0)


def measure(
    mode: Mode,
    task: Task,
    *,
    pages: int,
    questions: int,
    rounds: int,
    ablation: bool,
    limits: PackLimits,
    dtype: torch.dtype,
    progress: bool = True,
) -> list[Timed]:
    """Times all variants, round by round, after one step of each that does not count."""
    shape, device = SHAPES[task], pick_device()
    processor = Phi3VProcessor(build_tokenizer([" ".join(WORDS)]), num_crops=shape.num_crops)
    model = build_model(mode, processor, device, dtype)
    optimizer = build_optimizer(model, Optim(learning_rate=0.0))
    with tempfile.TemporaryDirectory() as folder:
        found = []
        for variant in variants(questions, ablation=ablation):
            examples = make_examples(Path(folder), shape, pages, variant.questions)
            packs, step = packs_of(
                [encode(example, processor) for example in examples], processor, variant.savings, limits
            )
            config = bare(model).config
            flops = hardware_flops(model, config, step, variant.savings, shape)
            needed = training_flops(model, config).of(step)
            found.append(Timed(variant=variant, packs=packs, step=step, flops=flops, needed=needed))
    with progress_bar(f"{task}, {mode}", (rounds + 1) * len(found), "steps", show=progress) as advance:
        for number in range(rounds + 1):
            if progress and not console.is_terminal:
                say(f"{task}, {mode}: " + (f"round {number} of {rounds}" if number else "warming up"))
            for timed in found:
                warm_up = replace(timed, packs=timed.packs[:1], seconds=[])
                run_step(model, optimizer, timed if number else warm_up, shape.num_crops, dtype)
                advance(1)
    return found


def ratios(timed: Timed, original: Timed) -> list[float]:
    """Times as many questions a second as the original, round by round."""
    return [ours / theirs for ours, theirs in zip(timed.questions_per_s(), original.questions_per_s(), strict=True)]


def flops_of_the_real_model(mode: Mode, task: Task, found: Sequence[Timed]) -> list[float]:
    """Operations a question of each variant, at the sizes of the published model."""
    config = Phi3VConfig()
    with torch.device("meta"):
        model = prepare(Phi3VForCausalLM(config), mode, torch.bfloat16)
    shape = SHAPES[task]
    return [hardware_flops(model, config, t.step, t.variant.savings, shape) / t.step.examples for t in found]


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of the device at its best: of a known card as its maker says, else of a large product here.

    Busy machines are slow now and then, hence the best of many.
    """
    if (known := device_peak_tflops(device, dtype)) is not None:
        return known * 1e12
    size, seconds = 2048, []
    a = torch.randn(size, size, device=device, dtype=dtype)
    for _ in range(20):
        started = time.perf_counter()
        (a @ a)[0, 0].item()
        seconds.append(time.perf_counter() - started)
    return 2.0 * size**3 / min(seconds)


def rows_of(mode: Mode, task: Task, found: Sequence[Timed], peak: float) -> list[dict[str, Any]]:
    """What is printed and written: a row a variant. `peak` is the device's, in operations a second."""
    original, real = found[0], flops_of_the_real_model(mode, task, found)
    rows = []
    for timed, real_flops in zip(found, real, strict=True):
        pace = statistics.median(timed.questions_per_s())
        times = ratios(timed, original)
        rows.append(
            {
                "task": task,
                "mode": mode,
                "variant": timed.variant.name,
                "savings": sorted(timed.variant.savings),
                "questions_a_page": timed.variant.questions,
                "questions_per_s": pace,
                "pages_per_s": pace / timed.variant.questions,
                "tokens_per_s": pace * timed.step.tokens / timed.step.examples,
                "gflops_per_s": timed.flops / statistics.median(timed.seconds) / 1e9,
                "of_limit": timed.needed / statistics.median(timed.seconds) / peak,
                "peak_gb": timed.peak_gb,
                "loss": timed.loss,
                "times_as_fast": {"median": statistics.median(times), "min": min(times), "max": max(times)},
                "fewer_operations": original.flops / original.step.examples / (timed.flops / timed.step.examples),
                "fewer_operations_real_size": real[0] / real_flops,
            }
        )
    return rows


def show(rows: Sequence[dict[str, Any]]) -> None:
    """The table of one task and mode."""
    say(f"\n[bold]{rows[0]['task']}, {rows[0]['mode']}[/]")
    say(
        f"{'':<50}{'pages/s':>8}{'questions/s':>12}{'times as fast':>19}"
        f"{'operations':>11}{'real size':>10}{'of limit':>9}{'GB':>6}"
    )
    for row in rows:
        times = row["times_as_fast"]
        spread = f"{times['median']:.2f} ({times['min']:.2f}-{times['max']:.2f})"
        say(
            f"{row['variant']:<50}{row['pages_per_s']:>8.3f}{row['questions_per_s']:>12.3f}{spread:>19}"
            f"{'1/' + format(row['fewer_operations'], '.2f'):>11}"
            f"{'1/' + format(row['fewer_operations_real_size'], '.2f'):>10}"
            f"{row['of_limit']:>9.0%}{row['peak_gb']:>6.2f}"
        )


# -- answering --------------------------------------------------------------------------------------------------------

WAYS = ("original", "a page once for its questions", "labels scored instead of written")
"""The first two write answers; the third picks the likeliest of LABELS in one pass."""
LABELS = (ANSWER, "nine eight seven")


@torch.no_grad()
def answer_as_the_original(
    model: Any,
    processor: Phi3VProcessor,
    prompts: Sequence[Example],
    *,
    reading: Reading,
    max_new_tokens: int,
    dtype: torch.dtype,
) -> list[str]:
    """Greedy answers, question by question: each reads and encodes its page, padded, and makes all tokens' logits.

    Every answer is `max_new_tokens` long.
    """
    encoded = [encode(prompt, processor) for prompt in prompts]
    alone = PackLimits(max_tokens_per_pack=1, max_crops_per_pack=1, share_prefix=False, pack=False)
    found = []
    with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
        for batch in prompt_packs(encoded, alone, reading, max_new_tokens=max_new_tokens):
            with _wasteful(model, batch.pack, processor.num_crops):
                x = model.model.embed_pack(batch.pack.to(model.device))
            kept = DynamicCache()
            out = model(inputs_embeds=x[None], past_key_values=kept)
            written = [int(out.logits[0, -1].argmax())]
            while len(written) < max_new_tokens:
                out = model(input_ids=torch.tensor([written[-1:]], device=model.device), past_key_values=kept)
                written.append(int(out.logits[0, -1].argmax()))
            found.append((batch.numbers[0], processor.decode(written, skip_special_tokens=True).strip()))
    return [text for _, text in sorted(found)]


def measure_answers(
    task: Task, *, pages: int, questions: int, rounds: int, limits: PackLimits, new_tokens: int, dtype: torch.dtype
) -> list[dict[str, Any]]:
    """Times the ways to answer `questions` about each page; a row a way. All written answers are `new_tokens` long."""
    shape, device = SHAPES[task], pick_device()
    processor = Phi3VProcessor(build_tokenizer([" ".join(WORDS)]), num_crops=shape.num_crops)
    processor.stop_token_ids = (-1, -1)  # a random model stops anywhere, and every way is to write as much
    model = build_model("full", processor, device, dtype).eval()
    reading = Reading(image_token_id=processor.image_token_id, num_crops=processor.num_crops)
    how: dict[str, Any] = {"reading": reading, "dtype": dtype, "progress": False}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        examples = make_examples(Path(folder), shape, pages, questions)
        prompts = [question for example in examples for question in questions_of(example)]
        for _ in range(rounds):
            works: list[Callable[[], Any]] = [
                lambda: answer_as_the_original(
                    model, processor, prompts, reading=reading, max_new_tokens=new_tokens, dtype=dtype
                ),
                lambda: answer(model, processor, prompts, limits=limits, max_new_tokens=new_tokens, **how),
                lambda: score_labels(model, processor, prompts, LABELS, limits=limits, **how),
            ]
            results = []
            for way, work in zip(WAYS, works, strict=True):
                started = time.perf_counter()
                results.append(work())
                seconds[way].append(time.perf_counter() - started)
            assert results[0] == [found["prediction"] for found in results[1]] or dtype != torch.float32
    rows = []
    for way, took in seconds.items():
        times = [slow / fast for slow, fast in zip(seconds[WAYS[0]], took, strict=True)]
        rows.append(
            {
                "task": task,
                "variant": way,
                "questions_a_page": questions,
                "new_tokens": 0 if way == WAYS[2] else new_tokens,
                "questions_per_s": len(prompts) / statistics.median(took),
                "times_as_fast": {"median": statistics.median(times), "min": min(times), "max": max(times)},
            }
        )
    return rows


def show_answers(rows: Sequence[dict[str, Any]]) -> None:
    """The table of `measure_answers`."""
    first = rows[0]
    say(
        f"\n[bold]{first['task']}, answering {first['questions_a_page']} questions a page[/] "
        f"({first['new_tokens']} new tokens where answers are written)"
    )
    say(f"{'':<52}{'questions/s':>13}{'times as fast':>22}")
    for row in rows:
        times = row["times_as_fast"]
        spread = f"{times['median']:.2f} ({times['min']:.2f}-{times['max']:.2f})"
        say(f"{row['variant']:<52}{row['questions_per_s']:>13.3f}{spread:>22}")


def bench(
    *,
    tasks: tuple[Task, ...] = ("docvqa",),
    modes: tuple[Mode, ...] = ("full",),
    pages: int = 8,
    questions: int = 4,
    rounds: int = 2,
    ablation: bool = True,
    answering: bool = True,
    new_tokens: int = 8,
    full: bool = False,
    max_tokens_per_pack: int | None = None,
    max_crops_per_pack: int = 64,
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto",
    json_file: Annotated[Path | None, arg(name="json")] = None,
    progress: bool = True,
) -> None:
    """Time training steps against the original recipe's way, and what each saving is worth.

    The model is random and small, with the real one's proportions. "times as fast" is questions a second against the
    original in the same round (median, least and most); "operations" what arithmetic says for this model, "real size"
    for the published one; "of limit" what the objective needs, as a share of what the hardware could compute in that
    time. Leave the machine alone meanwhile.

    Args:
        tasks: Shapes of examples: a page, two photos, a meme, a video of eight frames.
        modes: What learns: everything, all but the image embedder, or adapters, also over 4-bit weights.
        pages: Pages of an optimizer step.
        questions: Questions about each page, where a page is shared.
        rounds: How often each variant is timed.
        ablation: Switch the savings on one by one; without, only none and all.
        answering: Time evaluation as well: question by question, page by page, and by scoring labels.
        new_tokens: Length of a written answer.
        full: All tasks, all modes, 64 examples a step.
        max_tokens_per_pack: Tokens of one forward pass. Default: 8192 on a GPU, 4096 on a CPU.
        max_crops_per_pack: 336x336 crops of one forward pass.
        dtype: Precision of the arithmetic.
        json_file: Write the figures here, with the environment.
        progress: Show a progress bar.
    """
    for name, value in {"pages": pages, "questions": questions, "rounds": rounds, "new-tokens": new_tokens}.items():
        if value < 1:
            raise InputError(f"--{name} is {value}, it must be at least 1")
    if full:
        tasks, modes, pages = tuple(SHAPES), get_args(Mode), 64
    device = pick_device()
    precision = pick_dtype(dtype, device)
    limits = PackLimits(
        max_tokens_per_pack=pick_tokens_per_pack(max_tokens_per_pack, device), max_crops_per_pack=max_crops_per_pack
    )
    peak = peak_flops(device, precision)
    content: dict[str, Any] = {"rows": [], "answering": [], "pages": pages, "rounds": rounds}
    content |= {"environment": environment(device), "peak_gflops_per_s": peak / 1e9}
    for task in tasks:
        for mode in modes:
            found = measure(
                mode,
                task,
                pages=pages,
                questions=questions,
                rounds=rounds,
                ablation=ablation,
                limits=limits,
                dtype=precision,
                progress=progress,
            )
            show(own := rows_of(mode, task, found, peak))
            content["rows"] += own
            _keep(json_file, content)
        if answering:
            own = measure_answers(
                task,
                pages=pages,
                questions=questions,
                rounds=rounds,
                limits=limits,
                new_tokens=new_tokens,
                dtype=precision,
            )
            show_answers(own)
            content["answering"] += own
            _keep(json_file, content)


def _keep(file: Path | None, content: dict[str, Any]) -> None:
    """After every table: a long run may be cut short."""
    if file is not None:
        write_text(file, json.dumps(content, indent=1))
