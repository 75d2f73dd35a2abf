"""Packs come in the plan's order, the same with and without workers, and errors say what to mend."""

import dataclasses
import pickle
import re
from itertools import chain

import numpy as np
import pytest
import torch
from PIL import Image

from phi3v.data.loader import Reading, prompt_packs, training_packs
from phi3v.data.pack import make_pack
from phi3v.data.plan import PlanSettings, plan_epoch
from phi3v.data.tree import Lengths, PackLimits
from phi3v.errors import InputError

IMAGE = 32044
READING = Reading(image_token_id=IMAGE, num_crops=4)
LIMITS = PackLimits(max_tokens_per_pack=1000, max_crops_per_pack=100)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for number in range(5):
        noise = np.random.default_rng(number).integers(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
    return [str(folder / f"{number}.png") for number in range(5)]


@pytest.fixture
def encoded(fabricate, images):
    """Three questions on each of five pages, and a text."""
    pages = [
        fabricate(3, image, 5, -2, id=f"{page}.{n}", seed=n) for page, image in enumerate(images) for n in range(3)
    ]
    return [*pages, fabricate(9, -3, id="text")]


def plan_of(encoded, **setting):
    settings = PlanSettings(**{"batch_size": 6, "limits": LIMITS, **setting})
    return plan_epoch(Lengths.of(encoded), settings, seed=1, epoch=0)


def with_workers(number, **setting):
    return dataclasses.replace(READING, num_workers=number, **setting)


def assert_equal(one, two):
    """Bitwise, field by field."""
    assert (one.step, one.last, one.pack.ids) == (two.step, two.last, two.pack.ids)
    assert one.pack.layout.trees == two.pack.layout.trees
    for a, b in ((one.pack, two.pack), (one.pack.layout, two.pack.layout)):
        for field in dataclasses.fields(a):
            value = getattr(a, field.name)
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, getattr(b, field.name))


def test_packs_are_those_of_the_plan(encoded):
    plan = plan_of(encoded)
    batches = iter(training_packs(encoded, plan, READING))
    for number in range(len(plan)):
        step, (packs,) = plan.packs(number)
        for index, trees in enumerate(packs):
            batch = next(batches)
            assert (batch.step, batch.last) == (step, index == len(packs) - 1)
            pack = make_pack(trees, encoded, image_token_id=IMAGE, num_crops=4)
            assert_equal(batch, batch._replace(pack=pack))
    assert next(batches, None) is None
    assert [plan.packs(number)[0].packs for number in range(len(plan))] == [2, 2, 2]


def test_workers_change_nothing(encoded):
    plan = plan_of(encoded)
    alone = list(training_packs(encoded, plan, READING))
    helped = list(training_packs(encoded, plan, with_workers(2, packs_ahead=1)))
    assert len(alone) == len(helped)
    for one, two in zip(alone, helped, strict=True):
        assert_equal(one, two)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_reading_leaves_the_global_random_state_alone(encoded, num_workers):
    """Or dropout would differ between a run and its resumed twin."""
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(training_packs(encoded, plan_of(encoded), with_workers(num_workers)))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_resumed_epoch_is_the_rest_of_it(encoded):
    whole = [batch for batch in training_packs(encoded, plan_of(encoded), READING) if batch.step.number >= 1]
    resumed = list(training_packs(encoded, plan_of(encoded), READING, first_step=1))
    assert len(whole) == len(resumed)
    for one, two in zip(whole, resumed, strict=True):
        assert_equal(one, two)


def test_ranks_share_a_step(encoded):
    plan = plan_of(encoded, batch_size=3)
    alone = list(training_packs(encoded, plan, READING))
    ranks = [list(training_packs(encoded, plan, READING, rank=rank, num_ranks=3)) for rank in range(3)]
    assert len({len(batches) for batches in ranks}) == 1
    for side_by_side in zip(*ranks, strict=True):
        assert len({batch.step for batch in side_by_side}) == len({batch.last for batch in side_by_side}) == 1
    ids = [sorted(name for batch in batches for name in batch.pack.ids) for batches in (alone, chain(*ranks))]
    assert ids[0] == ids[1] == sorted(example.id for example in encoded)
    weights = sum(float(batch.pack.weights.sum()) for batches in ranks for batch in batches if batch.step.number == 0)
    assert weights == pytest.approx(1, abs=1e-6)
    assert any(batch.pack.tokens == 0 for batches in ranks for batch in batches)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_unreadable_image_stops_in_its_turn_with_one_line(encoded, images, tmp_path, num_workers):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not a picture")
    plan = plan_of(encoded)
    page = next(page for page in range(5) if page not in plan.lengths.page[plan.examples(0)])
    for index in np.flatnonzero(plan.lengths.page == page):
        encoded[index] = dataclasses.replace(encoded[index], images=(str(broken),))
    batches = training_packs(encoded, plan, with_workers(num_workers))
    for batch in batches:
        if batch.last:
            break
    with pytest.raises(InputError) as caught:
        list(batches)
    assert re.fullmatch(rf"train\.jsonl:{page}\.[012]: {broken}: unreadable image .*", str(caught.value))


def test_a_worker_is_sent_only_the_examples_of_its_pack(encoded, monkeypatch):
    """The data set itself never goes to a worker: a million examples cost it nothing."""
    sent = []
    monkeypatch.setattr("phi3v.data.loader.make_pack", lambda trees, encoded, **_: sent.append((trees, encoded)))
    list(training_packs(encoded, plan_of(encoded), READING))
    assert len(sent) == 6
    for trees, examples in sent:
        assert sorted(examples) == sorted(example for tree in trees for example in tree.examples)
        assert len(pickle.dumps((trees, examples))) < 5000


def test_prompts_come_once_with_their_numbers(fabricate, images):
    prompts = [fabricate(3, image, 5, id=f"{n}.{page}", seed=n) for n in range(3) for page, image in enumerate(images)]
    seen = []
    for numbers, pack in prompt_packs(prompts, LIMITS, READING, max_new_tokens=8):
        assert pack.ids == tuple(prompts[number].id for number in numbers)
        assert pack.branch.tolist() == list(range(len(numbers)))
        assert pack.tokens + 8 * len(numbers) <= LIMITS.max_tokens_per_pack
        assert len(pack.layout.trees) == len({number % 5 for number in numbers})
        seen += numbers
    assert sorted(seen) == list(range(15))


def test_ranks_share_the_prompts(fabricate):
    prompts = [fabricate(4 + n, id=str(n), seed=n) for n in range(5)]
    ranks = [list(prompt_packs(prompts, LIMITS, READING, max_new_tokens=8, rank=r, num_ranks=7)) for r in range(7)]
    assert {len(batches) for batches in ranks} == {1}
    assert sorted(number for (batch,) in ranks for number in batch.numbers) == list(range(5))
