"""Fixtures of all tests. What is not shipped (the real tokenizer) makes its tests skip, with the reason."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from phi3v.base.config import Run
from phi3v.data.processor import Phi3VProcessor
from phi3v.model import Phi3VConfig, Phi3VForCausalLM
from phi3v.model.loading import load_model, save_model
from phi3v.model.parts import add_lora
from phi3v.model.vision import CLIPVisionTransformer
from phi3v.train.loop import train

HERE = Path(__file__).parent
hypothesis.settings.register_profile("phi3v", deadline=None)  # tests never assert a time
hypothesis.settings.load_profile("phi3v")

# Files of the published model, in two folders: tokenizer/ and real_configs/.
PUBLISHED = Path(os.environ.get("PHI3V_PUBLISHED", HERE.parent / "../shared/golden"))

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{'<|' + message['role'] + '|>' + '\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt and messages[-1]['role'] != 'assistant' %}{{- '<|assistant|>\n' -}}{% endif %}"
)
ADDED_TOKENS = """
    <|endoftext|> <|assistant|> <|placeholder1|> <|placeholder2|> <|placeholder3|> <|placeholder4|> <|system|> <|end|>
    <|placeholder5|> <|placeholder6|> <|user|> <|image|>
"""
NOT_RSTRIP = {"<|endoftext|>", "<|system|>", "<|end|>", "<|user|>"}
WORDS = "▁the ▁what ▁is ▁color ▁shape ▁in ▁this ▁picture ▁red ▁blue ▁circle ▁square ▁yes ▁no ▁answer ▁briefly"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--refresh-golden", action="store_true", help="write the golden files that we make ourselves anew")


@pytest.fixture
def refresh_golden(request: pytest.FixtureRequest) -> bool:
    """Whether a test should write its golden file instead of comparing with it."""
    return bool(request.config.getoption("--refresh-golden"))


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _temporary_files_in_one_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What torchrun, torch.compile and Gradio leave in the system's temporary folder goes the way of `tmp_path`."""
    os.environ["TMPDIR"] = str(tmp_path_factory.mktemp("tmp"))
    tempfile.tempdir = None  # it remembers the folder


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Outputs of the original implementation; tests/golden."""
    return HERE / "golden"


@pytest.fixture(scope="session")
def real_tokenizer_dir() -> Path:
    """Folder of the real Phi-3.5-vision tokenizer, 32045 tokens."""
    if not (PUBLISHED / "tokenizer" / "tokenizer.json").is_file():
        pytest.skip("the real Phi-3.5-vision tokenizer is not here: set PHI3V_PUBLISHED to the folder of tokenizer/")
    return PUBLISHED / "tokenizer"


@pytest.fixture(scope="session")
def real_configs_dir() -> Path:
    """Folder of the published config.json files of Phi-3.5-vision and Phi-3-vision."""
    if not (PUBLISHED / "real_configs" / "config.json").is_file():
        pytest.skip("the published config.json is not here: set PHI3V_PUBLISHED to the folder of real_configs/")
    return PUBLISHED / "real_configs"


@pytest.fixture(scope="session")
def tiny_processor_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a processor with a tiny tokenizer (429 tokens) built like the real one, num_crops 4."""
    folder = tmp_path_factory.mktemp("tiny_processor")
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    config = {
        "bos_token": "<s>",
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|endoftext|>",
        "legacy": False,
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "padding_side": "right",
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps({"num_crops": 4, "num_img_tokens": 144}))
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint_dir(tiny_processor_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer model (CLIP: three, two of them run) with its processor, num_crops 2, long RoPE past 360 tokens.

    Every weight matters: none is zero, norms and factors are far from one. A 1x1 picture has 313 tokens.
    """
    folder = tmp_path_factory.mktemp("tiny_checkpoint")
    processor = Phi3VProcessor.from_pretrained(tiny_processor_dir, num_crops=2)
    processor.save_pretrained(folder)
    config = Phi3VConfig(
        vocab_size=432,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4000,
        original_max_position_embeddings=360,
        rope_scaling={
            "type": "su",
            "short_factor": [1.0, 1.1, 1.3, 1.6, 2.0, 2.5, 3.0, 4.0],
            "long_factor": [1.0, 1.5, 2.5, 4.0, 7.0, 12.0, 20.0, 30.0],
        },
        vision_config={"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2},
        image_token_id=processor.image_token_id,
        stop_token_ids=processor.stop_token_ids,
        pad_token_id=processor.pad_token_id,
    )
    model = Phi3VForCausalLM(config)
    for number, (name, parameter) in enumerate(model.named_parameters()):
        # Raw bits, so that pinned losses do not depend on how a library draws its normals.
        bits = np.random.PCG64(number).random_raw(parameter.numel()) >> np.uint64(40)
        noise = torch.from_numpy(bits.astype(np.float32) / 2**23 - 1).view_as(parameter)  # uniform in [-1, 1)
        if "norm" in name and name.endswith("weight"):
            parameter.data = 1 + noise / 2
        elif parameter.ndim == 2 and "embed" not in name:
            parameter.data = noise * 2 * parameter.shape[1] ** -0.5
        else:
            parameter.data = noise / 2
    model.save_pretrained(folder)
    return folder


def fresh_model(processor: Phi3VProcessor, folder: Path, **sizes: Any) -> Path:
    """`folder` with a model of hidden size 32 with fresh weights, and with its processor."""
    factors = 16 // sizes["num_attention_heads"]
    config = Phi3VConfig(
        vocab_size=432,
        hidden_size=32,
        rope_scaling={"type": "su", "short_factor": [1.0] * factors, "long_factor": [2.0] * factors},
        image_token_id=processor.image_token_id,
        stop_token_ids=processor.stop_token_ids,
        pad_token_id=processor.pad_token_id,
        **sizes,
    )
    torch.manual_seed(0)
    Phi3VForCausalLM(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Path]:
    return fresh_model


@pytest.fixture(scope="session")
def tiny_model_dir(tiny_processor_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that trains in milliseconds: two decoder layers, num_crops 1, float32, fresh weights."""
    processor = Phi3VProcessor.from_pretrained(tiny_processor_dir, num_crops=1)
    tower = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    sizes = {"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "vision_config": tower}
    return fresh_model(processor, tmp_path_factory.mktemp("tiny_model"), **sizes)


SCRIPT = {"this": "a red picture", "shape": "square", "color": "blue", "blue": "no", "briefly": "yes"}
"""The answers of the scripted model: the one of the last of these words that the conversation holds."""


@pytest.fixture(scope="session")
def scripted_model_dir(tiny_processor_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose answers are exact on every machine, because its weights are made: it answers as SCRIPT says.

    A hidden state is the one-hot token, followed by the share that each word of SCRIPT has in the tokens so far, which
    attention, uniform over all of them, has collected. lm_head leads from `<|assistant|>` to the answer of the last
    word with a share, and from each token of an answer to the next. Images are zero.
    """
    processor = Phi3VProcessor.from_pretrained(tiny_processor_dir, num_crops=1)
    vocab, size, last = 432, 448, processor.token_ids("<|assistant|>\n")[-1]
    config = Phi3VConfig(
        vocab_size=vocab,
        hidden_size=size,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        rope_scaling={"type": "su", "short_factor": [1.0] * (size // 2), "long_factor": [2.0] * (size // 2)},
        vision_config={"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2},
        image_token_id=processor.image_token_id,
        stop_token_ids=processor.stop_token_ids,
        pad_token_id=processor.pad_token_id,
    )
    model = Phi3VForCausalLM(config)
    for name, parameter in model.named_parameters():
        parameter.data.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    layer, head = model.model.layers[0].self_attn, model.lm_head.weight.data
    model.model.embed_tokens.weight.data.fill_diagonal_(1.0)
    for number, (word, text) in enumerate(SCRIPT.items()):
        layer.qkv_proj.weight.data[2 * size + number, processor.token_ids(f" {word}")[-1]] = 1.0  # the values
        layer.o_proj.weight.data[vocab + number, number] = 0.02  # small beside the token, however short the text
        first, *rest = processor.token_ids(f"<|assistant|>\n{text}<|end|>")[1:]
        head[first, :vocab] = -1000.0  # nothing but <|assistant|> leads to the beginning of an answer
        head[first, last] = 0.0
        head[first, vocab + number] = 100.0 * 3**number
        for token, following in pairwise([first, *rest]):
            head[following, token] = 2.0
    folder = tmp_path_factory.mktemp("scripted_model")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def scripted_adapter_dir(scripted_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with which the scripted model answers "square", whatever it is asked."""
    model, processor = load_model(scripted_model_dir)
    start = processor.token_ids("<|assistant|>\n")[-1]
    square = processor.token_ids("<|assistant|>\nsquare<|end|>")[1]
    kind = {"rank": 1, "alpha": 1.0, "dropout": 0.0, "init": "default", "dora": False, "rslora": False}
    adapted = add_lora(model, frozen=("vision", "projector"), **kind)
    head = adapted.get_base_model().lm_head
    head.lora_A["default"].weight.data.fill_(0.0)[0, start] = 1.0
    head.lora_B["default"].weight.data[square, 0] = 2000.0
    save_model(adapted, processor, folder := tmp_path_factory.mktemp("scripted_adapter"))
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train.jsonl: 14 examples, 15 answers, on 5 pages; one has no picture, one has two turns. Pictures in images/."""
    folder = tmp_path_factory.mktemp("tiny_data")
    (folder / "images").mkdir()
    colors = {"red": (220, 30, 30), "blue": (30, 30, 220), "green": (30, 180, 30), "grey": (128, 128, 128)}
    conversations: list[list[dict[str, Any]]] = []
    for name, color in colors.items():
        Image.new("RGB", (48, 40), color).save(folder / "images" / f"{name}.png")
        asked = {"what is the color": name, "is this red": "yes" if name == "red" else "no", "is it light": "maybe"}
        conversations += [[{"images": [f"{name}.png"], "user": q, "assistant": a}] for q, a in asked.items()]
    conversations.append([{"user": "answer briefly", "assistant": "yes"}])
    first = {"images": ["red.png"], "user": "what is this", "assistant": "a red picture"}
    conversations.append([first, {"user": "and is it blue", "assistant": "no"}])
    file = folder / "train.jsonl"
    with file.open("w") as stream:
        for number, turns in enumerate(conversations):
            stream.write(json.dumps({"id": f"e{number}", "source": "tiny", "conversations": turns}) + "\n")
    return file


def tiny_settings(model: Path, train: Path, out: Path, **flags: Any) -> Run:
    """A run on the CPU in float32, four examples a step, four steps an epoch; `flags` by their names."""
    chosen = {"model": str(model), "train": train, "out": out, "batch_size": 4, "dtype": "fp32", "num_workers": 0}
    chosen |= {"learning_rate": 3e-3, "warmup_steps": 2, "max_new_tokens": 6, "progress": False, **flags}
    groups = {}
    for group in dataclasses.fields(Run):
        kind = type(getattr(Run(), group.name))
        names = [field.name for field in dataclasses.fields(kind) if field.name in chosen]
        groups[group.name] = kind(**{name: chosen.pop(name) for name in names})
    assert not chosen, f"no such flags: {chosen}"
    return Run(**groups)


@pytest.fixture
def settings_for(tiny_model_dir: Path, tiny_data: Path, tmp_path: Path) -> Callable[..., Run]:
    """`tiny_settings` with the tiny model and data, the run folder in the test's own folder."""

    def settings(**flags: Any) -> Run:
        chosen = {"model": tiny_model_dir, "train": tiny_data, "out": tmp_path / "run", **flags}
        return tiny_settings(**chosen)

    return settings


@pytest.fixture(scope="session")
def finished_run(tiny_model_dir: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that has learnt its examples by heart: 120 steps of all weights. Not to be changed."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    torch.manual_seed(0)
    torch.set_num_threads(1)
    flags = {"eval": tiny_data, "max_steps": 120, "learning_rate": 1.2e-2, "eval_every_steps": 60, "eval_limit": 5}
    train(tiny_settings(tiny_model_dir, tiny_data, out, **flags))
    return out


@pytest.fixture
def old_run(finished_run: Path, tmp_path: Path) -> Path:
    """The finished run as an earlier version left it: other names of settings, and files that are not there."""
    folder = tmp_path / "old"
    shutil.copytree(finished_run, folder)
    settings = json.loads((folder / "config.json").read_text())
    settings["tuning"]["activation_memory"] = settings["tuning"].pop("activation_checkpointing")
    settings["tuning"] |= {"vision_cache": "memory", "vision_cache_dir": None}
    settings["keeping"] |= {"on_nonfinite": "stop", "on_full_disk": "stop"}
    del settings["optim"]["decay"]
    (folder / "config.json").write_text(json.dumps(settings))
    for name in ("lengths", "images", "published"):
        (folder / f"{name}.json").unlink(missing_ok=True)
    return folder


@pytest.fixture(scope="session")
def lora_run(tiny_model_dir: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a LoRA run of six steps. Not to be changed."""
    out = tmp_path_factory.mktemp("runs") / "lora"
    torch.set_num_threads(1)
    train(tiny_settings(tiny_model_dir, tiny_data, out, lora=True, lora_rank=4, max_steps=6, learning_rate=1e-2))
    return out


@pytest.fixture
def log_of() -> Callable[..., list[dict[str, Any]]]:
    """The lines of a run's log.jsonl of one kind, "step" or "eval"."""

    def read(folder: Path, kind: str = "step") -> list[dict[str, Any]]:
        entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        return [entry for entry in entries if entry["kind"] == kind]

    return read


@pytest.fixture
def changed_model(tiny_model_dir: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the tiny checkpoint with other settings in config.json, or other tensors (None: without)."""

    def change(config: dict[str, Any] | None = None, tensors: dict[str, torch.Tensor | None] | None = None) -> Path:
        folder = tmp_path / "changed_model"
        shutil.copytree(tiny_model_dir, folder)
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | (config or {})))
        if tensors:
            kept = load_file(folder / "model.safetensors") | tensors
            kept = {name: tensor for name, tensor in kept.items() if tensor is not None}
            save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return change


@pytest.fixture(scope="session")
def make_video() -> Callable[..., Path]:
    """A function that writes a video of a bright square that moves: `make_video(path, num_frames, ...)`.

    direction   (right, down) pixels from frame to frame, around the edges
    color      of the square
    codec       of FFmpeg; the default in an .avi with the tag XVID is what UCF101 is made of
    """
    av = pytest.importorskip("av", reason="PyAV is not installed: pip install 'phi3v[video]'")

    def make(
        path: Path,
        num_frames: int = 12,
        *,
        direction: tuple[int, int] = (4, 0),
        color: tuple[int, int, int] = (240, 60, 60),
        size: tuple[int, int] = (64, 48),
        codec: str = "mpeg4",
        options: dict[str, str] | None = None,
    ) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(path), "w") as container:
            stream = container.add_stream(codec, rate=25, options=options or {})
            stream.width, stream.height = size
            stream.pix_fmt = "yuv420p"
            if codec == "mpeg4":
                stream.codec_context.codec_tag = "XVID"
            picture = np.full((size[1], size[0], 3), 20, dtype=np.uint8)
            picture[8:24, 8:24] = color
            for number in range(num_frames):
                moved = np.roll(picture, (number * direction[1], number * direction[0]), axis=(0, 1))
                container.mux(stream.encode(av.VideoFrame.from_ndarray(moved, format="rgb24")))
            container.mux(stream.encode())
        return path

    return make


def tiny_tokenizer() -> Tokenizer:
    """The real tokenizer's normalizer, byte fallback, decoder and special tokens over an alphabet and a few words."""
    letters = ["▁", *map(chr, range(33, 127))]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    merges: dict[tuple[str, str], None] = {}
    for word in WORDS.split():
        merges |= {(word[:k], word[k]): None for k in range(1, len(word))}
    vocabulary = {piece: k for k, piece in enumerate(dict.fromkeys([*pieces, *map("".join, merges)]))}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=list(merges), unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in ("<unk>", "<s>")])
    tokenizer.add_tokens([AddedToken("</s>", normalized=False, special=False, rstrip=True)])
    tokenizer.add_special_tokens(
        [
            AddedToken(token, normalized=False, special=True, rstrip=token not in NOT_RSTRIP)
            for token in ADDED_TOKENS.split()
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


@pytest.fixture(scope="module")  # its event loop would be in the way of tests that have one of their own
def browser() -> Iterator[Any]:
    """A headless Chromium, driven by playwright: `page = browser.new_page()`. Debian's, so nothing is downloaded."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("there is no Chromium here: apt-get install chromium")
    flags = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(
            executable_path=chromium, args=[*flags.split(), "--disable-component-update", "--disable-sync"]
        )
        yield started
        started.close()


@pytest.fixture
def tower_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The crops of every call of the vision tower."""
    seen, forward = list[int](), CLIPVisionTransformer.forward

    def counted(self: Any, crops: torch.Tensor) -> torch.Tensor:
        seen.append(len(crops))
        return forward(self, crops)

    monkeypatch.setattr(CLIPVisionTransformer, "forward", counted)
    return seen
