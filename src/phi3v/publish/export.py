"""`phi3v export`: a run as a folder that others can use: one whole model in the published layout, and its model card.

Invariant: an exported folder has been loaded by the Auto classes alone, gives the logits of the run's model, and stops
where answers end. Otherwise there is no folder.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from huggingface_hub import HfApi, get_token, snapshot_download
from huggingface_hub.errors import HTTPError  # that of httpx up to 1.x, that of httpx2 from 2.0 on
from rich.markup import escape
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoProcessor

from phi3v.base.console import say
from phi3v.base.errors import InputError
from phi3v.base.files import written_whole
from phi3v.base.hardware import pick_device
from phi3v.base.jsonfile import read_object
from phi3v.infer.answering import started_from
from phi3v.model.loading import ADAPTER_CONFIG, first_line, load_model, save_model
from phi3v.model.parts import set_precision
from phi3v.publish.card import write_card
from phi3v.publish.merge import distance, merge_adapter, probe, source_folder

# The same weights give the same logits: on a CPU the difference is 0. A GPU may sum in another order.
SAME = 1e-6

CODE, CARRIED = "configuration_phi3_v.py", ("*_phi3_v.py", "LICENSE")
"""Files beside the published weights that are never read or run here. Other programs, such as vLLM, need the code."""


def export(
    run: str,
    /,
    *,
    out: Path,
    base: str | None = None,
    base_model: str | None = None,
    dataset: tuple[str, ...] = (),
    push: str | None = None,
    private: bool = False,
) -> Path:
    """Export a run as a verified, standalone model folder: merged, with a model card, to publish or to serve.

    The folder has the published layout: adapters are merged, generation_config.json ends answers at <|end|> and
    <|endoftext|>, preprocessor_config.json has num_crops, README.md is a model card for the Hugging Face Hub with the
    run's data, settings, scores and samples. It is then loaded again, and kept only if it gives the run's own logits.
    docs/serve.md says how to serve it.

    Args:
        run: A run folder. A model or adapter folder works too, with less in its card.
        out: Where it goes. It must not exist.
        base: Where the base model of an adapter is now. Default: where it was in training.
        base_model: Name on the Hub of the model that was tuned, for the card. Default: the run's
            base model, if that is a name on the Hub.
        dataset: Names of its data sets on the Hub, for the card.
        push: Upload it to the Hub under this name, owner/model.
        private: With --push: only the owner can see it.
    """
    folder = source_folder(run, out, base)
    if push is not None:
        _check_push(push)
    elif private:
        raise InputError("--private has no effect without --push")
    device = pick_device()
    if (folder / ADAPTER_CONFIG).is_file():
        model, processor, source, own, expected = merge_adapter(folder, device, base)
        name = source
    else:
        source, name = str(folder), started_from(run) or ""
        model, processor = load_model(folder, base=base)
        precision = model.dtype
        own = expected = probe(model, processor, device)
        set_precision(model.requires_grad_(False), precision)
    model.generation_config.eos_token_id = list(processor.stop_token_ids)
    model.generation_config.pad_token_id = processor.pad_token_id
    base_model = base_model or _name_on_hub(name)
    with written_whole(out, new=True) as temporary:
        save_model(model, processor, temporary)
        del model  # makes room for the exported one
        carry(Path(source), base_model, temporary)
        difference = self_test(temporary, expected, own, processor.num_crops, device)
        write_card(temporary, out.name, Path(run), base_model=base_model, datasets=dataset, difference=difference)
    say(f"exported model  {escape(str(out))}")
    if push is not None:
        _push(out, push, private=private)
    return out


def carry(base: Path, base_model: str | None, folder: Path) -> None:
    """Copy the published Python files and license into the folder, and make its files refer to them there.

    They come from beside the base, or from the Hub if it can be reached. Without them the files refer to those on the
    Hub: transformers understands `owner/model--module.Class`.
    """
    source = base
    if base_model and not (base / CODE).is_file():
        try:
            source = Path(snapshot_download(base_model, allow_patterns=list(CARRIED)))
        except (OSError, ValueError, HTTPError) as error:
            say(escape(f"the Python files of {base_model} cannot be fetched: {first_line(error)}"))
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


def self_test(folder: Path, expected: Tensor, own: Tensor, num_crops: int, device: torch.device) -> float:
    """Load the folder as any program would, and compare. Raises InputError if it differs from the model of the run.

    `expected` are the probe's logits of the model that was saved, `own` those of the run: with an adapter they differ
    by the rounding of the merge, which `merge_adapter` has checked. Returns the relative difference (L2) from `own`.
    """
    model, processor = AutoModelForCausalLM.from_pretrained(folder, dtype="auto"), AutoProcessor.from_pretrained(folder)
    stops = read_object(folder / "generation_config.json").get("eos_token_id")
    for what, there, wanted in (
        ("generation_config.json stops at", stops, list(processor.stop_token_ids)),
        ("preprocessor_config.json has num_crops", processor.num_crops, num_crops),
    ):
        if there != wanted:
            raise InputError(f"self-test: {what} {there}, the model of the run {wanted}; nothing was kept")
    found = probe(model, processor, device)
    if not (changed := distance(found, expected)) <= SAME:
        raise InputError(
            f"self-test: the logits differ by {changed:.1e} (relative, above {SAME:.0e}); nothing was kept"
        )
    difference = distance(found, own)
    say(f"self-test  loaded from its files, its logits differ by {difference:.1e} (relative) from the run's")
    say(f"self-test  images are cut into at most {num_crops} crops, answers end at {stops}")
    return difference


# -- the Hub ---------------------------------------------------------------------------------------------------------


def _name_on_hub(name: str) -> str | None:
    """The name, if it is one on the Hub and no path."""
    return None if Path(name).exists() or Path(name).is_absolute() or name.count("/") != 1 else name


def _check_push(repo: str) -> None:
    """Raises InputError for a name without an owner, and without a token."""
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
