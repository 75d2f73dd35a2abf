from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from phi3v.base.errors import InputError
from phi3v.data.image import global_view, normalize
from phi3v.model import Phi3VConfig
from phi3v.model.vision import ImageEmbedding, crops_needed, crops_of_pixel_values, crops_of_tiles

GOLDEN = Path(__file__).parents[1] / "golden"
CLIP = {"hidden_size": 1, "intermediate_size": 2, "num_hidden_layers": 2, "num_attention_heads": 1}


@pytest.mark.parametrize(
    "grids", [[(1, 1)], [(1, 2)], [(1, 4)], [(2, 1)], [(2, 2)], [(3, 4)], [(1, 2), (2, 2)]], ids=str
)
def test_hd_layout(grids):
    """Where every feature of every crop lands, against index maps of the published code."""
    name = "layout_" + "_".join(f"h{a}_w{b}" for a, b in grids)
    slots = [a * b + 1 for a, b in grids]  # crops of each image in the published batch
    if len(grids) == 2:
        name, slots = "pair_h1_w2__h2_w2__crops5", [5, 5]
    expected = load_file(GOLDEN / "units" / "hd_layout.safetensors")[name]

    embedding = ImageEmbedding(Phi3VConfig(hidden_size=8, num_attention_heads=1, vision_config=CLIP))
    torch.nn.init.constant_(embedding.sub_GN, -1)
    torch.nn.init.constant_(embedding.glb_GN, -2)
    embedding.img_projection = torch.nn.Identity()
    # a tower whose feature is the patch's number in the published batch; tile 0 of an image is its global view
    numbers, first = [], 0
    for (a, b), count in zip(grids, slots, strict=True):
        numbers.append(torch.arange(first * 576, (first + crops_needed(a, b)) * 576).view(-1, 576, 1))
        first += count
    embedding.img_processor.vision_model.forward = lambda crops: crops
    found = embedding(torch.cat(numbers).float(), grids)
    if (1, 1) in grids:  # we encode one crop where the published code encodes the same picture twice
        expected = torch.where(expected >= 576, expected - 576, expected)
    assert torch.equal(found.int(), expected)


def test_crops_of_tiles_are_the_published_crops_without_the_unused():
    tiles = torch.randint(0, 256, (7, 3, 336, 336), dtype=torch.uint8)
    grids = [(1, 1), (2, 3)]
    crops = crops_of_tiles(tiles, grids)
    x = normalize(tiles)
    assert torch.equal(crops[0], x[0])
    assert torch.equal(crops[0], global_view(x[:1], 336, 336)), "the global view of one tile is that tile"
    assert torch.equal(crops[1], global_view(x[1:], 672, 1008))
    assert torch.equal(crops[2:], x[1:])
    published = torch.zeros(2, 10, 3, 336, 336)
    published[0, :2] = x[0]
    published[1, :7] = torch.cat([crops[1:2], x[1:]])
    assert torch.equal(crops_of_pixel_values(published, grids), crops)


def test_pixel_values_that_cannot_hold_the_tiles():
    with pytest.raises(InputError, match=r"image 1 has 2x2 tiles and a global view, pixel_values holds 4 crops"):
        crops_of_pixel_values(torch.zeros(1, 4, 3, 336, 336), [(2, 2)])
    with pytest.raises(InputError, match="2 images"):
        crops_of_pixel_values(torch.zeros(1, 5, 3, 336, 336), [(2, 2), (1, 1)])


@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_tower_runs_without_a_graph(frozen):
    embedding = ImageEmbedding(Phi3VConfig(hidden_size=8, num_attention_heads=1, vision_config=CLIP))
    for parameter in embedding.parameters():
        torch.nn.init.normal_(parameter)
    embedding.img_processor.requires_grad_(not frozen)
    seen = []
    tower = embedding.img_processor.vision_model
    tower.register_forward_hook(lambda module, args, out: seen.append(out.requires_grad))
    embedding(torch.randn(1, 3, 336, 336), [(1, 1)]).sum().backward()
    assert seen == [not frozen]
    assert embedding.img_projection[0].weight.grad is not None
    assert tower.post_layernorm.weight.grad is None
    assert all(p.grad is None for p in tower.encoder.layers[-1].parameters())
