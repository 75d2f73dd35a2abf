import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from phi3v.model import Phi3VConfig
from phi3v.model.rope import LongRope, rotate

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("regime", ["short", "long"])
def test_tables_of_the_real_model(regime, real_configs_dir):
    golden = load_file(GOLDEN / "units" / "rope_real.safetensors")
    rope = LongRope(Phi3VConfig.from_dict(json.loads((real_configs_dir / "config.json").read_text())))
    positions = golden[f"{regime}/positions"]
    cos, sin = rope(positions, torch.full_like(positions, regime == "long"))
    torch.testing.assert_close(rope.inv_freq[int(regime == "long")], golden[f"{regime}/inv_freq"], rtol=0, atol=0)
    torch.testing.assert_close(cos[:, 0], golden[f"{regime}/cos"], rtol=0, atol=1e-6)
    torch.testing.assert_close(sin[:, 0], golden[f"{regime}/sin"], rtol=0, atol=1e-6)


def small(**kwargs):
    return Phi3VConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=1, **kwargs)


def test_regime_is_chosen_token_by_token():
    rope = LongRope(small(rope_scaling={"type": "su", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}))
    position = torch.tensor([5, 5])
    cos, _ = rope(position, torch.tensor([False, True]))
    short, _ = rope(position, torch.tensor([False, False]))
    assert torch.equal(cos[0], short[0])
    assert not torch.allclose(cos[1], short[1])


def test_yarn_differs_from_su_only_in_scale():
    factors = {"short_factor": [1.5] * 4, "long_factor": [3.0] * 4}
    su = LongRope(small(rope_scaling={"type": "su", **factors}))
    yarn = LongRope(small(rope_scaling={"type": "yarn", **factors}))
    assert torch.equal(su.inv_freq, yarn.inv_freq)
    assert su.scale == pytest.approx(1.1902380714238083)  # sqrt(1 + ln 32 / ln 4096)
    assert yarn.scale == pytest.approx(1.3465735902799727)  # 0.1 ln 32 + 1


def test_plain_rope_without_scaling():
    rope = LongRope(small(rope_theta=100.0))
    cos, _ = rope(torch.tensor([3]), torch.tensor([True]))
    expected = torch.cos(3 / 100 ** (torch.arange(0, 8, 2) / 8))
    torch.testing.assert_close(cos[0, 0, :4], expected, rtol=0, atol=1e-6)


def test_rotation_keeps_dot_products_of_equal_distances():
    rope = LongRope(small())
    q, k = torch.randn(2, 1, 1, 8)
    at = lambda x, position: rotate(x, *rope(torch.tensor([position]), torch.tensor([False])))  # noqa: E731
    near = (at(q, 7) * at(k, 3)).sum()
    far = (at(q, 107) * at(k, 103)).sum()
    torch.testing.assert_close(near, far, rtol=1e-4, atol=1e-5)
    assert abs(near - (at(q, 7) * at(k, 4)).sum()) > 1e-3
