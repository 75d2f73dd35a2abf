"""Kept features are those that would be computed, bit for bit, and are found only by what they were made from."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from phi3v.base.errors import InputError, RankError
from phi3v.data.encode import Encoded, Example, Turn, encode
from phi3v.data.image import digest_of
from phi3v.data.processor import Phi3VProcessor
from phi3v.model import Phi3VForCausalLM
from phi3v.model.features import FeatureCache, digest_of_tower
from phi3v.model.parts import freeze, set_precision
from phi3v.packing.loader import Reading, prompt_packs, training_packs
from phi3v.packing.pack import Pack
from phi3v.packing.schedule import PlanSettings, plan_epoch
from phi3v.packing.trees import Lengths, PackLimits

SIZES = {"square": (64, 64), "wide": (100, 40), "tall": (40, 90)}
SEPARATORS = "model.vision_embed_tokens.sub_GN"
LIMITS = PackLimits(max_tokens_per_pack=1500, max_crops_per_pack=100, original_max=360)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of three pictures, of one tile and of two."""
    for number, (name, (width, height)) in enumerate(SIZES.items()):
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    return tmp_path


@pytest.fixture
def processor(tiny_checkpoint_dir: Path) -> Phi3VProcessor:
    return Phi3VProcessor.from_pretrained(tiny_checkpoint_dir)


def model_of(folder: Path, dtype: torch.dtype = torch.float32) -> Phi3VForCausalLM:
    """As a run with `--freeze vision` has it: separators and projection learn."""
    model = Phi3VForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    freeze(model, ("vision",))
    set_precision(model, dtype)
    return model


def encoded_of(pictures: Path, processor: Phi3VProcessor) -> list[Encoded]:
    shown = ["square", "wide", "tall", "square wide", "tall square", ""]
    turns = [
        Turn(user=f"what is this {n}", assistant="red", images=tuple(str(pictures / f"{p}.png") for p in names.split()))
        for n, names in enumerate(shown)
    ]
    return [encode(Example(id=str(n), turns=(turn,), where=str(n)), processor) for n, turn in enumerate(turns)]


def packs_of(encoded: list[Encoded], processor: Phi3VProcessor, epoch: int = 0) -> list[Pack]:
    settings = PlanSettings(batch_size=min(3, len(encoded)), limits=LIMITS)
    plan = plan_epoch(Lengths.of(encoded), settings, seed=0, epoch=epoch)
    reading = Reading(image_token_id=processor.image_token_id, num_crops=processor.num_crops, digests=True)
    return [micro.pack for micro in training_packs(encoded, plan, reading)]


def learnt(model: Any, packs: list[Pack], dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """The loss of every pack, and all gradients."""
    model.zero_grad(set_to_none=True)
    found = {}
    for number, pack in enumerate(packs):
        with torch.autocast("cpu", dtype) if dtype != torch.float32 else nullcontext():
            loss = model(pack=pack, learn=True).loss
        loss.backward()
        found[f"loss of pack {number}"] = loss.detach()
    return found | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def differ(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    """What is not the same, bit for bit."""
    assert found.keys() == expected.keys()
    assert len(found) > 20
    return [name for name in found if not torch.equal(found[name], expected[name])]


def cached(model: Phi3VForCausalLM, dtype: torch.dtype = torch.float32, folder: Path | None = None, **how: Any) -> Any:
    cache = FeatureCache(digest_of_tower(model), dtype, folder, **how)
    model.model.vision_embed_tokens.cache = cache
    return cache


# -- the same numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("where", "dtype"), [("memory", torch.float32), ("disk", torch.bfloat16)])
def test_losses_and_gradients_are_those_without_a_cache(
    where: str,
    dtype: torch.dtype,
    tiny_checkpoint_dir: Path,
    processor: Phi3VProcessor,
    pictures: Path,
    tower_calls: Any,
) -> None:
    """Bit for bit; in two epochs whose packs are others. In the second the tower is not run at all.

    In bf16 on a CPU one gradient is better with a cache: a tower that gives bf16, and not float32 as on CUDA, has that
    of the row separators added up in bf16.
    """
    encoded = encoded_of(pictures, processor)
    epochs = [packs_of(encoded, processor, epoch) for epoch in (0, 1)]
    assert [pack.ids for pack in epochs[0]] != [pack.ids for pack in epochs[1]]
    plain, model = model_of(tiny_checkpoint_dir, dtype), model_of(tiny_checkpoint_dir, dtype)
    cache = cached(model, dtype, pictures / "cache" if where == "disk" else None)
    for epoch, packs in enumerate(epochs):
        expected = learnt(plain, packs, dtype)
        tower_calls.clear()
        found = learnt(model, packs, dtype)
        assert sorted(tower_calls) == ([] if epoch else [1, 3, 3]), "every picture once, in a call of its own"
        rounded = differ(found, expected)
        assert set(rounded) <= (set() if dtype == torch.float32 else {SEPARATORS})
        for name in rounded:
            assert (found[name] - expected[name]).norm() < 1e-2 * expected[name].norm()
        assert cache.crops_found() == sum(p.crops for p in packs) - (0 if epoch else 8)  # 8: each picture's first time
        assert cache.crops_found() == 0
    if where == "disk":
        stored = [load_file(file)["features"] for file in (pictures / "cache").iterdir()]
        assert sorted(t.shape for t in stored) == [(1, 576, 16), (3, 576, 16), (3, 576, 16)]
        assert {t.dtype for t in stored} == {dtype}


def test_text_alone_and_prompts_go_without(
    tiny_checkpoint_dir: Path, processor: Phi3VProcessor, pictures: Path, tower_calls: Any
) -> None:
    encoded = encoded_of(pictures, processor)
    model = model_of(tiny_checkpoint_dir)
    cached(model)
    learnt(model, packs_of([encoded[5]], processor))
    assert tower_calls == []
    reading = Reading(image_token_id=processor.image_token_id, num_crops=processor.num_crops, digests=True)
    (batch,) = prompt_packs([encoded[0]], LIMITS, reading, max_new_tokens=1)
    assert batch.pack.digests == ()
    model.model.embed_pack(batch.pack)
    model.model.embed_pack(batch.pack)
    assert tower_calls == [1, 1]


# -- names -----------------------------------------------------------------------------------------------------------


def test_a_picture_goes_by_its_content(tiny_checkpoint_dir: Path, processor: Phi3VProcessor, pictures: Path) -> None:
    def digests(name: str, num_crops: int = 2) -> tuple[str, ...]:
        chosen = Phi3VProcessor.from_pretrained(tiny_checkpoint_dir, num_crops=num_crops)
        turn = Turn(user="what", assistant="red", images=(str(pictures / name),))
        return packs_of([encode(Example(id="0", turns=(turn,), where="0"), chosen)], chosen)[0].digests

    (first,) = digests("wide.png")
    Image.open(pictures / "wide.png").save(pictures / "copy.bmp")
    assert digests("copy.bmp") == (first,), "another file, the same picture"
    assert digests("wide.png", num_crops=1) != (first,)
    assert digests("tall.png") != (first,)
    Image.open(pictures / "tall.png").save(pictures / "wide.png")
    assert digests("wide.png") == digests("tall.png"), "the same file, another picture"


def test_a_digest_knows_the_shape() -> None:
    white = np.full((672, 336, 3), 255, dtype=np.uint8)
    assert digest_of(white) != digest_of(white.reshape(336, 672, 3))


def test_another_tower_or_precision_finds_nothing(
    tiny_checkpoint_dir: Path, processor: Phi3VProcessor, pictures: Path, tower_calls: Any
) -> None:
    packs, folder = packs_of(encoded_of(pictures, processor), processor), pictures / "cache"

    def computed(model: Phi3VForCausalLM, dtype: torch.dtype = torch.float32) -> bool:
        cached(model, dtype, folder)
        tower_calls.clear()
        learnt(model, packs)
        return bool(tower_calls)

    model = model_of(tiny_checkpoint_dir)
    assert computed(model)
    assert not computed(model_of(tiny_checkpoint_dir))
    assert computed(model, torch.bfloat16)
    tower = model.model.vision_embed_tokens.img_processor.vision_model
    tower.encoder.layers[-1].mlp.fc1.bias.data[0] += 1
    tower.post_layernorm.bias.data[0] += 1
    assert not computed(model), "what is never run does not matter"
    tower.encoder.layers[0].mlp.fc1.bias.data[0] += 1
    assert computed(model)
    model.config.vision_config = {**model.config.vision_config, "layer_norm_eps": 1e-4}
    assert computed(model)


def test_four_bit_weights_go_by_their_scales_too(tiny_checkpoint_dir: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="needs pip install 'phi3v[qlora]'")
    from phi3v.model.quantization import Quantization, quantize

    digests = set()
    for scale in (1.0, 2.0, 2.0):  # twice the weights: the same codes
        model = model_of(tiny_checkpoint_dir)
        tower = model.model.vision_embed_tokens.img_processor.vision_model
        tower.encoder.layers[0].mlp.fc1.weight.data *= scale
        quantize(model, Quantization(parts=("vision",), double_quant=False), compute_dtype=torch.float32)
        digests.add(digest_of_tower(model))
    assert len(digests) == 2


# -- files -----------------------------------------------------------------------------------------------------------


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-5000])


def hole(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-8192:-4096] = bytes(4096)
    file.write_bytes(content)


def reshaped(file: Path) -> None:
    tensors = load_file(file)
    save_file({**tensors, "features": tensors["features"].flatten(0, 1).clone()}, file)


def other_tensors(file: Path) -> None:
    save_file({"other": torch.zeros(3)}, file)


@pytest.mark.parametrize("damage", [cut, hole, reshaped, other_tensors, lambda file: file.write_bytes(b"")])
def test_a_damaged_file_is_made_anew(
    damage: Callable[[Path], None],
    tiny_checkpoint_dir: Path,
    processor: Phi3VProcessor,
    pictures: Path,
    tower_calls: Any,
) -> None:
    packs, folder = packs_of(encoded_of(pictures, processor), processor), pictures / "cache"
    model = model_of(tiny_checkpoint_dir)
    cached(model, folder=folder)
    expected = learnt(model, packs)
    before = {file: file.read_bytes() for file in folder.iterdir()}
    damage(next(iter(before)))
    assert {file: file.read_bytes() for file in folder.iterdir()} != before
    tower_calls.clear()
    assert differ(learnt(model, packs), expected) == []
    assert len(tower_calls) == 1
    assert {file: file.read_bytes() for file in folder.iterdir()} == before


def test_what_somebody_began_to_write_is_cleared_away_when_it_is_old(pictures: Path) -> None:
    folder = pictures / "cache"
    folder.mkdir()
    for name, age_s in (("old", 2 * 24 * 3600), ("new", 60)):
        file = folder / f".{name}.safetensors.host-1.unfinished"
        file.write_bytes(b"half")
        os.utime(file, (time.time() - age_s,) * 2)
    FeatureCache("tower", torch.float32, folder)
    assert [file.name for file in folder.iterdir()] == [".new.safetensors.host-1.unfinished"]


def test_a_full_disk_ends_the_run_or_the_keeping(
    tiny_checkpoint_dir: Path, processor: Phi3VProcessor, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packs, folder = packs_of(encoded_of(pictures, processor), processor), pictures / "cache"
    model = model_of(tiny_checkpoint_dir)
    expected = learnt(model, packs)

    def full(self: Path, content: bytes) -> int:
        self.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    cached(model, folder=folder)
    with pytest.raises(RankError, match=r"cannot write .*safetensors: .*No space left .*--vision-cache none"):
        learnt(model, packs)
    told: list[str] = []
    cached(model, folder=folder, on_full_disk="continue", tell=told.append)
    assert differ(learnt(model, packs), expected) == []
    assert len(told) == 1
    assert "No space left" in told[0]
    assert list(folder.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_named(pictures: Path) -> None:
    with pytest.raises(InputError, match=r"cannot make the folder .*square\.png"):
        FeatureCache("tower", torch.float32, pictures / "square.png" / "cache")


def test_packs_name_their_pictures_only_when_asked(processor: Phi3VProcessor, pictures: Path) -> None:
    encoded = encoded_of(pictures, processor)
    plan = plan_epoch(Lengths.of(encoded), PlanSettings(batch_size=6, limits=LIMITS), seed=0, epoch=0)
    reading = Reading(image_token_id=processor.image_token_id, num_crops=processor.num_crops, digests=True)
    for workers in (0, 1):
        named = [m.pack for m in training_packs(encoded, plan, replace(reading, num_workers=workers))]
        assert [len(pack.digests) for pack in named] == [len(pack.image_sizes) for pack in named]
        assert len({digest for pack in named for digest in pack.digests}) == 3
    assert all(m.pack.digests == () for m in training_packs(encoded, plan, replace(reading, digests=False)))
