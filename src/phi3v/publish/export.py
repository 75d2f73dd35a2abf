"""A run as a folder that others can use: one whole model in the published layout, its card, and proof that it works.

Invariant: an exported folder has been loaded anew, by the Auto classes alone, and said what the run's model says, stops
where answers end, and gives every picture as many tokens as the published processor. Otherwise there is no folder.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from huggingface_hub import HfApi, get_token, snapshot_download
from huggingface_hub.errors import HTTPError  # that of httpx up to 1.x, that of httpx2 from 2.0 on
from huggingface_hub.utils import validate_repo_id
from PIL import Image
from rich.markup import escape
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoProcessor

from phi3v.base.console import say
from phi3v.base.errors import InputError
from phi3v.base.files import written_whole
from phi3v.base.hardware import pick_device
from phi3v.base.jsonfile import read_object
from phi3v.base.runfolder import RunFolder
from phi3v.data.image import CROP
from phi3v.data.processor import Phi3VProcessor
from phi3v.model.loading import ADAPTER_CONFIG, first_line, load_model, save_model
from phi3v.model.parts import set_precision
from phi3v.publish.card import write_card
from phi3v.publish.merge import distance, merge_adapter, probe, source_folder

# The same weights give the same logits: on a CPU the difference is 0. This is room for a GPU's sums in another order.
SAME = 1e-6

CODE, CARRIED = "configuration_phi3_v.py", ("*_phi3_v.py", "LICENSE")
"""What lies beside the published weights and is neither read nor run here: vLLM, for one, needs the Python files."""

SIZES = [(336, 336), (1, 1), (640, 480), (480, 640), (1344, 336), (1000, 1001), (333, 517), (2480, 3508), (24, 17)]
SIZES += [(224, 25), (41, 448), (1200, 100), (90, 1111), (16, 9), (1024, 768), (768, 1024), (4200, 1300), (7, 5)]
"""(width, height) of the pictures whose tokens are counted; in some of them a rounding decides."""


def export(
    run: str,
    /,
    *,
    out: Path,
    base_model: str | None = None,
    dataset: tuple[str, ...] = (),
    push: str | None = None,
    private: bool = False,
) -> Path:
    """Make of a run a folder to publish or to serve: merged, with a model card, and tested.

    The folder has the published layout: adapters are merged, generation_config.json ends answers at <|end|> and
    <|endoftext|>, preprocessor_config.json says num_crops, README.md is a model card for the Hugging Face Hub with the
    run's data, settings, scores and samples. It is then loaded anew, and kept only if it gives the run's own logits and
    the published number of tokens for pictures of many shapes. docs/serve.md says how to serve it.

    Args:
        run: A run folder, or a model or adapter folder, whose card says less.
        out: Where it goes. It must not exist.
        base_model: Name on the Hub of the model that was tuned, for the card. Default: the run's, if it is one.
        dataset: Names of its data sets on the Hub, for the card.
        push: Upload it to the Hub under this name, owner/model.
        private: With --push: only the owner can see it.
    """
    folder = source_folder(run, out)
    if push is not None:
        _check_push(push)
    elif private:
        raise InputError("--private has no effect without --push")
    device = pick_device()
    if (folder / ADAPTER_CONFIG).is_file():
        model, processor, base, own, expected = merge_adapter(folder, device)
        name = base
    else:
        base, name = str(folder), _started_from(Path(run))
        model, processor = load_model(folder)
        precision = model.dtype
        own = expected = probe(model, processor, device)
        set_precision(model.requires_grad_(False), precision)
    model.generation_config.eos_token_id = list(processor.stop_token_ids)
    model.generation_config.pad_token_id = processor.pad_token_id
    base_model = base_model or _name_on_hub(name)
    with written_whole(out) as temporary:
        save_model(model, processor, temporary)
        del model  # the other one needs its room
        carry(Path(base), base_model, temporary)
        difference = self_test(temporary, expected, own, device)
        write_card(temporary, out.name, Path(run), base_model=base_model, datasets=dataset, difference=difference)
    say(f"exported model  {escape(str(out))}")
    if push is not None:
        _push(out, push, private=private)
    return out


def carry(base: Path, base_model: str | None, folder: Path) -> None:
    """Puts the published Python files and licence into the folder, and makes its files name them where they are.

    They come from beside the base, or from the Hub, as far as it can be reached. Where they are not to be had, the
    files name those on the Hub: transformers understands `owner/model--module.Class`.
    """
    source = base
    if base_model and not (base / CODE).is_file():
        try:
            source = Path(snapshot_download(base_model, allow_patterns=list(CARRIED)))
        except (OSError, ValueError, HTTPError) as error:
            say(escape(f"the Python files of {base_model} cannot be had: {first_line(error)}"))
    for pattern in CARRIED:
        for file in source.glob(pattern):
            shutil.copy(file, folder)

    def place(target: str) -> str:
        name = target.rpartition("--")[2]
        here = (folder / f"{name.partition('.')[0]}.py").is_file()
        return name if here or not base_model else f"{base_model}--{name}"

    for name in ("config.json", "preprocessor_config.json", "processor_config.json"):
        content = read_object(folder / name)
        if isinstance(content.get("auto_map"), dict):
            content["auto_map"] = {auto: place(str(target)) for auto, target in content["auto_map"].items()}
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if not (folder / CODE).is_file():
        say("note: the base model's Python files are not in the folder; vLLM needs them, see docs/serve.md")


# -- the self-test ---------------------------------------------------------------------------------------------------


def self_test(folder: Path, expected: Tensor, own: Tensor, device: torch.device) -> float:
    """Loads the folder as anybody would and compares. Raises InputError when it is not the model it should be.

    `expected` are the probe's logits of the model that was saved, `own` those of the run: with an adapter they differ
    by what merging rounds, which `merge_adapter` has judged. Returns the relative difference (L2) from `own`.
    """
    model, processor = AutoModelForCausalLM.from_pretrained(folder, dtype="auto"), AutoProcessor.from_pretrained(folder)
    found = probe(model, processor, device)
    if not (changed := distance(found, expected)) <= SAME:
        raise InputError(
            f"self-test: loaded anew, the exported model is another one: its logits differ by {changed:.1e} (relative, "
            f"at most {SAME:.0e} allowed); nothing was kept"
        )
    stops = read_object(folder / "generation_config.json").get("eos_token_id")
    if stops != list(processor.stop_token_ids):
        raise InputError(
            f"self-test: generation_config.json stops at {stops}, answers end at {list(processor.stop_token_ids)}; "
            "nothing was kept"
        )
    num_crops = read_object(folder / "preprocessor_config.json")["num_crops"]
    if wrong := miscounted(processor, num_crops, SIZES):
        (width, height), counted, published = wrong[0]
        raise InputError(
            f"self-test: a picture of {width}x{height} has {counted} tokens, the published processor gives it "
            f"{published} with num_crops {num_crops} (and {len(wrong) - 1} other sizes differ); nothing was kept"
        )
    difference = distance(found, own)
    say(f"self-test  loaded anew, its logits differ by {difference:.1e} (relative) from the run's")
    say(f"self-test  {len(SIZES)} pictures have the published number of tokens at num_crops {num_crops}")
    say(f"self-test  answers end at {' and '.join(map(str, stops))}")
    return difference


def miscounted(
    processor: Phi3VProcessor, num_crops: int, sizes: Iterable[tuple[int, int]]
) -> list[tuple[tuple[int, int], int, int]]:
    """((width, height), tokens here, tokens published) of every size at which the two differ."""
    wrong = []
    for size in sizes:
        published = published_tokens(*size, num_crops)
        if published is None:  # the published processor cannot read so long a strip, and nor can ours
            continue
        ids = processor("<|image_1|>", Image.new("RGB", size))["input_ids"]
        if (counted := int((ids == processor.image_token_id).sum())) != published:
            wrong.append((size, counted, published))
    return wrong


def published_tokens(width: int, height: int, num_crops: int) -> int | None:
    """Tokens of a picture as the published processor counts them, written anew from its description.

    Not by way of `phi3v.data.image`, which it is to judge. A picture with its long side lying is scaled to 336 s
    pixels, with the largest s up to which s * ceil(s / ratio) stays within num_crops, and padded to a whole number of
    crops. Each crop has 12 x 12 tokens, each row of them one more; so has a picture of the whole, in one crop; and one
    stands between. None where scaling leaves nothing of the short side.
    """
    long, short = max(width, height), min(width, height)
    ratio = long / short
    fits = [s * math.ceil(s / ratio) <= num_crops for s in range(1, num_crops + 2)]
    across = fits.index(False)
    pixels = int(across * CROP / ratio)
    if pixels == 0:
        return None
    down = math.ceil(pixels / CROP)
    columns, rows = (across, down) if width >= height else (down, across)
    picture = 12 * rows * (12 * columns + 1)
    return picture + 1 + 12 * (12 + 1)


# -- the Hub ---------------------------------------------------------------------------------------------------------


def _started_from(run: Path) -> str:
    """The model that a run was started from, as it was named there; "" for a folder that is no run's."""
    folder = RunFolder(run)
    return folder.config.base.model if folder.final.is_dir() else ""


def _name_on_hub(name: str) -> str | None:
    """The name, if it is one of the Hub and not of a folder."""
    return None if Path(name).exists() or Path(name).is_absolute() or name.count("/") != 1 else name


def _check_push(repo: str) -> None:
    """Before the work: whether the name can be one, and whether anybody is logged in."""
    try:
        validate_repo_id(repo)
    except ValueError as error:
        raise InputError(f"--push {repo}: {first_line(error)}") from error
    if repo.count("/") != 1:
        raise InputError(f"--push {repo}: a name on the Hub is owner/model")
    if get_token() is None:
        raise InputError(f"--push {repo} needs a token of the Hub: run `hf auth login`, or set HF_TOKEN")


def _push(folder: Path, repo: str, *, private: bool) -> None:
    try:
        api = HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Exported by phi3v")
    except (OSError, ValueError, RuntimeError, HTTPError) as error:
        raise InputError(
            f"--push {repo}: {first_line(error)}; {folder} itself is whole, `hf upload {repo} {folder}` tries again"
        ) from error
    say(f"pushed to       {escape(f'{api.endpoint}/{repo}')}")
