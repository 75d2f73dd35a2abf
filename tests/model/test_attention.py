"""Every backend against the dense mask, forward and backward, over random layouts."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter

from phi3v.base.errors import InputError
from phi3v.model import attention, flash
from phi3v.model.attention import BACKENDS, PackedAttention
from phi3v.packing.layout import Layout, Tree

trees = st.builds(
    Tree,
    prefix=st.integers(0, 9),
    branches=st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple),
    long=st.booleans(),
)
packs = st.lists(trees, min_size=1, max_size=4)


def run(layout, backend, q, k, v, rows=None, window=None):
    q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    out = PackedAttention(layout, backend, window)(0, q if rows is None else q[rows], k, v, rows)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return out.detach(), torch.autograd.grad((out * weight).sum(), [q, k, v])


def qkv(layout, heads=4, kv_heads=2, dim=8):
    generator = torch.Generator().manual_seed(0)
    shape = (layout.tokens, heads, dim)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return draw(*shape), draw(layout.tokens, kv_heads, dim), draw(layout.tokens, kv_heads, dim)


def assert_equal(found, expected):
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-10)
    for mine, theirs in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)


@given(packs, st.sampled_from([None, 3]), st.sampled_from([1, 8, 1024]))
@settings(max_examples=60, deadline=None)
def test_sdpa_is_the_dense_mask(pack, window, limit):
    layout = Layout.of(pack)
    tensors = qkv(layout)
    before, attention.MAX_BRANCH_TOKENS_PER_CALL = attention.MAX_BRANCH_TOKENS_PER_CALL, limit
    try:
        assert_equal(run(layout, "sdpa", *tensors, window=window), run(layout, "eager", *tensors, window=window))
    finally:
        attention.MAX_BRANCH_TOKENS_PER_CALL = before


@given(packs, st.data(), st.sampled_from([None, 3]))
@settings(max_examples=60, deadline=None)
def test_rows_are_the_rows_of_all(pack, data, window):
    layout = Layout.of(pack)
    chosen = data.draw(st.sets(st.integers(0, layout.tokens - 1), min_size=1))
    rows = torch.tensor(sorted(chosen))
    q, k, v = qkv(layout)
    everything = PackedAttention(layout, "eager", window)(0, q, k, v)
    for backend in BACKENDS:
        found = PackedAttention(layout, backend, window)(0, q[rows], k, v, rows)
        torch.testing.assert_close(found, everything[rows], rtol=0, atol=1e-10)
    assert_equal(run(layout, "sdpa", q, k, v, rows, window), run(layout, "eager", q, k, v, rows, window))


@given(packs, st.sampled_from([None, 3]))
@settings(max_examples=12, deadline=None)
def test_flex_is_the_dense_mask(pack, window):
    layout = Layout.of(pack)
    q, k, v = qkv(layout)
    expected = PackedAttention(layout, "eager", window)(0, q, k, v)
    found = PackedAttention(layout, "flex_attention", window)(0, q, k, v)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_flex_is_compiled_once_for_all_packs(monkeypatch):
    """And the making of its mask. (A single block of 128 tokens is a case of its own.)"""
    counters = {"flex_attention": CompileCounter(), "create_block_mask": CompileCounter()}
    monkeypatch.setattr(
        attention, "compiled", lambda function, device: attention.compile_once(function, counters[function.__name__])
    )
    for pack in ([Tree(200, (30, 41), False)], [Tree(131, (5, 64), False), Tree(0, (90,), False)]):
        layout = Layout.of(pack)
        q, k, v = qkv(layout, kv_heads=4)
        attend = PackedAttention(layout, "flex_attention")
        for layer in (0, 1):
            found = attend(layer, q, k, v)
            torch.testing.assert_close(found, PackedAttention(layout, "eager")(0, q, k, v))
        assert [counter.frame_count for counter in counters.values()] == [1, 1]


def segments_of(at):
    return [(slice(a, b), slice(c, d)) for (a, b), (c, d) in zip(pairwise(at.cu_q), pairwise(at.cu_k), strict=True)]


def plain_scores(q, k, causal):
    scores = torch.einsum("qnd,knd->nqk", q, k) * q.shape[-1] ** -0.5
    hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1) & causal
    return scores.masked_fill(hidden, float("-inf"))


def plain_forward(q, k, v, at):
    """What the kernel computes, in plain torch."""
    out, lse = torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0])
    for own, keys in segments_of(at):
        assert 0 < own.stop - own.start <= at.max_q
        assert 0 < keys.stop - keys.start <= at.max_k
        scores = plain_scores(q[own], k[keys], at.causal)
        lse[:, own] = scores.logsumexp(-1)
        out[own] = torch.einsum("nqk,knd->qnd", scores.softmax(-1), v[keys])
    return out, lse


def plain_backward(dout, q, k, v, out, lse, at):
    """What the kernel computes from the out and lse it is given: neither is recomputed."""
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    for own, keys in segments_of(at):
        weights = (plain_scores(q[own], k[keys], at.causal) - lse[:, own, None]).exp()
        dv[keys] = torch.einsum("nqk,qnd->knd", weights, dout[own])
        towards = torch.einsum("qnd,knd->nqk", dout[own], v[keys]) - (dout[own] * out[own]).sum(-1).T[..., None]
        towards = weights * towards * q.shape[-1] ** -0.5
        dq[own] = torch.einsum("nqk,knd->qnd", towards, k[keys])
        dk[keys] = torch.einsum("nqk,qnd->knd", towards, q[own])
    return dq, dk, dv


@pytest.fixture
def plain_flash(monkeypatch):
    """The kernel needs a GPU; which segments they are given, and what becomes of their results, does not."""
    monkeypatch.setattr(flash, "why_not", lambda device, dtype: None)
    monkeypatch.setattr(flash, "kernel_forward", plain_forward)
    monkeypatch.setattr(flash, "kernel_backward", plain_backward)


@given(packs, st.sampled_from([None, 3]))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_flash_is_the_dense_mask(plain_flash, pack, window):
    layout = Layout.of(pack)
    tensors = qkv(layout)
    assert_equal(
        run(layout, "flash_attention_2", *tensors, window=window), run(layout, "eager", *tensors, window=window)
    )


@pytest.mark.parametrize(
    ("pack", "own", "shared"),
    [
        ([Tree(5, (2, 3), False)], [5, 2, 3], ([5], [5])),
        ([Tree(4, (6,), False), Tree(0, (2, 1), False)], [10, 2, 1], None),
        (
            [Tree(0, (3,), False), Tree(2, (1, 1, 4), False), Tree(7, (1, 2), False)],
            [3, 2, 1, 1, 4, 7, 1, 2],
            ([6, 3], [2, 7]),
        ),
    ],
    ids=["a tree", "nothing is shared", "trees and a lone example"],
)
def test_flash_copies_no_prefix_for_a_branch(pack, own, shared):
    found = flash.calls(Layout.of(pack))
    assert found.own.cu_q.diff().tolist() == found.own.cu_k.diff().tolist() == own
    assert found.own.causal
    assert (found.shared is None) == (shared is None)
    if shared is not None:
        segments = found.shared.segments
        assert (segments.cu_q.diff().tolist(), segments.cu_k.diff().tolist()) == shared
        assert not segments.causal
        assert (segments.max_q, segments.max_k) == tuple(map(max, shared))


@pytest.mark.parametrize("way", ["window", "dropout", "head_dim", "rows"])
def test_what_flash_has_not_is_sdpa(plain_flash, monkeypatch, way):
    layout = Layout.of([Tree(5, (2, 3), False)])
    asked = []
    monkeypatch.setattr(flash, "attend", lambda *args: asked.append(way) or args[0])
    settings = {"window": (3, 0.0), "dropout": (None, 0.5)}.get(way, (None, 0.0))
    q, k, v = qkv(layout, dim=12 if way == "head_dim" else 8)
    rows = torch.tensor([6, 9]) if way == "rows" else None
    PackedAttention(layout, "flash_attention_2", *settings)(0, q if rows is None else q[rows], k, v, rows)
    assert not asked
    q, k, v = qkv(layout)
    PackedAttention(layout, "flash_attention_2", window=9)(0, q, k, v)  # a window that shows everything
    assert asked


def test_merging_takes_scores_of_any_size():
    """exp(lse) of a half precision's range would overflow."""
    halves = [torch.full((1, 1, 8), value) for value in (1.0, 3.0)]
    high, low = torch.tensor([[1000.0]]), torch.tensor([[-1000.0]])
    out, lse = flash.merge((halves[0], high), (halves[1], high))
    assert (float(out[0, 0, 0]), float(lse)) == (2.0, pytest.approx(1000 + math.log(2)))
    assert float(flash.merge((halves[0], high), (halves[1], low))[0][0, 0, 0]) == 1.0


def test_flash_says_what_is_missing():
    layout = Layout.of([Tree(5, (2, 3), False)])
    with pytest.raises(InputError, match="flash_attention_2: it needs a CUDA device; choose sdpa"):
        PackedAttention(layout, "flash_attention_2")(0, *qkv(layout))


def test_the_kernel_takes_what_it_is_given():
    """PyTorch's operators know shapes without a GPU, and refuse arguments they do not have."""
    q, k, v = (torch.empty(14, 4, 8, device="meta", dtype=torch.bfloat16) for _ in "qkv")
    own, shared = flash.calls(Layout.of([Tree(5, (2, 3), False), Tree(0, (4,), False)]).to("meta"))
    out, lse = flash.kernel_forward(q, k, v, own)
    assert (out.shape, lse.shape, lse.dtype) == (q.shape, (4, 14), torch.float32)
    assert flash.kernel_forward(q[shared.rows], k[shared.keys], v[shared.keys], shared.segments)[1].shape == (4, 5)
    assert [x.shape for x in flash.kernel_backward(out, q, k, v, out, lse, own)] == [q.shape] * 3


def test_keys_are_slices_of_the_tree():
    """Neither the prefix nor the branches are copied per branch."""
    layout = Layout.of([Tree(5, (2, 3), False), Tree(0, (4,), False)])
    (prefix, branches), (lone,) = attention.calls(layout)
    assert prefix == (5, slice(0, 5), None)
    assert branches[:2] == (5, slice(0, 10))
    assert lone == (4, slice(0, 4), None)


def test_unknown_backend():
    with pytest.raises(ValueError, match=r"flash_attention_9.*sdpa, eager"):
        PackedAttention(Layout.of([Tree(0, (1,), False)]), "flash_attention_9")
