"""What only a CUDA device can show: its attention kernels, mixed precision and decoding against float32 on the CPU.

A kernel may differ from the exact result by at most twice what plain PyTorch (SDPA with a dense mask) does at the same
precision; the exact result is a softmax written out in float64.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from phi3v.base.config import Base, Data, Keeping, Optim, Run, Tuning
from phi3v.data.encode import Encoded, Example, Turn, encode, questions
from phi3v.data.processor import Phi3VProcessor
from phi3v.model import Phi3VForCausalLM, flash
from phi3v.model.attention import PackedAttention
from phi3v.model.compiling import compile_layers
from phi3v.model.fp8 import CAPABILITY, learn_in_fp8
from phi3v.model.generation import generate_pack
from phi3v.packing.layout import Layout, Tree
from phi3v.packing.loader import Reading, prompt_packs
from phi3v.packing.loss import weighted_cross_entropy
from phi3v.packing.pack import Pack, make_pack
from phi3v.packing.schedule import ScheduleSettings, schedule_epoch
from phi3v.packing.trees import Lengths, PackLimits
from phi3v.train.determinism import deterministic
from phi3v.train.loop import train

CUDA = torch.device("cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

BACKENDS = ("sdpa", "flex_attention", "flash_attention_2")
PRECISIONS = (torch.float32, torch.bfloat16)
BORDER = 360  # of the tiny checkpoint
LAYOUTS = {
    "one tree": [Tree(200, (30, 41, 7), False)],
    "trees and lone examples": [
        Tree(131, (5, 64), False),
        Tree(0, (90,), False),
        Tree(77, (33,), True),
        Tree(3, (1, 1), False),
    ],
    "many branches": [Tree(300, (150,) * 8, True)],
}


@pytest.fixture(autouse=True)
def _exact_products() -> Iterator[None]:
    """float32 means float32: TF32 would make its products as coarse as those of half precision."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def skip_unless_possible(backend: str, dtype: torch.dtype) -> None:
    if backend == "flash_attention_2" and (reason := flash.why_not(CUDA, dtype)):
        pytest.skip(reason)


# -- attention ---------------------------------------------------------------------------------------------------------


def qkv(layout: Layout, dtype: torch.dtype, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random queries, keys and values [T, N, D] with fewer key heads, exactly representable in `dtype`."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(layout.tokens, heads, head_dim) for heads in (4, 2, 2)]
    q, k, v = (torch.randn(shape, generator=generator).to(CUDA, dtype) for shape in shapes)
    return q, k, v


def with_gradients(attend: Any, *tensors: Tensor) -> list[Tensor]:
    """Output and gradients of q, k and v, in float64, for a fixed gradient of the output."""
    tensors = tuple(tensor.detach().requires_grad_() for tensor in tensors)
    out = attend(*tensors)
    generator = torch.Generator().manual_seed(1)
    towards = torch.randn(out.shape, generator=generator).bfloat16().to(CUDA, out.dtype)
    return [tensor.double() for tensor in (out, *torch.autograd.grad(out, tensors, towards))]


def dense(layout: Layout, rows: Tensor | None, *, written_out: bool) -> Any:
    """Attention with the dense mask of the layout: the softmax written out, or PyTorch's own SDPA."""
    everything = torch.arange(layout.tokens, device=CUDA)
    mask = layout.visible(everything if rows is None else rows, everything)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        groups = q.shape[1] // k.shape[1]
        q, k, v = (x.transpose(0, 1) for x in (q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)))
        if not written_out:
            return F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask)[0].transpose(0, 1)
        scores = (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).masked_fill(~mask, float("-inf"))
        return (scores.softmax(-1) @ v).transpose(0, 1)

    return attend


def errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]


@pytest.mark.parametrize("pruned", [False, True], ids=["all rows", "some rows"])
@pytest.mark.parametrize("head_dim", [32, 96])
@pytest.mark.parametrize("trees", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_is_as_close_as_plain_pytorch(backend, dtype, trees, head_dim, pruned):
    skip_unless_possible(backend, dtype)
    layout = Layout.of(trees).to(CUDA)
    rows = torch.arange(0, layout.tokens, 7, device=CUDA) if pruned else None
    q, k, v = qkv(layout, dtype, head_dim)
    q = q if rows is None else q[rows]
    exact = with_gradients(dense(layout, rows, written_out=True), q.double(), k.double(), v.double())
    plain = errors(with_gradients(dense(layout, rows, written_out=False), q, k, v), exact)
    attention = PackedAttention(layout, backend)
    found = errors(with_gradients(lambda q, k, v: attention(0, q, k, v, rows), q, k, v), exact)
    for name, mine, theirs in zip(("output", "dq", "dk", "dv"), found, plain, strict=True):
        assert mine <= 2 * theirs, f"{name}: {mine:.1e}, plain PyTorch {theirs:.1e}"


def test_flex_is_compiled_once_for_all_packs():
    for trees in LAYOUTS.values():
        layout = Layout.of(trees).to(CUDA)
        q, k, v = qkv(layout, torch.bfloat16, 96)
        with torch.compiler.set_stance("default" if trees is LAYOUTS["one tree"] else "fail_on_recompile"):
            PackedAttention(layout, "flex_attention")(0, q, k, v)


# -- the whole model ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def processor(tiny_checkpoint_dir: Path) -> Phi3VProcessor:
    return Phi3VProcessor.from_pretrained(tiny_checkpoint_dir)


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> list[Example]:
    """Shared pages, two pictures, text alone, two turns; one page has examples of both RoPE regimes."""
    folder = tmp_path_factory.mktemp("pictures")
    for number, (name, size) in enumerate({"square": (64, 64), "wide": (40, 100)}.items()):
        pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    square, wide = str(folder / "square.png"), str(folder / "wide.png")
    asked = [
        ((square,), "what color", "red"),
        ((square,), "is the color of the circle red or is it blue, in this picture", "blue"),
        ((square,), "what is in this picture, and what is in the picture on the other side " * 2, "no"),
        ((wide, square), "which one is red", "the square"),
        ((wide, square), "is it blue", "yes"),
        ((), "answer briefly", "yes"),
    ]
    lone = [
        Example(id=str(number), turns=(Turn(user=user, assistant=reply, images=images),))
        for number, (images, user, reply) in enumerate(asked)
    ]
    turns = (Turn(user="what shape", assistant="square", images=(square,)), Turn(user="is it red", assistant="no"))
    return [*lone, Example(id="turns", turns=turns)]


def pack_of(encoded: list[Encoded], processor: Phi3VProcessor) -> Pack:
    limits = PackLimits(max_tokens_per_pack=10**6, max_crops_per_pack=10**6, original_max=BORDER)
    plan = schedule_epoch(
        Lengths.of(encoded), ScheduleSettings(batch_size=len(encoded), limits=limits), seed=0, epoch=0
    )
    _, [[trees]] = plan.packs(0)
    return make_pack(trees, encoded, image_token_id=processor.image_token_id, num_crops=processor.num_crops)


def loss_and_gradients(folder: Path, pack: Pack, device: Any, backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
    model = (
        Phi3VForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=backend).train().to(device)
    )
    pack = pack.to(device)
    with torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32):
        loss = weighted_cross_entropy(model(pack=pack).logits, pack.targets, pack.loss_weights)
    loss.backward()
    # A key bias has no gradient but noise: softmax does not see what is added to all keys.
    named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None and "k_proj.bias" not in name}
    return {name: tensor.detach().double().cpu() for name, tensor in {**named, "loss": loss}.items()}


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_loss_and_every_gradient_against_the_cpu(tiny_checkpoint_dir, processor, examples, backend, dtype):
    """At most twice as far from float32 on the CPU as the dense mask on the same device at the same precision."""
    skip_unless_possible(backend, dtype)
    pack = pack_of([encode(example, processor) for example in examples], processor)
    assert {tree.long for tree in pack.layout.trees} == {False, True}
    exact = loss_and_gradients(tiny_checkpoint_dir, pack, "cpu", "eager", torch.float32)
    plain = loss_and_gradients(tiny_checkpoint_dir, pack, CUDA, "eager", dtype)
    found = loss_and_gradients(tiny_checkpoint_dir, pack, CUDA, backend, dtype)
    assert found.keys() == exact.keys()
    # The error of a single number can be zero by luck: the floor is the noise of the precision.
    floor = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
    for name, wanted in exact.items():
        mine, theirs = (float((result[name] - wanted).norm() / wanted.norm()) for result in (found, plain))
        assert mine <= max(2 * theirs, floor), f"{name}: {mine:.1e}, dense mask {theirs:.1e}"


def gradients_of(model: Phi3VForCausalLM, pack: Pack, dtype: torch.dtype) -> dict[str, Tensor]:
    model.zero_grad()
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        weighted_cross_entropy(model(pack=pack).logits, pack.targets, pack.loss_weights).backward()
    named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None and "k_proj.bias" not in name}
    return {name: gradient.double() for name, gradient in named.items()}


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_compiled_layers_have_the_same_gradients(tiny_checkpoint_dir, processor, examples, dtype, recompute):
    """As close to float32 as plain PyTorch at the same precision; and nothing is compiled anew for another pack."""
    encoded = [encode(example, processor) for example in examples]
    packs = [pack_of(some, processor).to(CUDA) for some in (encoded, encoded[:5])]
    model = Phi3VForCausalLM.from_pretrained(tiny_checkpoint_dir, dtype=torch.float32).train().to(CUDA)
    if recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    exact = [gradients_of(model, pack, torch.float32) for pack in packs]
    plain = [gradients_of(model, pack, dtype) for pack in packs]
    torch._dynamo.reset()
    compile_layers(model, fullgraph=True)
    found = [gradients_of(model, packs[0], dtype)]
    with torch.compiler.set_stance("fail_on_recompile"):
        found.append(gradients_of(model, packs[1], dtype))
    floor = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
    for results in zip(found, plain, exact, strict=True):
        assert results[0].keys() == results[2].keys()
        for name, wanted in results[2].items():
            mine, theirs = (float((result[name] - wanted).norm() / wanted.norm()) for result in results[:2])
            assert mine <= max(2 * theirs, floor), f"{name}: {mine:.1e}, not compiled {theirs:.1e}"


def test_the_decoder_learns_in_fp8(tiny_checkpoint_dir, processor, examples):
    """As close to exact as the same rounding in plain PyTorch, give or take the order of sums."""
    pytest.importorskip("torchao", reason="torchao is not installed: pip install 'phi3v[fp8]'")
    if torch.cuda.get_device_capability() < CAPABILITY:
        pytest.skip("this card does not multiply in fp8")
    pack, found = pack_of([encode(example, processor) for example in examples], processor).to(CUDA), {}
    for how in ("exact", "emulated", "fp8"):
        model = Phi3VForCausalLM.from_pretrained(tiny_checkpoint_dir, dtype=torch.float32).train().to(CUDA)
        if how != "exact":
            learn_in_fp8(model, emulate=how == "emulated")
        found[how] = gradients_of(model, pack, torch.float32 if how == "exact" else torch.bfloat16)
    for name, wanted in found["exact"].items():
        mine, theirs = (float((found[how][name] - wanted).norm() / wanted.norm()) for how in ("fp8", "emulated"))
        assert mine <= max(2 * theirs, torch.finfo(torch.bfloat16).eps), f"{name}: {mine:.1e}, emulated {theirs:.1e}"


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_training_in_half_precision_follows_float32(tiny_checkpoint_dir, tiny_data, tmp_path, precision, lora):
    losses = {}
    for name in ("fp32", precision):
        run = Run(
            base=Base(model=str(tiny_checkpoint_dir), dtype=name),
            data=Data(train=tiny_data, batch_size=5, max_tokens_per_pack=700, num_workers=0),
            tuning=Tuning(lora=True, lora_rank=4) if lora else Tuning(),
            optim=Optim(max_steps=12, learning_rate=3e-3, warmup_steps=2),
            keeping=Keeping(out=tmp_path / name, progress=False),
        )
        train(run)
        entries = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        steps = [entry for entry in entries if entry["kind"] == "step"]
        skipped = sum(entry.get("skipped", False) for entry in steps)
        assert skipped <= (6 if name == "fp16" else 0), "loss scaling may halve its first scales, no more"
        losses[name] = [entry["loss"] for entry in steps]
    assert losses[precision][0] == pytest.approx(losses["fp32"][0], rel=0.02)
    assert min(losses[precision][-3:]) < 0.9 * losses[precision][0], "it learns"


@pytest.mark.parametrize("mode", [{}, {"lora": True, "lora_rank": 4}], ids=["full", "lora"])
def test_a_deterministic_run_resumes_bitwise(tiny_checkpoint_dir, tiny_data, tmp_path, mode):
    """Losses, gradient norms and the trained weights, in bf16, with the attention and the compiled layers of a GPU."""

    def run(out: Path, **keeping: Any) -> Run:
        return Run(
            base=Base(model=str(tiny_checkpoint_dir), dtype="bf16", deterministic=True),
            data=Data(train=tiny_data, batch_size=5, max_tokens_per_pack=700, num_workers=0),
            tuning=Tuning(**mode),
            optim=Optim(max_steps=6, learning_rate=3e-3, warmup_steps=2),
            keeping=Keeping(out=out, progress=False, resume="auto", save_every_steps=2, **keeping),
        )

    def steps(out: Path) -> list[tuple[float, float]]:
        entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        return [(entry["loss"], entry["grad_norm"]) for entry in entries if entry["kind"] == "step"]

    train(run(tmp_path / "whole"))
    while not train(run(tmp_path / "stopped", max_minutes=1e-9)):
        assert len(steps(tmp_path / "stopped")) <= 6
    assert steps(tmp_path / "stopped") == steps(tmp_path / "whole")
    (file,) = (tmp_path / "whole/final").glob("*.safetensors")
    whole, stopped = load_file(file), load_file(tmp_path / "stopped/final" / file.name)
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)
    assert not torch.are_deterministic_algorithms_enabled()


def test_flash_attention_repeats_its_bits_in_deterministic_mode():
    """With many blocks of keys for every query, which otherwise add up in any order."""
    if flash.why_not(CUDA, torch.bfloat16):
        pytest.skip("this PyTorch has no flash attention")
    layout = Layout.of([Tree(2000, (600,) * 8, True)]).to(CUDA)
    q, k, v = (x.repeat_interleave(4 // x.shape[1], 1) for x in qkv(layout, torch.bfloat16, 96))
    with deterministic(True):
        once, twice = (with_gradients(lambda *x: flash.attend(*x, flash.calls(layout)), q, k, v) for _ in range(2))
    assert all(map(torch.equal, once, twice))


# -- answers -----------------------------------------------------------------------------------------------------------


def prompts_of(examples: list[Example], processor: Phi3VProcessor) -> list[Encoded]:
    return [encode(prompt, processor) for example in examples for prompt in questions(example)]


def prompt_pack(encoded: list[Encoded], processor: Phi3VProcessor) -> Pack:
    limits = PackLimits(max_tokens_per_pack=10**6, max_crops_per_pack=10**6, original_max=BORDER)
    reading = Reading(image_token_id=processor.image_token_id, num_crops=processor.num_crops)
    (batch,) = prompt_packs(encoded, limits, reading, max_new_tokens=40)
    return batch.pack


@pytest.mark.parametrize("backend", ["sdpa", "eager", "flex_attention"])
def test_answers_are_those_of_the_cpu(tiny_checkpoint_dir, processor, examples, backend):
    """Greedy, in float32, past the border of the RoPE regimes."""
    pack = prompt_pack(prompts_of(examples, processor), processor)
    how: dict[str, Any] = {"max_new_tokens": 40, "stop_token_ids": (5, 6, 7)}
    model = Phi3VForCausalLM.from_pretrained(tiny_checkpoint_dir, dtype=torch.float32)
    expected = generate_pack(model, pack, **how)
    model.set_attn_implementation(backend)
    found = generate_pack(model.to(CUDA), pack.to(CUDA), **how)
    assert found == expected
    prompts = [tree.prefix + length for tree in pack.layout.trees for length in tree.branches]
    crossed = [n <= BORDER < n + len(ids) for n, ids in zip(prompts, expected, strict=True)]
    assert any(crossed)


def test_answers_of_a_pack_are_those_one_by_one(tiny_checkpoint_dir, processor, examples):
    """Against `model.generate` on the same device."""
    model = Phi3VForCausalLM.from_pretrained(tiny_checkpoint_dir, dtype=torch.float32).to(CUDA)
    prompts = [prompt for example in examples for prompt in questions(example) if len(prompt.turns) == 1]
    stops = (5, 6, 7)
    for prompt in prompts:
        (found,) = generate_pack(
            model,
            prompt_pack([encode(prompt, processor)], processor).to(CUDA),
            max_new_tokens=40,
            stop_token_ids=stops,
        )
        tags = "".join(f"<|image_{number}|>" for number in range(1, len(prompt.images) + 1))
        text = f"<|user|>\n{tags}{chr(10) if tags else ''}{prompt.turns[0].user}<|end|>\n<|assistant|>\n"
        inputs = processor(text, list(prompt.images)).to(CUDA)
        out = model.generate(**inputs, max_new_tokens=40, do_sample=False, eos_token_id=list(stops), pad_token_id=0)
        new = out[0, inputs["input_ids"].shape[1] :].tolist()
        assert found == list(itertools.takewhile(lambda token: token not in stops, new)), prompt.id
