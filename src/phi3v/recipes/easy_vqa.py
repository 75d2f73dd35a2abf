"""easy-VQA: questions about the shape and the color in a small image. The embedded default, for any computer.

Task      "what color is the circle?", "is there not a red shape in the image?"; 13 answers, among them yes and no
Source    the PyPI package easy-vqa 1.0 by Victor Zhou (github.com/vzhou842/easy-VQA), MIT license
Split     as published: 4,000 images with 38,575 questions to train on, 1,000 with 9,673 to test on
Model     a small Phi-3.5-vision in the published layout, made here and starting from random weights; its tokenizer has
          the published normalizer, special tokens and byte fallback, and whole words for the words of the questions
Scores    accuracy on the test split: majority answer 37.3 %, best answer per question text (blind) 67.0 %; this run
          84.6 % after three epochs, nine minutes on two cores with AVX2 in float32 (with AVX512, 80.9 %)
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors, trainers
from torch.nn.functional import interpolate
from transformers import PreTrainedTokenizerFast

from phi3v.base.config import Base, Data, Evaluation, Keeping, Optim, Run
from phi3v.base.console import progress_bar
from phi3v.base.errors import InputError
from phi3v.base.files import written_whole
from phi3v.data.processor import Phi3VProcessor
from phi3v.data.writer import writing
from phi3v.model import Phi3VConfig, Phi3VForCausalLM
from phi3v.model.vision import SIDE
from phi3v.recipes.conversion import alone

FOLDER = Path("data/easy-vqa")
TRAIN, TEST, MODEL = FOLDER / "train.jsonl", FOLDER / "test.jsonl", FOLDER / "model"

NUM_CROPS = 1  # the images have 64x64 pixels
CLIP: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 2}
DECODER: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "initializer_range": 0.08,  # about 1 / sqrt(hidden_size)
}
SEED = 0


@dataclass(frozen=True, kw_only=True)
class Options:
    """The task can be asked for nothing besides the flags of a run."""


def settings(options: Options = Options()) -> Run:
    """The run that learns the task; every value can be overridden."""
    return Run(
        base=Base(model=str(MODEL)),
        data=Data(train=(TRAIN,), eval=(TEST,), batch_size=16, questions="expected", max_tokens_per_pack=16384),
        optim=Optim(epochs=3, learning_rate=1.5e-3, warmup_steps=30),
        evaluation=Evaluation(eval_every_steps=125, eval_limit=500, best="last", max_new_tokens=4),
        keeping=Keeping(out=Path("runs/easy-vqa"), save_every_steps=125),
    )


def prepare(run: Run, options: Options = Options()) -> Run:
    """Make the data and the checkpoint that `settings` names, as far as `run` uses them and they are not there yet."""
    if TRAIN in run.data.train or TEST in run.data.eval or run.base.model == str(MODEL):
        convert(FOLDER)
    if run.base.model == str(MODEL):
        build_checkpoint(MODEL, TRAIN)
    return run


# -- the data --------------------------------------------------------------------------------------------------------


def convert(folder: Path) -> None:
    """Write the package's data as folder/{train,test}.jsonl with folder/images/{train,test}/N.png, unless it is there.

    The folder appears whole or not at all. Raises InputError if the package is not installed, the disk is full, or the
    folder holds something else.
    """

    def is_there() -> bool:
        return (folder / "train.jsonl").exists() and (folder / "test.jsonl").exists()

    if is_there():
        return
    try:
        import easy_vqa
    except ImportError as error:
        raise InputError("easy-VQA is not installed: pip install 'phi3v[easy-vqa]'") from error
    splits = {
        "train": (easy_vqa.get_train_questions(), easy_vqa.get_train_image_paths()),
        "test": (easy_vqa.get_test_questions(), easy_vqa.get_test_image_paths()),
    }
    num_images = sum(len(paths) for _, paths in splits.values())
    with alone(folder):
        if is_there():  # another process has made it
            return
        with (
            writing(folder, "easy_vqa") as writer,
            progress_bar("converting easy-VQA", num_images, "images") as advance,
        ):
            for split, (questions, paths) in splits.items():
                for number, path in paths.items():
                    writer.put_image(f"{split}/{number}.png", Path(path))
                    advance(1)
                for number, (question, answer, image) in enumerate(zip(*questions, strict=True)):
                    turn = {"images": [f"{split}/{image}.png"], "user": question, "assistant": answer}
                    writer.add(
                        split, {"id": f"{split}-{number}", "conversations": [turn]}, f"easy-VQA, {split} {number}"
                    )


# -- the checkpoint --------------------------------------------------------------------------------------------------


def build_checkpoint(folder: Path, *train_jsonl: Path) -> None:
    """Write a small random checkpoint in the published layout, unless it is there; always the same weights."""
    if folder.exists():
        return
    processor = Phi3VProcessor(build_tokenizer(chain.from_iterable(map(_texts, train_jsonl))), num_crops=NUM_CROPS)
    config = Phi3VConfig(
        **DECODER,
        vision_config=CLIP,
        vocab_size=-(-len(processor.tokenizer) // 64) * 64,
        pad_token_id=processor.pad_token_id,
        image_token_id=processor.image_token_id,
        stop_token_ids=processor.stop_token_ids,
        rope_scaling=_plain_su_rope(DECODER["hidden_size"] // DECODER["num_attention_heads"]),
    )
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        model = Phi3VForCausalLM(config)
        _open_eyes(model)
    with alone(folder):
        if folder.exists():  # another process has made it, and it is the same
            return
        with written_whole(folder) as unfinished:
            processor.save_pretrained(unfinished)
            _name_tokenizer_class(unfinished / "tokenizer_config.json")
            model.save_pretrained(unfinished)


@torch.no_grad()
def _open_eyes(model: Phi3VForCausalLM) -> None:
    """A random start from which so small a CLIP learns from a few thousand images.

    Patch filters are smooth, as the transform enlarges these images fivefold and leaves nothing finer to see.
    Positions are sines of row and column, so that neighbours look alike. Queries and keys are three times as large, so
    that a patch attends to its like rather than evenly to all.
    """
    vision = model.model.vision_embed_tokens.img_processor.vision_model
    filters, positions = vision.embeddings.patch_embedding.weight, vision.embeddings.position_embedding.weight
    coarse = torch.randn(len(filters), 3, 3, 3) * 0.02
    filters.copy_(interpolate(coarse, size=(14, 14), mode="bilinear", align_corners=True))
    frequencies = 100.0 ** -torch.linspace(0, 1, positions.shape[1] // 4 + 1)[:-1]
    angles = torch.arange(SIDE)[:, None] * frequencies
    along = torch.cat([angles.sin(), angles.cos()], dim=-1)  # [24, D/2], the same for rows and columns
    grid = torch.cat([along[:, None].expand(-1, SIDE, -1), along[None].expand(SIDE, -1, -1)], dim=-1)
    positions.copy_(torch.cat([torch.zeros(1, positions.shape[1]), grid.flatten(0, 1)]))
    for name, weight in vision.encoder.named_parameters():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weight.mul_(3)


def _plain_su_rope(head_dim: int) -> dict[str, Any]:
    """The published kind of RoPE with factors of 1: readers of the layout expect the key."""
    ones = [1.0] * (head_dim // 2)
    return {"type": "su", "short_factor": ones, "long_factor": ones}


def _name_tokenizer_class(file: Path) -> None:
    """The name every transformers knows; version 5 writes TokenizersBackend, which older readers do not have."""
    settings = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**settings, "tokenizer_class": "PreTrainedTokenizerFast"}, indent=2), encoding="utf-8")


def _texts(train_jsonl: Path) -> Iterator[str]:
    """The pieces the tokenizer will meet between special tokens: a question after its newline, and an answer."""
    with train_jsonl.open(encoding="utf-8") as file:
        for line in file:
            for turn in json.loads(line)["conversations"]:
                yield "\n" + turn["user"]
                yield turn["assistant"]


# The published special tokens in the published order: <|endoftext|> is 32000 there and <|image|> 32044.
_PLACEHOLDERS = [f"<|placeholder{number}|>" for number in range(1, 40)]
SPECIAL_TOKENS = [
    *("<|endoftext|>", "<|assistant|>", *_PLACEHOLDERS[:4], "<|system|>", "<|end|>"),
    *(*_PLACEHOLDERS[4:6], "<|user|>", *_PLACEHOLDERS[6:], "<|image|>"),
]
_KEEP_WHAT_FOLLOWS = {"<unk>", "<s>", "<|endoftext|>", "<|system|>", "<|end|>", "<|user|>"}  # no rstrip
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt and messages[-1]['role'] != 'assistant' %}{{ '<|assistant|>\\n' }}{% endif %}"
)


def build_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer that treats text exactly as the published one, with a vocabulary made of the words of `texts`.

    Ids: <unk>, <s>, </s>, 256 bytes, printable ASCII, pieces of words and words, and last the special tokens. A word
    seen in `texts`, with or without a space before it, is one token, and no token spans a space.
    """
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    ends = ["<unk>", "<s>", "</s>"]
    reserved = [*ends, *(f"<0x{byte:02X}>" for byte in range(256))]
    learner = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    # Each word goes in by itself, so that none is ever merged with its neighbour; a newline is left to the bytes.
    words = [word for text in texts for word in re.findall(r"▁?\w+|[^\w\n]", normalizer.normalize_str(text))]
    learner.train_from_iterator(
        words,
        trainers.BpeTrainer(
            vocab_size=32000,
            min_frequency=1,
            show_progress=False,
            special_tokens=reserved,
            initial_alphabet=[*map(chr, range(33, 127)), "▁"],
        ),
    )
    tokenizer = Tokenizer(learner.model)
    tokenizer.normalizer = normalizer
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    for token in [*ends, *SPECIAL_TOKENS]:
        strip = token not in _KEEP_WHAT_FOLLOWS
        added = AddedToken(token, rstrip=strip, normalized=False, special=token != "</s>")
        (tokenizer.add_special_tokens if added.special else tokenizer.add_tokens)([added])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        unk_token="<unk>",
        padding_side="right",
        model_max_length=131072,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
