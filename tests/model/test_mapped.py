"""Weights are mapped, not copied: the processes of a host share one copy of a checkpoint until they change it."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from phi3v.data.processor import Phi3VProcessor
from phi3v.model import Phi3VConfig, Phi3VForCausalLM
from phi3v.model.loading import load_model


def own_memory() -> int:
    """Bytes that belong to this process alone, not to a file."""
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])  # type: ignore[index]


def test_loading_takes_no_memory_of_its_own(tiny_model_dir: Path, tmp_path: Path) -> None:
    processor = Phi3VProcessor.from_pretrained(tiny_model_dir)
    config = Phi3VConfig.from_pretrained(tiny_model_dir)
    config.hidden_size, config.intermediate_size, config.num_attention_heads = 512, 8192, 16
    config.num_key_value_heads = 16
    config.rope_scaling = {"type": "su", "short_factor": [1.0] * 16, "long_factor": [2.0] * 16}
    big = Phi3VForCausalLM(config).to(torch.bfloat16)
    size = sum(parameter.numel() * 2 for parameter in big.parameters())
    assert size > 40e6
    big.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    del big
    load_model(tmp_path)  # what only the first call allocates
    before = own_memory()
    model, _ = load_model(tmp_path)
    assert sum(float(parameter.detach().float().sum()) for parameter in model.parameters()) != 0  # all of it is read
    assert own_memory() - before < 0.5 * size
