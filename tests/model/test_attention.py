"""Every backend against the dense mask, forward and backward, over random layouts."""

import sys
import types
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from phi3v.layout import Layout, Tree
from phi3v.model import attention
from phi3v.model.attention import PackedAttention

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
    for backend in ("sdpa", "eager", "flex_attention"):
        found = PackedAttention(layout, backend, window)(0, q[rows], k, v, rows)
        torch.testing.assert_close(found, everything[rows], rtol=0, atol=1e-10)
    assert_equal(run(layout, "sdpa", q, k, v, rows, window), run(layout, "eager", q, k, v, rows, window))


@given(packs, st.sampled_from([None, 3]))
@settings(max_examples=25, deadline=None)
def test_flex_is_the_dense_mask(pack, window):
    layout = Layout.of(pack)
    q, k, v = qkv(layout)
    expected = PackedAttention(layout, "eager", window)(0, q, k, v)
    found = PackedAttention(layout, "flex_attention", window)(0, q, k, v)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def plain_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, window_size, **unused):
    """What flash_attn_varlen_func promises: causal, aligned bottom-right, `window_size` keys to the left."""
    assert causal
    parts = []
    for (a, b), (c, d) in zip(*(pairwise(cu) for cu in (cu_seqlens_q, cu_seqlens_k)), strict=True):
        query = torch.arange(d - c - (b - a), d - c)[:, None]
        distance = query - torch.arange(d - c)[None]
        mask = (distance >= 0) & (distance <= (window_size[0] if window_size[0] >= 0 else distance.max() + 1))
        heads = (x.transpose(0, 1) for x in (q[a:b], k[c:d], v[c:d]))
        parts.append(F.scaled_dot_product_attention(*heads, attn_mask=mask).transpose(0, 1))
    return torch.cat(parts)


@given(packs, st.sampled_from([None, 3]))
@settings(max_examples=40, deadline=None)
def test_the_two_flash_calls_are_the_dense_mask(pack, window):
    """The kernel needs a GPU; which tokens it is given, and what becomes of its output, does not."""
    layout = Layout.of(pack)
    tensors = qkv(layout)
    fake = types.ModuleType("flash_attn")
    fake.flash_attn_varlen_func = plain_varlen
    before = sys.modules.get("flash_attn")
    sys.modules["flash_attn"] = fake
    try:
        assert_equal(
            run(layout, "flash_attention_2", *tensors, window=window), run(layout, "eager", *tensors, window=window)
        )
    finally:
        if before is None:
            del sys.modules["flash_attn"]
        else:
            sys.modules["flash_attn"] = before


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
