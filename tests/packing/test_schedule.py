"""What the plan of an epoch promises, for any data, any budgets and any number of ranks."""

import time
from collections import Counter, defaultdict
from dataclasses import replace
from itertools import groupby, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi3v.base.errors import InputError
from phi3v.packing.schedule import ScheduleSettings, pack_trees, schedule_epoch, schedule_evaluation, schedule_prompts
from phi3v.packing.trees import Lengths, PackLimits, PackTree

WAYS = [*product(("all", "random"), ("example", "token")), ("expected", "example")]


@st.composite
def some_lengths(draw):
    """Pages of 1 to 5 examples, in any order; budgets below let some pages and some examples burst."""
    questions_prefix_crops = st.tuples(st.integers(1, 5), st.integers(0, 60), st.integers(0, 12))
    pages = draw(st.lists(questions_prefix_crops, min_size=1, max_size=12))
    page = draw(st.permutations([number for number, (questions, _, _) in enumerate(pages) for _ in range(questions)]))
    first = {number: place for place, number in enumerate(dict.fromkeys(page))}
    count = len(page)
    branch = draw(st.lists(st.integers(2, 60), min_size=count, max_size=count))
    num_targets = draw(st.lists(st.integers(1, 9), min_size=count, max_size=count))
    prefix = np.array([pages[number][1] for number in page], dtype=np.int64)
    return Lengths(
        page=np.array([first[number] for number in page], dtype=np.int64),
        tokens=prefix + branch,
        prefix=prefix,
        crops=np.array([pages[number][2] for number in page], dtype=np.int64),
        num_targets=np.array(num_targets, dtype=np.int64),
    )


some_limits = st.builds(
    PackLimits,
    max_tokens_per_pack=st.integers(30, 250),
    max_crops_per_pack=st.integers(3, 30),
    original_max=st.integers(20, 100),
    share_prefix=st.booleans(),
    pack=st.booleans(),
)


@st.composite
def some_plan(draw):
    lengths, (questions, weighting) = draw(some_lengths()), draw(st.sampled_from(WAYS))
    units = len(lengths) if questions == "all" else lengths.num_pages
    setting = ScheduleSettings(
        batch_size=draw(st.integers(1, units)), questions=questions, weighting=weighting, limits=draw(some_limits)
    )
    return schedule_epoch(lengths, setting, seed=draw(st.integers(0, 99)), epoch=draw(st.integers(0, 9)))


def steps_of(plan, num_ranks=1):
    return [plan.packs(number, num_ranks) for number in range(len(plan))]


def weight_of_example(ranks) -> dict[int, float]:
    pairs = [
        pair
        for packs in ranks
        for pack in packs
        for tree in pack
        for pair in zip(tree.examples, tree.loss_weights, strict=True)
    ]
    assert len(dict(pairs)) == len(pairs), "an example twice in a step"
    return dict(pairs)


@given(plan=some_plan())
def test_every_example_or_page_once_an_epoch_and_steps_are_exact(plan):
    lengths, setting = plan.lengths, plan.settings
    seen = Counter(example for _, ranks in steps_of(plan) for example in weight_of_example(ranks))
    assert set(seen.values()) == {1}
    if setting.questions == "random":
        assert sorted(lengths.page[list(seen)].tolist()) == list(range(lengths.num_pages))
    else:
        assert sorted(seen) == list(range(len(lengths)))
    steps = [step for step, _ in steps_of(plan)]
    units = [step.examples if setting.questions == "all" else step.pages for step in steps]
    assert units[:-1] == [setting.batch_size] * (len(units) - 1)
    assert 1 <= units[-1] <= setting.batch_size
    if setting.questions == "expected":
        for number in range(len(plan)):
            questions_here = Counter(lengths.page[plan.examples(number)].tolist())
            assert all(count == (lengths.page == page).sum() for page, count in questions_here.items())


@given(plan=some_plan(), num_ranks=st.integers(1, 5))
def test_the_weights_of_a_step_are_the_objective_on_any_number_of_ranks(plan, num_ranks):
    """Against the definition: a mean of means, or one mean over tokens."""
    lengths, setting = plan.lengths, plan.settings
    for (_, alone), (_, ranks) in zip(steps_of(plan), steps_of(plan, num_ranks), strict=True):
        weights = weight_of_example(ranks)
        assert weights == weight_of_example(alone)
        assert sum(weight * lengths.num_targets[i] for i, weight in weights.items()) == pytest.approx(1, rel=1e-12)
        loss_of = {i: np.random.default_rng(i).random(lengths.num_targets[i]) for i in weights}
        ours = sum(weight * loss_of[i].sum() for i, weight in weights.items())
        if setting.weighting == "token":
            expected = np.concatenate(list(loss_of.values())).mean()
        elif setting.questions == "expected":
            of_page = defaultdict(list)
            for i in weights:
                of_page[lengths.page[i]].append(loss_of[i].mean())
            expected = np.mean([np.mean(means) for means in of_page.values()])
        else:
            expected = np.mean([loss.mean() for loss in loss_of.values()])
        assert ours == pytest.approx(expected, rel=1e-12)


@given(plan=some_plan(), num_ranks=st.integers(1, 5))
def test_budgets_hold_and_ranks_get_equal_numbers_of_packs(plan, num_ranks):
    lengths, limits = plan.lengths, plan.settings.limits
    for step, ranks in steps_of(plan, num_ranks):
        assert [len(packs) for packs in ranks] == [step.packs] * num_ranks
        packs = [pack for packs_of_rank in ranks for pack in packs_of_rank]
        assert step.tokens == sum(tree.tokens for pack in packs for tree in pack)
        assert step.crops == sum(tree.crops for pack in packs for tree in pack)
        assert step.examples == sum(len(tree.examples) for pack in packs for tree in pack)
        for pack in packs:
            assert limits.pack or len(pack) <= 1
            if sum(tree.tokens for tree in pack) > limits.max_tokens_per_pack:
                (tree,) = pack
                first = tree.examples[0]
                few = tree.tokens <= lengths.prefix[first] + limits.max_tokens_per_pack // 8
                assert few or (tree.examples == (first,) and first in lengths.oversized(limits))
            if sum(tree.crops for tree in pack) > limits.max_crops_per_pack:
                (tree,) = pack
                assert set(tree.examples) <= set(lengths.oversized(limits).tolist())


@given(plan=some_plan())
def test_trees_are_pages_and_are_cut_only_where_they_must_be(plan):
    lengths, limits = plan.lengths, plan.settings.limits
    for _, ranks in steps_of(plan):
        trees_of = defaultdict(list)
        for tree in (tree for packs in ranks for pack in packs for tree in pack):
            members = list(tree.examples)
            (page,) = set(lengths.page[members].tolist())
            assert {bool(tokens > limits.original_max) for tokens in lengths.tokens[members]} == {tree.long}
            assert tree.tokens == lengths.prefix[members[0]] + (lengths.tokens - lengths.prefix)[members].sum()
            assert tree.crops == lengths.crops[members[0]]
            trees_of[page, tree.long].append(tree)
        for trees in trees_of.values():
            if not limits.share_prefix:
                assert all(len(tree.examples) == 1 for tree in trees)
            elif len(trees) > 1:
                prefix = lengths.prefix[trees[0].examples[0]]
                most = max(limits.max_tokens_per_pack, prefix + limits.max_tokens_per_pack // 8)
                assert prefix + sum(tree.tokens - prefix for tree in trees) > most


@given(plan=some_plan())
def test_a_plan_is_a_function_of_its_inputs(plan):
    inputs = {"seed": 5, "epoch": 3}
    one, two = (schedule_epoch(plan.lengths, plan.settings, **inputs) for _ in range(2))
    assert steps_of(one, 3) == steps_of(two, 3)
    # A step needs none of the steps before it: resuming is asking for the suffix.
    fresh = schedule_epoch(plan.lengths, plan.settings, **inputs)
    assert [fresh.packs(number) for number in reversed(range(len(fresh)))] == steps_of(one)[::-1]


def pages_of(*questions: int, **columns) -> Lengths:
    page = np.repeat(np.arange(len(questions)), questions)
    values = {"tokens": 30, "prefix": 20, "crops": 2, "num_targets": 3, **columns}
    return Lengths(page=page, **{name: np.full(len(page), value) for name, value in values.items()})


def plan_of(lengths, *, seed=0, epoch=0, max_tokens=1000, max_crops=100, batch_size=2, **setting):
    limits = PackLimits(max_tokens_per_pack=max_tokens, max_crops_per_pack=max_crops)
    return schedule_epoch(
        lengths, ScheduleSettings(batch_size=batch_size, limits=limits, **setting), seed=seed, epoch=epoch
    )


def test_the_order_is_pinned():
    """A resumed run must see the same order after an upgrade of NumPy."""
    lengths = pages_of(2, 1, 3, 1, 1)
    assert plan_of(lengths, seed=3, epoch=1).order.tolist() == [0, 1, 3, 4, 5, 2, 6, 7]
    assert plan_of(lengths, seed=3, epoch=1, questions="random").order.tolist() == [1, 4, 2, 6, 7]


def test_epochs_and_seeds_differ():
    lengths = pages_of(*[1] * 50)
    orders = {tuple(plan_of(lengths, seed=seed, epoch=epoch).order) for seed, epoch in product(range(3), range(3))}
    assert len(orders) == 9


def test_every_page_comes_first_equally_often():
    firsts = Counter(int(plan_of(pages_of(1, 1, 1, 1), epoch=epoch).order[0]) for epoch in range(400))
    assert min(firsts.values()) > 70


def test_random_draws_every_question_equally_often_and_by_page():
    """The draw of a page depends on seed, epoch and page alone, not on the order of the pages."""
    drawn = [plan_of(pages_of(1, 4, 2), epoch=epoch, questions="random").order for epoch in range(400)]
    counts = Counter(int(example) for order in drawn for example in order)
    assert counts[0] == 400
    assert all(70 < counts[example] < 130 for example in (1, 2, 3, 4))
    assert all(160 < counts[example] < 240 for example in (5, 6))
    longer = [plan_of(pages_of(1, 4, 2, 3), epoch=epoch, questions="random").order for epoch in range(50)]
    assert all(set(short) < set(long) for short, long in zip(drawn, longer, strict=False))


def test_all_cuts_a_page_only_at_a_step_border():
    plan = plan_of(pages_of(*[3] * 10), batch_size=4)
    steps = [plan.lengths.page[plan.examples(number)].tolist() for number in range(len(plan))]
    runs = [page for pages in steps for page, _ in groupby(pages)]
    assert [page for page, _ in groupby(runs)] == list(dict.fromkeys(runs))  # a page's runs stand side by side
    assert len(runs) == 10 + 5  # 7 borders between steps, of which those after 12 and 24 examples fall between pages


def test_packs_are_few_and_ranks_are_busy():
    lengths = pages_of(*[2] * 12)  # trees of 40 tokens
    step, ranks = plan_of(lengths, batch_size=24, max_tokens=130).packs(0)
    assert (step.packs, [len(pack) for pack in ranks[0]]) == (4, [3, 3, 3, 3])
    step, ranks = plan_of(lengths, batch_size=24, max_tokens=10_000).packs(0, num_ranks=4)
    assert (step.packs, [len(pack) for packs in ranks for pack in packs]) == (1, [3, 3, 3, 3])
    step, ranks = plan_of(lengths, batch_size=24, max_tokens=10_000).packs(0, num_ranks=16)
    assert (step.packs, sum(pack == () for packs in ranks for pack in packs)) == (1, 4)


def packs_of(*tokens, num_ranks=1):
    """The packs of trees of so many tokens, at most 10 a pack, as their tokens, by rank."""
    trees = [PackTree((number,), (1.0,), False, count, 0) for number, count in enumerate(tokens)]
    ranks = pack_trees(trees, PackLimits(max_tokens_per_pack=10, max_crops_per_pack=1), num_ranks)
    return [[tuple(tree.tokens for tree in pack) for pack in packs] for packs in ranks]


def test_a_tree_goes_where_it_leaves_the_least_room():
    assert packs_of(2, 7, 2, 6, 3) == [[(7, 3), (6, 2, 2)]]  # into the emptiest, 7 + 2, 6 + 3 and 2 make three packs


def test_ranks_get_alike_amounts():
    assert packs_of(7, 8, 9, 10, num_ranks=2) == [[(10,), (7,)], [(9,), (8,)]]
    assert packs_of(6, num_ranks=3) == [[(6,)], [()], [()]]
    assert packs_of(num_ranks=2) == [[()], [()]]


def test_crops_bound_a_pack_too():
    _, (packs,) = plan_of(pages_of(*[1] * 12), batch_size=12, max_crops=5).packs(0)
    assert [len(pack) for pack in packs] == [2] * 6


def test_packs_of_a_realistic_mix_are_nearly_full():
    random = np.random.default_rng(0)
    sizes = np.array([[2509, 17], [1921, 13], [1933, 13], [3842, 26], [0, 0]])[random.integers(0, 5, 2000)]
    text = np.where(sizes[:, 0] == 0, random.integers(50, 1500, 2000), random.integers(15, 60, 2000))
    lengths = Lengths(
        page=np.arange(2000),
        tokens=sizes[:, 0] + text,
        prefix=sizes[:, 0],
        crops=sizes[:, 1],
        num_targets=np.full(2000, 10),
    )
    steps = [step for step, _ in steps_of(plan_of(lengths, batch_size=200, max_tokens=16384, max_crops=120))]
    assert sum(step.tokens for step in steps) / sum(step.packs * 16384 for step in steps) > 0.95


@given(lengths=some_lengths(), limits=some_limits, num_ranks=st.integers(1, 3), pages_at_once=st.integers(1, 13))
def test_prompts_are_planned_once_within_the_budget_with_room_to_grow(lengths, limits, num_ranks, pages_at_once):
    growth, seen = 7, []
    for ranks in schedule_prompts(
        lengths, limits, max_new_tokens=growth, num_ranks=num_ranks, pages_at_once=pages_at_once
    ):
        assert len({len(packs) for packs in ranks}) == 1
        pages = set()
        for pack in (pack for packs in ranks for pack in packs):
            members = [example for tree in pack for example in tree.examples]
            seen += members
            pages |= set(lengths.page[members].tolist())
            grown = sum(
                lengths.prefix[tree.examples[0]]
                + sum((lengths.tokens - lengths.prefix)[i] + growth for i in tree.examples)
                for tree in pack
            )
            if grown > limits.max_tokens_per_pack:
                (tree,) = pack
                over = lengths.prefix[members[0]] + limits.max_tokens_per_pack // 8
                assert grown <= over or len(tree.examples) == 1
            assert all(tree.long == (lengths.tokens[i] > limits.original_max) for tree in pack for i in tree.examples)
        assert len(pages) <= pages_at_once
    assert sorted(seen) == list(range(len(lengths)))


def test_settings_that_make_no_sense_name_the_flags():
    limits = PackLimits(max_tokens_per_pack=100, max_crops_per_pack=10)
    with pytest.raises(InputError, match=r"--questions expected .* --weighting token"):
        ScheduleSettings(batch_size=4, questions="expected", weighting="token", limits=limits)
    with pytest.raises(InputError, match="--batch-size is 0"):
        ScheduleSettings(batch_size=0, limits=limits)
    with pytest.raises(InputError, match=r"--batch-size 6 is larger than the training data \(5 examples\)"):
        plan_of(pages_of(3, 2), batch_size=6)
    with pytest.raises(InputError, match=r"--batch-size 3 is larger than the training data \(2 pages\)"):
        plan_of(pages_of(3, 2), batch_size=3, questions="expected")
    with pytest.raises(InputError, match="training example 1 has no answer token"):
        plan_of(pages_of(3, 2, num_targets=0))


@pytest.mark.slow
def test_a_million_examples_are_planned_in_seconds():
    lengths = pages_of(*[2] * 500_000)
    start = time.perf_counter()
    plan = plan_of(lengths, batch_size=64, max_tokens=300)
    assert time.perf_counter() - start < 3
    assert sum(plan.packs(number)[0].examples for number in range(len(plan))) == 1_000_000
    assert time.perf_counter() - start < 30


# -- several files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("questions", ["all", "expected", "random"])
@pytest.mark.parametrize("weights", [(1, 0.5), (2, 1), (1.5, 0.25)])
def test_a_file_counts_as_often_as_its_weight_says(questions: str, weights: tuple[float, float]) -> None:
    """Two files of 6 and 8 pages of two questions: over four epochs each example is seen as often as any other."""
    page = np.repeat(np.arange(14), 2)
    ones = np.ones_like(page)
    lengths = Lengths(page=page, tokens=ones * 20, prefix=ones * 10, crops=ones, num_targets=ones)
    limits = PackLimits(max_tokens_per_pack=1000, max_crops_per_pack=100)
    mix = ((12, weights[0]), (16, weights[1]))
    setting = ScheduleSettings(batch_size=3, questions=questions, limits=limits, mix=mix)
    plans = [schedule_epoch(lengths, setting, seed=5, epoch=epoch) for epoch in range(4)]
    assert len({len(plan) for plan in plans}) == 1, "resuming counts steps by epoch"
    sizes, unit = ((6, 8), page) if questions == "random" else ((12, 16), np.arange(28))
    for plan in plans:
        of_first = (unit[plan.order] < sizes[0]).sum()
        assert (of_first, len(plan.order) - of_first) == (round(sizes[0] * weights[0]), round(sizes[1] * weights[1]))
    seen = Counter(int(number) for plan in plans for number in unit[plan.order])
    assert {count for number, count in seen.items() if number < sizes[0]} == {4 * weights[0]}
    assert {count for number, count in seen.items() if number >= sizes[0]} == {4 * weights[1]}
    again = schedule_epoch(lengths, setting, seed=5, epoch=3)
    assert (again.order == plans[3].order).all()
    assert not np.array_equal(plans[0].order, plans[1].order)


def test_files_that_count_once_each_are_one_file() -> None:
    page = np.repeat(np.arange(14), 2)
    ones = np.ones_like(page)
    lengths = Lengths(page=page, tokens=ones * 20, prefix=ones * 10, crops=ones, num_targets=ones)
    setting = ScheduleSettings(batch_size=3, limits=PackLimits(max_tokens_per_pack=1000, max_crops_per_pack=100))
    whole = schedule_epoch(lengths, setting, seed=5, epoch=1)
    parts = schedule_epoch(lengths, replace(setting, mix=((12, 1.0), (16, 1.0))), seed=5, epoch=1)
    for plan in (whole, parts):
        assert sorted(plan.order) == list(range(28))
        assert all(page[a] == page[b] for a, b in plan.order.reshape(-1, 2)), "a page stays together"


@given(plan=some_plan(), seed=st.integers(0, 9))
def test_an_evaluation_sees_some_examples_once_and_their_shares_add_up(plan, seed: int) -> None:
    lengths, setting = plan.lengths, plan.settings
    chosen = np.flatnonzero(np.random.default_rng(seed).random(len(lengths)) < 0.7)
    if not len(chosen):
        return
    found = schedule_evaluation(lengths, setting, chosen, pages_at_once=2)
    assert sorted(found.order) == list(chosen)
    shares = found.shares()
    assert shares.sum() == pytest.approx(1)
    for step in range(len(found)):
        assert len(set(lengths.page[found.examples(step)])) <= 2
    weights: dict[int, float] = {}
    for step in range(len(found)):
        for example, weight in zip(found.examples(step), found.loss_weights(step), strict=True):
            weights[int(example)] = weight * shares[step]
    whole = schedule_evaluation(lengths, setting, chosen, pages_at_once=10**6)
    assert len(whole) == 1
    expected = dict(zip(whole.order.tolist(), whole.loss_weights(0).tolist(), strict=True))
    assert weights == pytest.approx(expected)
