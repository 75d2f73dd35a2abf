"""Published layout in, published layout out."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

from phi3v.base.errors import InputError
from phi3v.model import Phi3VConfig, Phi3VForCausalLM

GOLDEN = Path(__file__).parents[1] / "golden"
AUTO_MAP = {
    "AutoConfig": "configuration_phi3_v.Phi3VConfig",
    "AutoModelForCausalLM": "modeling_phi3_v.Phi3VForCausalLM",
}


@pytest.fixture
def published(tmp_path):
    """A small checkpoint as the hub has it: sharded, remote code named, flash attention asked for, a duplicate wte."""
    folder = tmp_path / "published"
    shutil.copytree(GOLDEN / "model", folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"_attn_implementation": "flash_attention_2", "auto_map": AUTO_MAP}
    (folder / "config.json").write_text(json.dumps(config))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    first = folder / "model-00001-of-00002.safetensors"
    wte = "model.vision_embed_tokens.wte.weight"
    embedding = load_file(first)["model.embed_tokens.weight"]
    save_file({wte: embedding.clone()}, folder / "wte.safetensors", metadata={"format": "pt"})
    index["weight_map"][wte] = "wte.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def tensors_in(folder):
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def test_every_auto_class_loads_it_without_remote_code(published):
    assert type(AutoConfig.from_pretrained(published)) is Phi3VConfig
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        model = auto.from_pretrained(published)
        assert type(model) is Phi3VForCausalLM
        assert model.config._attn_implementation == "sdpa", "config.json must not choose the attention"
        assert model.dtype == torch.bfloat16
    assert type(AutoModel.from_pretrained(published)).__name__ == "Phi3VModel"
    assert (
        AutoModelForCausalLM.from_pretrained(published, attn_implementation="eager").config._attn_implementation
        == "eager"
    )


def test_saved_is_loaded(published, tmp_path):
    model = Phi3VForCausalLM.from_pretrained(published)
    model.save_pretrained(tmp_path / "saved")
    before, after = tensors_in(published), tensors_in(tmp_path / "saved")
    del before["model.vision_embed_tokens.wte.weight"]
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)
    theirs = json.loads((published / "config.json").read_text())
    ours = json.loads((tmp_path / "saved" / "config.json").read_text())
    theirs.pop("transformers_version"), ours.pop("transformers_version")
    assert ours == theirs
    stops = json.loads((tmp_path / "saved" / "generation_config.json").read_text())["eos_token_id"]
    assert stops == [32007, 32000], "a served model must stop where answers end"


def test_saved_in_shards_when_large(published, tmp_path):
    Phi3VForCausalLM.from_pretrained(published).save_pretrained(tmp_path / "saved", max_shard_size="5MB")
    index = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == 2
    model = Phi3VForCausalLM.from_pretrained(tmp_path / "saved")
    before = tensors_in(published)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_real_size():
    """All 592 names and shapes of the published checkpoint, and 4,146,621,440 parameters, without allocating one."""
    golden = json.loads((GOLDEN / "checkpoint_shapes.json").read_text())
    factors = {"type": "su", "short_factor": [1.0] * 48, "long_factor": [1.0] * 48}
    with torch.device("meta"):
        model = Phi3VForCausalLM(Phi3VConfig(rope_scaling=factors))
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == golden["shapes"]
    assert sum(p.numel() for p in model.parameters()) == golden["num_parameters"] == 4_146_621_440


@pytest.mark.parametrize("name", ["config.json", "phi3-vision-128k.config.json"])
def test_real_configs_survive(name, tmp_path, real_configs_dir):
    theirs = json.loads((real_configs_dir / name).read_text())
    Phi3VConfig.from_dict(theirs).save_pretrained(tmp_path)
    ours = json.loads((tmp_path / "config.json").read_text())
    theirs.pop("transformers_version"), ours.pop("transformers_version")
    missing = {key: value for key, value in theirs.items() if ours.get(key) != value}
    assert not missing
    new = set(ours) - set(theirs)
    assert new <= {"embd_pdrop", "resid_pdrop", "pad_token_id"}, "the older file lacks these, the newer has them"


def test_missing_and_misshapen_tensors_are_named(published):
    shard = published / "model-00002-of-00002.safetensors"
    tensors = load_file(shard)
    del tensors["model.layers.1.mlp.down_proj.weight"]
    tensors["model.norm.weight"] = torch.ones(7, dtype=torch.bfloat16)
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(InputError) as error:
        AutoModelForCausalLM.from_pretrained(published)
    assert "model.layers.1.mlp.down_proj.weight is missing" in str(error.value)
    assert "model.norm.weight has shape [7], expected [64]" in str(error.value)
    assert "\n" not in str(error.value)


def test_to_dtype_does_not_ruin_rope():
    config = Phi3VConfig.from_pretrained(GOLDEN / "model" / "config.json")
    loaded = Phi3VForCausalLM.from_pretrained(GOLDEN / "model", config=config, dtype=torch.bfloat16)
    cast = Phi3VForCausalLM.from_pretrained(GOLDEN / "model", config=config, dtype=torch.float32).to(torch.bfloat16)
    position, long = torch.tensor([4000]), torch.tensor([False])
    for a, b in zip(loaded.model.rope(position, long), cast.model.rope(position, long), strict=True):
        assert torch.equal(a, b)
    ids = torch.randint(3, 32000, (1, 50))
    assert torch.equal(loaded(input_ids=ids).logits, cast(input_ids=ids).logits)


def test_loading_reads_the_weights_once(published):
    """Peak memory is one copy: the parameters are the checkpoint's own tensors, on a model built on the meta device."""
    seen = []
    real_init = torch.nn.Linear.__init__

    def spy(self, *args, **kwargs):
        real_init(self, *args, **kwargs)
        seen.append(self.weight.device.type)

    torch.nn.Linear.__init__ = spy
    try:
        Phi3VForCausalLM.from_pretrained(published)
    finally:
        torch.nn.Linear.__init__ = real_init
    assert set(seen) == {"meta"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_scaling": {"type": "ntk"}}, "rope_scaling.type is 'ntk', it must be su, longrope, yarn"),
        (
            {"rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [1.0] * 48}},
            "short_factor needs 48 numbers, found 1",
        ),
        ({"hidden_size": 100, "num_attention_heads": 3}, "not a multiple"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"vision_config": {"patch_size": 32}}, "patch_size is 32, it must be 14"),
    ],
)
def test_configurations_we_cannot_run_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        Phi3VConfig(**change)


def test_safetensors_only(tmp_path, published):
    """A pickle is not opened, even when nothing else is there."""
    folder = tmp_path / "pickled"
    folder.mkdir()
    shutil.copy(published / "config.json", folder)
    torch.save({"lm_head.weight": torch.zeros(1)}, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"no file named model.safetensors"):
        Phi3VForCausalLM.from_pretrained(folder)


def test_gradient_checkpointing_gives_the_same_gradients():
    config = Phi3VConfig.from_pretrained(GOLDEN / "model" / "config.json")
    ids = torch.randint(3, 32000, (2, 20))
    pixels = {"pixel_values": torch.randn(1, 2, 3, 336, 336), "image_sizes": torch.tensor([[336, 336]])}
    ids = torch.cat([torch.full((1, 313), config.image_token_id), ids[:1]], dim=1)
    gradients, calls = [], []
    for checkpointing in (False, True):
        model = Phi3VForCausalLM.from_pretrained(GOLDEN / "model", config=config, dtype=torch.float32).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            for layer in (
                *model.model.layers,
                *model.model.vision_embed_tokens.img_processor.vision_model.encoder.layers,
            ):
                layer.register_forward_pre_hook(lambda *unused: calls.append(1))
        model(input_ids=ids, labels=ids.masked_fill(ids == config.image_token_id, -100), **pixels).loss.backward()
        gradients.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    assert len(calls) == 2 * (2 + 2), "every layer runs once more in the backward pass"
    for key, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], value, rtol=1e-5, atol=1e-6)


def test_safe_open_reads_what_we_write(tmp_path, published):
    Phi3VForCausalLM.from_pretrained(published).save_pretrained(tmp_path / "saved")
    with safe_open(tmp_path / "saved" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
