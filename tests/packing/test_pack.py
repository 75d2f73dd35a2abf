"""A pack against its examples, one by one, token by token."""

import errno
import os
import shutil
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from phi3v.base.errors import InputError
from phi3v.data.image import hd_transform, load_image, num_image_tokens, num_tiles, tiles_of
from phi3v.packing.pack import Lost, make_pack
from phi3v.packing.schedule import ScheduleSettings, schedule_epoch
from phi3v.packing.trees import Lengths, PackLimits, PackTree

IMAGE = 32044
SETTINGS = {"image_token_id": IMAGE, "num_crops": 4}
SHAPES = {"square": (30, 30), "wide": (90, 30), "tall": (20, 60)}


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for number, (name, size) in enumerate(SHAPES.items()):
        noise = np.random.default_rng(number).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{name}.png")
    return {name: str(folder / f"{name}.png") for name in SHAPES}


def expanded(example) -> tuple[list[int], list[bool]]:
    """Ids and supervision of an example with its images written out, by a loop."""
    ids, loss_mask, sizes = [], [], iter(example.image_sizes)
    for token, target in zip(example.ids.tolist(), example.loss_mask.tolist(), strict=True):
        times = num_image_tokens(*next(sizes)) if token == IMAGE else 1
        ids += [token] * times
        loss_mask += [target] * times
    return ids, loss_mask


def tree_of(*examples: int, weights=None, long=False) -> PackTree:
    return PackTree(examples, tuple(weights or [1.0] * len(examples)), long, 0, 0)


def check(pack, trees, encoded):
    """Every row of the pack sees exactly what it would see in its example alone, and has its target and weight."""
    branches = [pair for tree in trees for pair in zip(tree.examples, tree.loss_weights, strict=True)]
    assert pack.ids == tuple(encoded[example].id for example, _ in branches)
    everything = torch.arange(pack.tokens)
    position = pack.layout.position
    row = 0
    for number, (example, weight) in enumerate(branches):
        ids, loss_mask = expanded(encoded[example])
        prompt = not any(loss_mask)
        wanted = [len(ids)] if prompt else [place for place, target in enumerate(loss_mask) if target]
        for place in wanted:
            at = pack.target_rows[row]
            assert pack.branch[row] == number
            assert position[at] == place - 1
            assert pack.targets[row] == (0 if prompt else ids[place])
            assert pack.loss_weights[row] == torch.tensor(0.0 if prompt else weight, dtype=torch.float32)
            (seen,) = pack.layout.visible(at[None], everything).nonzero()[:, 1].split(place)
            assert position[seen].tolist() == list(range(place))
            assert pack.input_ids[seen].tolist() == ids[:place]
            row += 1
        # All tokens of the branch, targets or not, follow its prefix in order.
        own = (pack.layout.branch == number).nonzero()[:, 0]
        assert pack.input_ids[own].tolist() == ids[encoded[example].prefix_tokens :]
    assert row == len(pack.target_rows) == len(pack.targets) == len(pack.loss_weights) == len(pack.branch)
    assert [tree.long for tree in pack.layout.trees] == [tree.long for tree in trees]
    pictures = [picture for tree in trees for picture in _pictures(encoded[tree.examples[0]])]
    assert pack.image_sizes.tolist() == [list(size) for _, size in pictures]
    tiles = [tiles_of(hd_transform(load_image(path), 4)) for path, _ in pictures]
    assert torch.equal(pack.tiles, torch.cat([torch.zeros(0, 3, 336, 336, dtype=torch.uint8), *tiles]))
    assert (pack.input_ids == IMAGE).sum() == sum(num_image_tokens(*size) for _, size in pictures)
    assert pack.crops == sum(num_tiles(*size) + 1 for _, size in pictures)


def _pictures(example):
    return list(zip(example.images, example.image_sizes, strict=True))


def test_a_tree_of_three_questions_and_lone_examples(fabricate, images):
    wide, tall = images["wide"], images["tall"]
    encoded = [
        fabricate(3, wide, 5, -3, id="a", seed=1),
        fabricate(6, -2, 4, -3, id="text", seed=2),  # two turns, both with targets
        fabricate(3, wide, 2, -1, id="b", seed=3),
        fabricate(3, wide, 9, -4, id="c", seed=4),
        fabricate(2, tall, 1, wide, 4, -2, id="two", seed=5),
        fabricate(2, -2, tall, 3, -2, 1, wide, 2, -1, id="turns", seed=6),  # images after answers: no prefix
    ]
    trees = [tree_of(0, 2, 3, weights=[0.5, 0.25, 0.125]), tree_of(5, long=True), tree_of(1), tree_of(4, weights=[0.1])]
    pack = make_pack(trees, encoded, **SETTINGS)
    check(pack, trees, encoded)
    assert [tree.prefix > 0 for tree in pack.layout.trees] == [True, False, False, True]
    assert [len(tree.branches) for tree in pack.layout.trees] == [3, 1, 1, 1]
    assert pack.input_ids.dtype == pack.target_rows.dtype == pack.targets.dtype == pack.branch.dtype == torch.int64
    assert (pack.loss_weights.dtype, pack.tiles.dtype, pack.image_sizes.dtype) == (
        torch.float32,
        torch.uint8,
        torch.int64,
    )


def test_the_first_token_of_a_branch_may_be_a_target(fabricate, images):
    encoded = [fabricate(3, images["square"], -2, id=name, seed=seed) for seed, name in enumerate("ab")]
    pack = make_pack([tree_of(0, 1)], encoded, **SETTINGS)
    check(pack, [tree_of(0, 1)], encoded)
    assert pack.target_rows[0] == pack.target_rows[2] == pack.layout.trees[0].prefix - 1
    assert pack.branch.tolist() == [0, 0, 1, 1]


def test_prompts_have_one_row_each(fabricate, images):
    encoded = [
        fabricate(3, images["square"], 5, id="a", seed=1),
        fabricate(3, images["square"], 2, id="b", seed=2),
        fabricate(4, id="text"),
        fabricate(3, images["square"], id="bare"),
    ]
    trees = [tree_of(0, 1), tree_of(2), tree_of(3)]
    pack = make_pack(trees, encoded, **SETTINGS)
    check(pack, trees, encoded)
    assert pack.branch.tolist() == [0, 1, 2, 3]
    assert pack.loss_weights.tolist() == [0, 0, 0, 0]


def test_a_pack_of_text_has_no_tiles(fabricate):
    pack = make_pack([tree_of(0)], [fabricate(4, -2)], **SETTINGS)
    assert pack.tiles.shape == (0, 3, 336, 336)
    assert pack.image_sizes.shape == (0, 2)
    assert pack.tokens == 6


def test_an_empty_pack_keeps_every_shape_and_type(fabricate):
    empty, some = make_pack([], [], **SETTINGS), make_pack([tree_of(0)], [fabricate(4, -2)], **SETTINGS)
    assert (empty.tokens, empty.crops, empty.ids) == (0, 0, ())
    assert (empty.layout.tokens, empty.layout.trees) == (0, ())
    for field in fields(empty):
        ours, theirs = getattr(empty, field.name), getattr(some, field.name)
        if isinstance(ours, torch.Tensor):
            assert (len(ours), ours.dtype, ours.shape[1:]) == (0, theirs.dtype, theirs.shape[1:])


def test_a_page_is_read_once_even_where_its_tree_is_cut(fabricate, images, monkeypatch):
    read = []
    monkeypatch.setattr("phi3v.packing.pack.load_image", lambda path, rules: read.append(path) or load_image(path))
    encoded = [fabricate(3, images["square"], 5, -2, id=str(seed), seed=seed) for seed in range(4)]
    trees = [tree_of(0, 1), tree_of(2, long=True), tree_of(3)]
    pack = make_pack(trees, encoded, **SETTINGS)
    check(pack, trees, encoded)
    assert read == [images["square"]]
    assert len(pack.image_sizes) == 3


@st.composite
def some_examples(draw):
    """Shapes of examples: pages with several questions, texts, images late in a conversation."""
    head = st.lists(st.sampled_from(list(SHAPES)), min_size=1, max_size=2)
    page = st.tuples(head, st.integers(1, 3), st.integers(1, 3))
    shapes = []
    for names, text, questions in draw(st.lists(page, min_size=1, max_size=3)):
        shapes += [[text, *names, draw(st.integers(1, 6)), -draw(st.integers(1, 4))] for _ in range(questions)]
    if draw(st.booleans()):
        shapes.append([draw(st.integers(1, 9)), -2, 3, -1])
    if draw(st.booleans()):
        shapes.append([2, -2, draw(st.sampled_from(list(SHAPES))), 2, -1])
    return draw(st.permutations(shapes))


@pytest.mark.parametrize("share_prefix", [True, False])
@settings(max_examples=30)
@given(shapes=some_examples(), max_tokens=st.integers(300, 4000))
def test_planned_packs_hold_exactly_their_examples(fabricate, images, share_prefix, shapes, max_tokens):
    encoded = [
        fabricate(*(images.get(piece, piece) for piece in shape), id=str(number), seed=number)
        for number, shape in enumerate(shapes)
    ]
    limits = PackLimits(
        max_tokens_per_pack=max_tokens, max_crops_per_pack=12, original_max=760, share_prefix=share_prefix
    )
    setting = ScheduleSettings(batch_size=len(encoded), limits=limits)
    plan = schedule_epoch(Lengths.of(encoded), setting, seed=0, epoch=0)
    step, ranks = plan.packs(0, num_ranks=2)
    total, tokens, crops = 0.0, 0, 0
    for trees in (trees for packs in ranks for trees in packs):
        pack = make_pack(trees, encoded, **SETTINGS)
        check(pack, trees, encoded)
        assert pack.layout.tokens == pack.tokens == sum(tree.tokens for tree in trees)
        total += float(pack.loss_weights.double().sum())
        tokens += pack.tokens
        crops += pack.crops
    assert (tokens, crops) == (step.tokens, step.crops)
    assert total == pytest.approx(1, abs=1e-6)


def test_a_pack_moves_whole(fabricate, images):
    pack = make_pack([tree_of(0)], [fabricate(3, images["square"], 4, -2)], **SETTINGS).to("meta", non_blocking=True)
    for held in (pack, pack.layout):
        tensors = [value for field in fields(held) if isinstance(value := getattr(held, field.name), torch.Tensor)]
        assert tensors
        assert all(tensor.device.type == "meta" for tensor in tensors)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_pinned_pack_moves_without_waiting(fabricate, images):
    pack = make_pack([tree_of(0)], [fabricate(3, images["square"], 4, -2)], **SETTINGS)
    pinned = pack.pin_memory()
    assert pinned.tiles.is_pinned()
    assert pinned.layout.position.is_pinned()
    assert torch.equal(pinned.to("cuda", non_blocking=True).tiles.cpu(), pack.tiles)


def test_an_image_that_cannot_be_read_names_example_and_file(fabricate, images, tmp_path):
    path = tmp_path / "gone.png"
    shutil.copy(images["wide"], path)
    encoded = [fabricate(3, images["square"], 2, -2, id="7"), fabricate(3, str(path), 4, -2, id="41")]
    path.unlink()
    with pytest.raises(InputError, match=rf"^train\.jsonl:41: example 41: {path}: no such image$"):
        make_pack([tree_of(0), tree_of(1)], encoded, **SETTINGS)


def test_an_image_that_changed_its_shape_is_refused(fabricate, images):
    example = replace(fabricate(3, images["square"], 2, -2, id="7"), image_sizes=((336, 672),))
    with pytest.raises(
        InputError, match=r"^train\.jsonl:7: example 7: .*square\.png: now \(672, 672\) .* was \(336, 672\)"
    ):
        make_pack([tree_of(0)], [example], **SETTINGS)


@pytest.fixture
def pauses(monkeypatch):
    """Pauses that were made, in seconds; none takes any time."""
    made = []
    monkeypatch.setattr("phi3v.packing.pack.time.sleep", made.append)
    return made


@pytest.fixture
def faulty(monkeypatch):
    """Makes the first reads of a file fail, one error each, when it is opened or when it is decoded."""

    def fail(path, errors, at):
        owner, name = {"open": (Image, "open"), "decode": (ImageFile.ImageFile, "load")}[at]
        real, left = getattr(owner, name), list(errors)

        def failing(image, *given, **named):
            if getattr(image, "filename", image) == path and left:
                raise left.pop(0)
            return real(image, *given, **named)

        monkeypatch.setattr(owner, name, failing)

    return fail


@pytest.mark.parametrize("at", ["open", "decode"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOENT])
def test_what_may_pass_is_tried_again(fabricate, images, faulty, pauses, number, at):
    encoded = [fabricate(3, images["wide"], 4, -2)]
    wanted = make_pack([tree_of(0)], encoded, **SETTINGS)
    faulty(images["wide"], [OSError(number, os.strerror(number))] * 2, at)
    pack = make_pack([tree_of(0)], encoded, **SETTINGS, pauses_s=(1, 2, 4))
    assert pauses == [1, 2]
    assert torch.equal(pack.tiles, wanted.tiles)


def test_no_pack_is_waited_for_longer_than_all_pauses(fabricate, images, faulty, pauses):
    """The second image goes on where the first one stopped: a file system that is gone is waited for once a pack."""
    encoded = [fabricate(3, images["square"], 4, -2, id="7"), fabricate(3, images["wide"], 4, -2, id="41")]
    faulty(images["square"], [OSError(errno.EIO, "Input/output error")] * 2, "open")
    faulty(images["wide"], [OSError(errno.EIO, "Input/output error")] * 2, "decode")
    with pytest.raises(
        InputError, match=r"^train\.jsonl:41: .*wide\.png: .*Input/output error.*; tried again for 4 s$"
    ):
        make_pack([tree_of(0), tree_of(1)], encoded, **SETTINGS, pauses_s=(1, 2, 4))
    assert pauses == [1, 2, 4]


@pytest.mark.parametrize(
    "error", [OSError("truncated"), SyntaxError("broken PNG"), PermissionError(errno.EACCES, "no")]
)
def test_what_will_not_pass_is_not_tried_again(fabricate, images, faulty, pauses, error):
    encoded = [fabricate(3, images["wide"], 4, -2)]
    faulty(images["wide"], [error], "decode")
    with pytest.raises(InputError, match=r"wide\.png: unreadable image \(.*\)$"):
        make_pack([tree_of(0)], encoded, **SETTINGS, pauses_s=(1, 2, 4))
    assert pauses == []


def test_all_branches_of_a_tree_are_lost_with_its_image(fabricate, images, tmp_path, monkeypatch):
    path = str(tmp_path / "gone.png")
    shutil.copy(images["wide"], path)
    encoded = [
        fabricate(3, images["square"], path, 5, -3, id="a", seed=1),
        fabricate(3, images["square"], path, 2, -1, id="b", seed=2),
        fabricate(3, images["square"], 2, -4, id="c", seed=3),
        fabricate(3, images["square"], path, 9, id="prompt", seed=4),
        fabricate(6, -2, id="text", seed=5),
    ]
    os.unlink(path)
    read = []
    monkeypatch.setattr("phi3v.packing.pack.load_image", lambda path, rules: read.append(path) or load_image(path))
    trees = [tree_of(0, 1, weights=[0.5, 0.25]), tree_of(2, weights=[0.125]), tree_of(3), tree_of(4)]
    pack = make_pack(trees, encoded, **SETTINGS, on_bad_example="skip")
    check(pack, [trees[1], trees[3]], encoded)
    reason = f"{path}: no such image"
    assert pack.lost == tuple(
        Lost(name, f"train.jsonl:{name}", reason, weight) for name, weight in (("a", 1.5), ("b", 0.25), ("prompt", 0.0))
    )
    assert read == [images["square"], path]
    empty = make_pack([trees[0]], encoded, **SETTINGS, on_bad_example="skip")
    check(empty, [], encoded)
    assert (empty.tokens, len(empty.lost)) == (0, 2)


@pytest.mark.parametrize("setting", [{}, {"weighting": "token"}, {"questions": "expected"}, {"questions": "random"}])
@settings(max_examples=15)
@given(shapes=some_examples(), lost_image=st.sampled_from(list(SHAPES)), max_tokens=st.integers(300, 4000))
def test_a_step_without_its_lost_examples_is_a_step_of_the_others(
    fabricate, images, setting, shapes, lost_image, max_tokens
):
    """Every row that is left has, divided by 1 - lost, the weight that it has in a plan without the lost examples."""
    encoded = [
        fabricate(*(images.get(piece, piece) for piece in shape), id=str(number), seed=number)
        for number, shape in enumerate(shapes)
    ]
    limits = PackLimits(max_tokens_per_pack=max_tokens, max_crops_per_pack=12, original_max=760)
    lengths = Lengths.of(encoded)
    units = len(encoded) if setting.get("questions", "all") == "all" else lengths.num_pages
    plan = schedule_epoch(lengths, ScheduleSettings(batch_size=units, limits=limits, **setting), seed=0, epoch=0)
    held = [encoded[example] for example in plan.examples(0)]
    left = [example for example in held if images[lost_image] not in example.images]
    gone = {example.id for example in held} - {example.id for example in left}

    moved = images[lost_image] + ".moved"
    os.rename(images[lost_image], moved)
    try:
        _, ranks = plan.packs(0, num_ranks=2)
        packs = [make_pack(t, encoded, **SETTINGS, on_bad_example="skip") for packs in ranks for t in packs]
    finally:
        os.rename(moved, images[lost_image])

    lost = [example for pack in packs for example in pack.lost]
    assert sorted(example.id for example in lost) == sorted(gone)
    missing = sum(example.weight for example in lost)
    assert missing + sum(float(pack.loss_weights.double().sum()) for pack in packs) == pytest.approx(1, abs=1e-6)
    if not left:
        assert all(pack.tokens == 0 for pack in packs)
        return
    lengths = Lengths.of(left)
    units = len(left) if setting.get("questions", "all") == "all" else lengths.num_pages
    others = schedule_epoch(lengths, ScheduleSettings(batch_size=units, limits=limits, **setting), seed=0, epoch=0)
    wanted = {
        left[example].id: weight for example, weight in zip(others.examples(0), others.loss_weights(0), strict=True)
    }
    found = {
        pack.ids[branch]: float(weight) / (1 - missing)
        for pack in packs
        for branch, weight in zip(pack.branch, pack.loss_weights, strict=True)
    }
    assert found == pytest.approx(wanted, rel=1e-5)
