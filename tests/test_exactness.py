"""Sharing, packing, splitting, pruning and skipping change neither the loss nor any parameter's gradient.

The plain path is `model(input_ids, pixel_values, image_sizes, labels)`, one conversation at a time, on what the
processor makes of the whole text; its text, its labels and its weights are written out here. The other path is that of
training: encode, plan, pack, `model(pack=...)`, weighted cross entropy.

Errors are relative, in float32: of the loss, and of each parameter's gradient in the L2 norm. Measured on one core of
an AVX2 CPU they are 1e-6 for most tests and 3e-6 at most: the noise of summing in another order.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from phi3v.data.encode import Encoded, Example, Turn, encode, questions
from phi3v.data.processor import Phi3VProcessor
from phi3v.infer.answering import answer
from phi3v.infer.metrics import clean
from phi3v.model import Phi3VForCausalLM
from phi3v.model.parts import add_lora, freeze, recompute_layers
from phi3v.packing.loader import Reading
from phi3v.packing.loss import weighted_cross_entropy
from phi3v.packing.pack import Pack, make_pack
from phi3v.packing.schedule import EpochSchedule, ScheduleSettings, schedule_epoch
from phi3v.packing.trees import Lengths, PackLimits

TOLERANCE = 1e-5
BORDER = 360  # tokens of the longest example in the short RoPE regime
SIZES = {"square": (64, 64), "other": (90, 80), "wide": (100, 40), "tall": (40, 90)}
TILES = {"square": (1, 1), "other": (1, 1), "wide": (1, 2), "tall": (2, 1)}
LONG = "is the color of the circle in this picture red or is it blue, and " * 18

# name -> page, images of each turn, [(user, assistant), ...]
CONVERSATIONS: dict[str, tuple[str, list[str], list[tuple[str, str]]]] = {
    "short": ("square", ["square"], [("what color", "red")]),
    "two answers": ("square", ["square"], [("what color", "blue, I would say")]),
    "crosses the border": ("square", ["square"], [(LONG[:120], "no")]),
    "turns on a page": ("square", ["square", ""], [("what shape", "circle"), ("is it blue", "yes, it is")]),
    "text first": ("text first", ["square"], [("in <|image_1|> what is the color", "red")]),
    "pair": ("pair", ["wide square"], [("which one is red", "the square")]),
    "same pair": ("pair", ["wide square"], [("is the shape in this picture blue", "no")]),
    "swapped pair": ("swapped pair", ["square wide"], [("which one is red", "the circle")]),
    "tall": ("tall", ["tall"], [("what is this", "a blue circle")]),
    "later images": ("later images", ["other", "tall"], [("what shape", "square"), ("and <|image_2|> this", "circle")]),
    "text": ("text", [""], [("answer briefly", "yes")]),
    "at the border": ("at the border", [""], [("z" * 347, "red")]),
    "past the border": ("past the border", [""], [("z" * 348, "red")]),
    "long text": ("long text", [""], [(LONG, "no, the answer is blue")]),
}
NAMES = list(CONVERSATIONS)
NAMES_OF = {page: [name for name in NAMES if CONVERSATIONS[name][0] == page] for page, _, _ in CONVERSATIONS.values()}
STOPS = (5, 6, 7)


@dataclass
class Result:
    """A loss and the gradient of every parameter that got one."""

    loss: float = 0.0
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, model: torch.nn.Module, loss: float | torch.Tensor) -> Result:
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return cls(float(torch.as_tensor(loss).detach()), gradients)


def weighted(results: Mapping[Any, Result], weights: Mapping[Any, float]) -> Result:
    """The weighted sum of some losses and their gradients."""
    total = Result()
    for name, weight in weights.items():
        total.loss += weight * results[name].loss
        for key, gradient in results[name].gradients.items():
            total.gradients[key] = total.gradients.get(key, 0) + weight * gradient
    return total


def largest_error(found: Result, expected: Result) -> tuple[float, str]:
    assert found.gradients.keys() == expected.gradients.keys()
    errors = {"loss": abs(found.loss - expected.loss) / abs(expected.loss)}
    for name, gradient in expected.gradients.items():
        # Softmax does not see what is added to all keys: this gradient is only noise, on the scale of its weight's.
        scale = expected.gradients[name.replace("bias", "weight")] if "k_proj" in name and "bias" in name else gradient
        errors[name] = float((found.gradients[name] - gradient).norm() / scale.norm())
    return max((error, name) for name, error in errors.items())


def assert_same(found: Result, expected: Result, tolerance: float = TOLERANCE) -> None:
    assert found.gradients, "nothing was compared"
    error, name = largest_error(found, expected)
    assert error <= tolerance, f"{name} is off by {error:.1e}"


@pytest.fixture(scope="module")
def processor(tiny_checkpoint_dir: Path) -> Phi3VProcessor:
    return Phi3VProcessor.from_pretrained(tiny_checkpoint_dir)


@pytest.fixture
def model(tiny_checkpoint_dir: Path) -> Phi3VForCausalLM:
    return fresh(tiny_checkpoint_dir)


def fresh(folder: Path, parts: Iterable[str] = (), **settings: Any) -> Phi3VForCausalLM:
    model = Phi3VForCausalLM.from_pretrained(folder, dtype=torch.float32, **settings).train()
    freeze(model, parts)
    return model


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Example]:
    folder = tmp_path_factory.mktemp("pictures")
    for name, (width, height) in SIZES.items():
        pixels = np.random.default_rng(len(name)).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    found = {}
    for name, (_, pictures, texts) in CONVERSATIONS.items():
        turns = tuple(
            Turn(user=user, assistant=reply, images=tuple(str(folder / f"{picture}.png") for picture in shown.split()))
            for shown, (user, reply) in zip(pictures, texts, strict=True)
        )
        found[name] = Example(id=name, turns=turns, where=name)
    return found


@pytest.fixture(scope="module")
def encoded(examples: dict[str, Example], processor: Phi3VProcessor) -> dict[str, Encoded]:
    return {name: encode(example, processor) for name, example in examples.items()}


# -- the plain path --------------------------------------------------------------------------------------------------


def asked(turn: Turn, earlier_images: int) -> str:
    """The chat template up to where an answer begins, written out."""
    tags = "".join(f"<|image_{earlier_images + k}|>" for k in range(1, len(turn.images) + 1))
    user = turn.user if not tags or "<|image_" in turn.user else f"{tags}\n{turn.user}"
    return f"<|user|>\n{user}<|end|>\n<|assistant|>\n"


def plain_inputs(processor: Phi3VProcessor, example: Example) -> dict[str, torch.Tensor]:
    """One conversation through the processor, as whole text; labels -100 but for answers and what ends them."""
    text, spans = "", []
    images: list[str] = []
    for turn in example.turns:
        text += asked(turn, len(images))
        images += turn.images
        if turn.assistant is not None:
            start = processor(text, images)["input_ids"].shape[1]
            text += f"{turn.assistant}<|end|>\n" + ("<|endoftext|>" if turn is example.turns[-1] else "")
            spans.append((start, processor(text, images)["input_ids"].shape[1]))
    inputs = dict(processor(text, images))
    labels = torch.full_like(inputs["input_ids"], -100)
    for start, end in spans:
        labels[:, start:end] = inputs["input_ids"][:, start:end]
    return {**inputs, "labels": labels}


def plain(model: Any, inputs: dict[str, torch.Tensor]) -> Result:
    model.zero_grad(set_to_none=True)
    loss = model(**inputs).loss
    loss.backward()
    return Result.of(model, loss)


def all_plain(model: Any, processor: Phi3VProcessor, examples: Mapping[str, Example]) -> dict[str, Result]:
    return {name: plain(model, plain_inputs(processor, example)) for name, example in examples.items()}


@pytest.fixture(scope="module")
def one_by_one(tiny_checkpoint_dir: Path, processor: Phi3VProcessor, examples: dict[str, Example]) -> dict[str, Result]:
    torch.set_num_threads(1)
    return all_plain(fresh(tiny_checkpoint_dir), processor, examples)


@pytest.fixture(scope="module")
def answer_tokens(processor: Phi3VProcessor, examples: dict[str, Example]) -> dict[str, int]:
    return {name: int((plain_inputs(processor, e)["labels"] >= 0).sum()) for name, e in examples.items()}


def mean(names: Sequence[Any]) -> dict[Any, float]:
    return dict.fromkeys(names, 1 / len(names))


def mean_of_pages(names: Sequence[str]) -> dict[str, float]:
    pages = [CONVERSATIONS[name][0] for name in names]
    return {name: 1 / (pages.count(page) * len(set(pages))) for name, page in zip(names, pages, strict=True)}


# -- the path of training --------------------------------------------------------------------------------------------


def plan_of(
    encoded: Sequence[Encoded],
    *,
    tokens: int = 10**6,
    crops: int = 10**6,
    share: bool = True,
    border: int = BORDER,
    batch_size: int | None = None,
    epoch: int = 0,
    **how: Any,
) -> EpochSchedule:
    """The plan of an epoch; by default of one step, in one pack."""
    limits = PackLimits(max_tokens_per_pack=tokens, max_crops_per_pack=crops, original_max=border, share_prefix=share)
    lengths = Lengths.of(encoded)
    if batch_size is None:
        batch_size = len(encoded) if how.get("questions", "all") == "all" else lengths.num_pages
    return schedule_epoch(lengths, ScheduleSettings(batch_size=batch_size, limits=limits, **how), seed=0, epoch=epoch)


def packs_of(
    encoded: Sequence[Encoded],
    processor: Phi3VProcessor,
    plan: EpochSchedule | None = None,
    *,
    step: int = 0,
    num_ranks: int = 1,
) -> list[Pack]:
    """All packs of a step, of all ranks; by default one pack of everything."""
    _, ranks = (plan or plan_of(encoded)).packs(step, num_ranks)
    reading = {"image_token_id": processor.image_token_id, "num_crops": processor.num_crops}
    return [make_pack(trees, encoded, **reading) for rank in ranks for trees in rank]


def packed(model: Any, packs: Sequence[Pack]) -> Result:
    model.zero_grad(set_to_none=True)
    total = 0.0
    for pack in packs:
        loss = model(pack=pack, learn=True).loss
        if loss.requires_grad:
            loss.backward()
        total += float(loss.detach())
    return Result.of(model, total)


# -- trees, packs, steps ---------------------------------------------------------------------------------------------


def test_the_conversations_hold_every_case(encoded: dict[str, Encoded]) -> None:
    """Both regimes, also on one page; pictures of one tile and of two; pages shared, alone and without a prefix."""
    assert {page: NAMES_OF[page] for page in NAMES_OF if len(NAMES_OF[page]) > 1}.keys() == {"square", "pair"}
    assert len({encoded[name].prefix_tokens for name in NAMES_OF["square"]}) == 1
    assert [encoded[name].tokens > BORDER for name in NAMES_OF["square"]] == [False, False, True, False]
    assert [encoded[name].tokens - BORDER for name in ("at the border", "past the border")] == [0, 1]
    assert encoded["later images"].prefix == 0
    for example in encoded.values():
        names = [Path(image).stem for image in example.images]
        assert [(h // 336, w // 336) for h, w in example.image_sizes] == [TILES[name] for name in names]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_tree_is_its_examples(tiny_checkpoint_dir, processor, encoded, one_by_one, attention):
    names = ["short", "two answers", "turns on a page"]
    (pack,) = packs_of([encoded[name] for name in names], processor)
    (tree,) = pack.layout.trees
    assert len(tree.branches) == 3
    assert pack.tokens < sum(encoded[name].tokens for name in names) - 600, "the page is there once"
    model = fresh(tiny_checkpoint_dir, attn_implementation=attention)
    assert_same(packed(model, [pack]), weighted(one_by_one, mean(names)))


def test_a_page_across_the_border_is_its_examples(model, processor, encoded, one_by_one):
    names = NAMES_OF["square"]
    page = [encoded[name] for name in names]
    (pack,) = packs_of(page, processor)
    assert sorted(tree.long for tree in pack.layout.trees) == [False, True]
    expected = weighted(one_by_one, mean(names))
    assert_same(packed(model, [pack]), expected)
    # This can fail: with the regime of the longest, or with short factors for all, the loss is another one.
    for border in (1, 10**6):
        wrong = packed(model, packs_of(page, processor, plan_of(page, border=border)))
        assert largest_error(wrong, expected)[0] > 100 * TOLERANCE


@pytest.mark.parametrize(
    ("how", "num_packs", "num_trees"),
    [({}, 1, 11), ({"share": False}, 1, 14), ({"tokens": 900}, 7, 11), ({"tokens": 1, "share": False}, 14, 14)],
    ids=["one pack", "nothing shared", "several packs", "one by one"],
)
def test_a_step_is_its_examples(model, processor, encoded, one_by_one, how, num_packs, num_trees):
    """Pages with one and two pictures, text alone, pictures in later turns, both regimes: all in one step."""
    everything = [*encoded.values()]
    packs = packs_of(everything, processor, plan_of(everything, **how))
    assert (len(packs), sum(len(pack.layout.trees) for pack in packs)) == (num_packs, num_trees)
    expected = weighted(one_by_one, mean(NAMES))
    assert_same(packed(model, packs), expected)


@pytest.mark.parametrize("share", [True, False])
def test_a_dense_mask_parts_the_trees_itself(tiny_checkpoint_dir, processor, encoded, one_by_one, share):
    names = ["short", "two answers", "crosses the border", "swapped pair", "text", "past the border"]
    few = [encoded[name] for name in names]
    (pack,) = packs_of(few, processor, plan_of(few, share=share))
    assert len(pack.layout.trees) == (5 if share else 6)
    model = fresh(tiny_checkpoint_dir, attn_implementation="eager")
    assert_same(packed(model, [pack]), weighted(one_by_one, mean(names)))


def test_an_empty_pack_is_nothing(model, processor):
    pack = make_pack([], [], image_token_id=processor.image_token_id, num_crops=processor.num_crops)
    result = packed(model, [pack])
    assert result.loss == 0
    assert not any(gradient.any() for gradient in result.gradients.values())


@given(st.data())
@settings(max_examples=12, deadline=None, derandomize=True)
def test_any_packing_is_its_examples(tiny_checkpoint_dir, processor, encoded, one_by_one, answer_tokens, data):
    """Any examples, steps, packs, ranks, weights, shared or not: every step is the weighted sum of its examples."""
    chosen = data.draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=6, unique=True), "examples")
    plan = plan_of(
        [encoded[name] for name in chosen],
        tokens=data.draw(st.sampled_from([1, 500, 1000, 10**6]), "tokens"),
        crops=data.draw(st.sampled_from([1, 4, 10**6]), "crops"),
        share=data.draw(st.booleans(), "share"),
        batch_size=data.draw(st.integers(1, len(chosen)), "batch"),
        weighting=(weighting := data.draw(st.sampled_from(["example", "token"]), "weighting")),
    )
    num_ranks = data.draw(st.integers(1, 3), "ranks")
    model, seen = fresh(tiny_checkpoint_dir), []
    for step in range(len(plan)):
        names = [chosen[number] for number in plan.examples(step)]
        seen += names
        weights = mean(names)
        if weighting == "token":
            total = sum(answer_tokens[name] for name in names)
            weights = {name: answer_tokens[name] / total for name in names}
        packs = packs_of([encoded[name] for name in chosen], processor, plan, step=step, num_ranks=num_ranks)
        assert_same(packed(model, packs), weighted(one_by_one, weights))
    assert sorted(seen) == sorted(chosen)


# -- what an optimizer step is the mean of -----------------------------------------------------------------------------


def test_expected_is_the_mean_over_all_draws(model, processor, encoded, one_by_one):
    """`random` draws one question a page; `expected` is the mean of the losses over every possible draw."""
    names = [*NAMES_OF["square"][:3], *NAMES_OF["pair"], "tall"]
    few = [encoded[name] for name in names]
    possible = itertools.product(names[:3], names[3:5], names[5:])
    draws = {frozenset(draw): weighted(one_by_one, mean(draw)) for draw in possible}
    epochs: dict[frozenset[str], EpochSchedule] = {}
    for epoch in range(100):
        plan = plan_of(few, questions="random", epoch=epoch)
        epochs.setdefault(frozenset(names[number] for number in plan.examples(0)), plan)
    assert epochs.keys() == draws.keys(), "every draw comes, and no other"
    draw, plan = next(iter(epochs.items()))
    assert_same(packed(model, packs_of(few, processor, plan)), draws[draw])
    every = weighted(draws, mean([*draws]))
    expected = packed(model, packs_of(few, processor, plan_of(few, questions="expected")))
    assert_same(expected, every)
    assert largest_error(weighted(one_by_one, mean(names)), every)[0] > 100 * TOLERANCE, "and not the mean of all"


def test_a_page_cut_by_a_budget_still_counts_once(model, processor, encoded, one_by_one):
    few = [encoded[name] for name in NAMES]
    plan = plan_of(few, tokens=BORDER, questions="expected")
    packs = packs_of(few, processor, plan, num_ranks=2)
    # Cut, and still with several questions in a tree.
    assert Lengths.of(few).num_pages < sum(len(pack.layout.trees) for pack in packs) < len(NAMES)
    assert_same(packed(model, packs), weighted(one_by_one, mean_of_pages(NAMES)))


def test_tokens_weigh_alike_when_asked(model, processor, encoded, one_by_one, answer_tokens):
    few = [*encoded.values()]
    total = sum(answer_tokens.values())
    expected = weighted(one_by_one, {name: count / total for name, count in answer_tokens.items()})
    assert_same(packed(model, packs_of(few, processor, plan_of(few, weighting="token"))), expected)
    assert largest_error(weighted(one_by_one, mean(NAMES)), expected)[0] > 100 * TOLERANCE


# -- what is not computed ----------------------------------------------------------------------------------------------


def test_supervised_rows_are_rows_of_all(model, processor, encoded):
    """Last layer, norm and head at every token of the pack, against those at the target rows alone."""
    (pack,) = packs_of([*encoded.values()], processor)
    pruned = packed(model, [pack])
    model.zero_grad(set_to_none=True)
    logits = model.lm_head(model.model.decode_layout(model.model.embed_pack(pack), pack.layout))
    assert len(logits) == pack.tokens
    losses = F.cross_entropy(logits[pack.target_rows], pack.targets, reduction="none")
    (loss := (losses * pack.loss_weights).sum()).backward()
    assert_same(pruned, Result.of(model, loss))


@pytest.mark.parametrize("rows", [1, 3, 50])
def test_logits_in_chunks_are_logits(model, processor, encoded, one_by_one, rows, monkeypatch):
    (pack,) = packs_of([*encoded.values()], processor)
    assert pack.target_rows.shape[0] > 50
    monkeypatch.setattr(model, "loss_rows_per_chunk", rows)
    with memory_of_logits() as largest:
        found = packed(model, [pack])
    assert_same(found, weighted(one_by_one, mean(NAMES)))
    assert largest[0] == rows


@contextmanager
def memory_of_logits():
    """The most rows that had logits at once."""
    largest = [0]

    def seen(logits, *rest):
        largest[0] = max(largest[0], logits.shape[0])
        return weighted_cross_entropy(logits, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("phi3v.packing.loss.weighted_cross_entropy", seen)
        yield largest


def test_crops_not_run_are_as_if_run(model, processor, examples, encoded):
    """The published way: every slot of `pixel_values` through CLIP, zero crops and the twin of a 1x1 picture too."""
    names = ["pair", "later images", "text first"]
    crops: list[int] = []
    tower = model.model.vision_embed_tokens.img_processor.vision_model
    tower.register_forward_pre_hook(lambda _, inputs: crops.append(len(inputs[0])))
    (pack,) = packs_of([encoded[name] for name in names], processor)
    skipped = packed(model, [pack])
    assert crops == [3 + 1 + 1 + 3 + 1], "wide square, other tall, square: tiles and a global view, but one for 1x1"

    crops.clear()
    results = {}
    for name in names:
        inputs = plain_inputs(processor, examples[name])
        model.zero_grad(set_to_none=True)
        loss = model(inputs_embeds=published_embedding(model, **inputs), labels=inputs["labels"]).loss
        loss.backward()
        results[name] = Result.of(model, loss)
    assert crops == [3 * len(examples[name].images) for name in names]
    assert_same(skipped, weighted(results, mean(names)))


def published_embedding(model, input_ids, pixel_values, image_sizes, **unused):
    """Token and image embeddings [1, L, H] in the order of the published code, written with loops over rows."""
    embedding, tower = model.model.vision_embed_tokens, model.model.vision_embed_tokens.img_processor.vision_model
    features = tower(pixel_values.flatten(0, 1)).unflatten(0, pixel_values.shape[:2])  # [images, slots, 576, D]

    def merged(crop):  # [576, D] -> [12, 12, 4D]
        grid = crop.view(24, 24, -1)
        return torch.cat([grid[0::2, 0::2], grid[0::2, 1::2], grid[1::2, 0::2], grid[1::2, 1::2]], dim=-1)

    def lines(rows):
        return [piece for row in rows for piece in (row, embedding.sub_GN.flatten()[None])]

    sequence = []
    for slots, size in zip(features, image_sizes, strict=True):
        a, b = (size // 336).tolist()
        tiles = [merged(slots[1 + number]) for number in range(a * b)]
        grid = torch.cat([torch.cat(tiles[row * b : (row + 1) * b], dim=1) for row in range(a)])
        sequence += [*lines(grid), embedding.glb_GN.flatten()[None], *lines(merged(slots[0]))]
    images = iter(embedding.img_projection(torch.cat(sequence)))
    text = model.model.embed_tokens(input_ids[0])
    is_image = (input_ids[0] == model.config.image_token_id).tolist()
    rows = torch.stack([next(images) if there else row for there, row in zip(is_image, text, strict=True)])
    assert next(images, None) is None
    return rows[None]


@pytest.mark.parametrize("frozen", [(), ("vision", "projector", "embeddings")], ids=["full", "frozen"])
def test_recomputing_is_remembering(tiny_checkpoint_dir, processor, encoded, frozen):
    packs = packs_of([*encoded.values()], processor)
    remembered = packed(fresh(tiny_checkpoint_dir, frozen), packs)
    model = fresh(tiny_checkpoint_dir, frozen)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    calls: list[int] = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda *_: calls.append(1))
    assert_same(packed(model, packs), remembered)
    assert len(calls) == 2 * len(model.model.layers), "every layer ran once more in the backward pass"


@pytest.mark.parametrize(("layers", "of_decoder", "of_tower"), [(1, 1, 0), (3, 2, 1), (4, 2, 2)])
def test_some_layers_are_computed_again(tiny_checkpoint_dir, processor, encoded, layers, of_decoder, of_tower):
    """The first ones; and nothing else changes."""
    packs = packs_of([*encoded.values()], processor)
    model = Phi3VForCausalLM.from_pretrained(tiny_checkpoint_dir).train()
    freeze(model, ())
    kept = packed(model, packs)
    tower = model.model.vision_embed_tokens.img_processor.vision_model
    runs = dict.fromkeys([*model.model.layers, *tower.encoder.layers[:-1]], 0)

    def count(module, *unused):
        runs[module] += 1

    for module in runs:
        module.register_forward_pre_hook(count)
    recompute_layers(model, layers)
    assert_same(packed(model, packs), kept, 0.0)
    assert list(runs.values()) == [2] * of_decoder + [1] * (2 - of_decoder) + [2] * of_tower + [1] * (2 - of_tower)


def test_a_sliding_window_slides_over_prefix_and_branch(tiny_checkpoint_dir, processor, encoded, examples):
    names = [*NAMES_OF["square"], "text"]
    model = fresh(tiny_checkpoint_dir, sliding_window=40)
    expected = weighted(all_plain(model, processor, {name: examples[name] for name in names}), mean(names))
    assert_same(packed(model, packs_of([encoded[name] for name in names], processor)), expected)


# -- frozen parts and adapters -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "frozen", [("vision",), ("vision", "projector"), ("vision", "projector", "embeddings")], ids="+".join
)
def test_freezing_changes_no_other_gradient(tiny_checkpoint_dir, processor, encoded, one_by_one, frozen):
    model = fresh(tiny_checkpoint_dir, frozen)
    expected = weighted(one_by_one, mean(NAMES))
    learns = {name for name, p in model.named_parameters() if p.requires_grad}
    expected.gradients = {name: gradient for name, gradient in expected.gradients.items() if name in learns}
    assert expected.gradients.keys() == learns
    assert_same(packed(model, packs_of([*encoded.values()], processor)), expected)


def with_adapters(folder: Path, **kind: Any) -> Any:
    """On every linear, none at its start: both halves random, the base weights learning as well."""
    settings: dict[str, Any] = {"frozen": (), "rank": 3, "alpha": 3.0, "dropout": 0.0, "init": "gaussian"}
    base = fresh(folder)
    learns = {name for name, p in base.named_parameters() if p.requires_grad}
    model = add_lora(base, **settings, dora=kind.get("dora", False), rslora=kind.get("rslora", False)).train()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            noise = torch.randn(parameter.shape, generator=generator)
            magnitude = "magnitude" in name
            parameter.data = parameter.data * (1 + noise / 4) if magnitude else noise * parameter.shape[1] ** -0.5 / 2
            parameter.requires_grad_()
        else:
            parameter.requires_grad_(base_name(name) in learns)
    return model


def base_name(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


@pytest.mark.parametrize("kind", [{}, {"dora": True}, {"rslora": True}], ids=["lora", "dora", "rslora"])
def test_a_pack_under_adapters_is_its_examples(tiny_checkpoint_dir, processor, encoded, examples, kind):
    names = ["short", "two answers", "crosses the border", "same pair", "later images", "text"]
    model = with_adapters(tiny_checkpoint_dir, **kind)
    expected = weighted(all_plain(model, processor, {name: examples[name] for name in names}), mean(names))
    assert any("lm_head.lora_A" in name for name in expected.gradients)
    assert any("img_processor" in name and "lora_A" in name for name in expected.gradients)
    few = [encoded[name] for name in names]
    assert_same(packed(model, packs_of(few, processor)), expected)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_same(packed(model, packs_of(few, processor, plan_of(few, tokens=450))), expected)


@pytest.mark.parametrize("kind", [{}, {"dora": True}, {"rslora": True}], ids=["lora", "dora", "rslora"])
def test_merged_is_unmerged(tiny_checkpoint_dir, processor, encoded, one_by_one, kind):
    """Loss and, for plain sums W + BA, the gradient of every base weight, too."""
    packs = packs_of([*encoded.values()], processor)
    model = with_adapters(tiny_checkpoint_dir, **kind)
    unmerged = packed(model, packs)
    unmerged.gradients = {base_name(name): g for name, g in unmerged.gradients.items() if "lora_" not in name}
    merged = packed(model.merge_and_unload(safe_merge=True), packs)
    assert abs(merged.loss - weighted(one_by_one, mean(NAMES)).loss) > 0.01, "the adapters say something"
    if kind.get("dora"):  # a magnitude stands between the weight and its gradient
        assert merged.loss == pytest.approx(unmerged.loss, rel=TOLERANCE)
    else:
        assert_same(merged, unmerged)


# -- answers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "adapters"),
    [(10**6, False), (800, False), (10**6, True)],
    ids=["one pack", "several", "adapters"],
)
def test_answers_of_a_shared_page_are_those_one_by_one(
    tiny_checkpoint_dir, processor, examples, monkeypatch, tokens, adapters
):
    """`evaluate.answer`, as in the middle of training, against `model.generate` on the processor's output."""
    model = with_adapters(tiny_checkpoint_dir) if adapters else fresh(tiny_checkpoint_dir)
    prompts = [prompt for example in examples.values() for prompt in questions(example)]
    new = 40
    # A random model never writes <|end|>: what it writes often takes its place.
    monkeypatch.setattr(processor, "stop_token_ids", STOPS)
    limits = PackLimits(max_tokens_per_pack=tokens, max_crops_per_pack=10**6, original_max=BORDER)
    reading = Reading(image_token_id=processor.image_token_id, num_crops=processor.num_crops)
    how: dict[str, Any] = {
        "limits": limits,
        "reading": reading,
        "max_new_tokens": new,
        "dtype": torch.float32,
        "progress": False,
    }
    found = answer(model, processor, prompts, **how)
    assert model.training
    model.eval()
    crossed = stopped = 0
    for prompt, prediction in zip(prompts, found, strict=True):
        inputs = plain_inputs(processor, prompt)
        del inputs["labels"]
        length = inputs["input_ids"].shape[1]
        out = model.generate(
            **inputs, max_new_tokens=new, do_sample=False, eos_token_id=list(STOPS), pad_token_id=processor.pad_token_id
        )[0, length:].tolist()
        ids = list(itertools.takewhile(lambda token: token not in STOPS, out))
        assert (prediction["num_tokens"], prediction["prediction"]) == (
            len(ids),
            clean(processor.decode(ids, skip_special_tokens=True)),
        ), prompt.id
        crossed += length <= BORDER < length + len(ids)
        stopped += len(ids) < new
    assert crossed >= 1, "an answer crosses the border of the RoPE regimes"
    assert 0 < stopped < len(found)
    assert len({prediction["prediction"] for prediction in found}) > len(found) / 2
