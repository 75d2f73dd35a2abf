"""Compiled layers: no graph breaks, no graph anew for another pack, the same gradients, the same names.

Most tests only trace: what the real backend makes of the graphs, and of their backward pass, is slow to compile.
`fullgraph` makes a graph break an error.
"""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from phi3v.model import Phi3VConfig, Phi3VForCausalLM
from phi3v.model.compiling import compile_layers
from phi3v.model.parts import add_lora, freeze
from phi3v.model.quantization import Quantization, quantize
from phi3v.model.vision import crops_needed
from phi3v.packing.layout import Layout, Tree
from phi3v.train.engines.engine import unwrap

PACKS = [
    [Tree(20, (3, 4, 7), False)],
    [Tree(13, (5, 6), False), Tree(0, (9,), True)],
    [Tree(40, (1,), False)],
    [Tree(100, (1, 9), False), Tree(3, (2,), False), Tree(0, (4, 4), False)],
]


def make(mode="full", layers=3):
    config = Phi3VConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_scaling=None,
        pad_token_id=0,
        vision_config={"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2},
    )
    torch.manual_seed(0)
    model = Phi3VForCausalLM(config).train()
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    if mode == "recompute":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if mode == "qlora":
        pytest.importorskip("bitsandbytes")
        quantize(model, Quantization(), compute_dtype=torch.float32)
    if mode in ("lora", "qlora"):
        frozen = ("vision", "projector", "embeddings")
        freeze(model, frozen)
        model = add_lora(model, frozen=frozen, rank=4, alpha=8, dropout=0.0, init="gaussian", dora=False, rslora=False)
    return model


def learn(model, pack, embeddings_learn, device="cpu"):
    """The gradients of a pack with and without row pruning, for embeddings that are the same each time."""
    layout, network = Layout.of(pack).to(device), unwrap(model).model
    model.zero_grad()
    for rows in (None, torch.arange(1, layout.tokens, 3, device=device)):
        x = torch.randn(layout.tokens, 64, generator=torch.Generator().manual_seed(0)).to(device)
        y = network.decode_layout(x.requires_grad_(embeddings_learn), layout, rows)
        (y * torch.linspace(-1, 1, y.numel(), device=device).view_as(y)).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def compiled_and_plain(mode):
    model = make(mode)
    plain, counter = copy.deepcopy(model), CompileCounter()
    torch._dynamo.reset()
    compile_layers(model, backend=counter, fullgraph=True)
    return model, plain, counter


@pytest.mark.parametrize("mode", ["full", "recompute", "lora", pytest.param("qlora", marks=pytest.mark.slow)])
def test_decoder_layers_are_compiled_for_packs_of_any_shape(mode):
    model, plain, counter = compiled_and_plain(mode)
    embeddings_learn, graphs = "lora" not in mode, 0
    for pack in PACKS:
        assert_same(learn(model, pack, embeddings_learn), learn(plain, pack, embeddings_learn))
        graphs = graphs or counter.frame_count
        assert counter.frame_count == graphs > 0


def test_all_decoder_layers_share_their_graphs():
    graphs = []
    for layers in (2, 5):
        counter = CompileCounter()
        torch._dynamo.reset()
        model = make(layers=layers)
        compile_layers(model, backend=counter, fullgraph=True)
        learn(model, PACKS[0], True)
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[1] > 0


def test_clip_layers_are_compiled_for_any_number_of_crops():
    """A single crop is a case of its own."""
    model, plain, counter = compiled_and_plain("full")
    graphs = []
    for grids in ([(1, 2)], [(1, 1)], [(2, 2), (1, 1)], [(1, 1)]):
        crops = torch.randn(sum(crops_needed(*grid) for grid in grids), 3, 336, 336)
        found = []
        for each in (model, plain):
            each.zero_grad()
            y = each.model.vision_embed_tokens(crops, grids)
            (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
            gradients = {name: p.grad for name, p in each.named_parameters() if p.grad is not None}
            # Softmax does not see what is added to all keys: this gradient is noise.
            found.append({name: gradient for name, gradient in gradients.items() if "k_proj.bias" not in name})
        assert_same(*found)
        graphs.append(counter.frame_count)
    assert graphs[1] == graphs[-1] > 0


def test_names_copies_and_generation_are_those_of_the_plain_model():
    model, plain, counter = compiled_and_plain("full")
    assert list(model.state_dict()) == list(plain.state_dict())
    learn(model, PACKS[0], True)
    twins = [copy.deepcopy(each) for each in (model, plain)]
    for twin in twins:
        twin.model.layers[0].self_attn.qkv_proj.weight.data.mul_(2)
    assert_same(*(learn(twin, PACKS[0], True) for twin in twins))
    before = counter.frame_count
    model.eval()
    learn(model, PACKS[1], False)
    assert counter.frame_count == before > 0, "the decoder is compiled for training only"


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full", "lora", "recompute"])
def test_what_is_compiled_for_good_has_the_same_gradients(mode):
    model, plain, embeddings_learn = make(mode), make(mode), mode != "lora"
    torch._dynamo.reset()
    compile_layers(model, fullgraph=True)
    for pack in PACKS:
        assert_same(learn(model, pack, embeddings_learn), learn(plain, pack, embeddings_learn))
