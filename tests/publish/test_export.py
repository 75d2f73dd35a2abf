"""An exported folder: its files, that it is the run's model, and what happens when it is not."""

from __future__ import annotations

import base64
import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor

from phi3v.base.config import Run
from phi3v.base.errors import InputError
from phi3v.base.runfolder import RunFolder
from phi3v.data.encode import Turn
from phi3v.data.image import EXIF_ORIENTATION, ImageRules
from phi3v.data.processor import Phi3VProcessor
from phi3v.infer.answering import Answerer, Loading
from phi3v.infer.predict import predict
from phi3v.infer.stream import Sampling
from phi3v.model.loading import load_model, save_model
from phi3v.model.parts import add_lora
from phi3v.model.quantization import Quantization, quantize
from phi3v.publish import export as room
from phi3v.publish.export import carry, export
from phi3v.publish.merge import merge
from phi3v.train.loop import train

DOCS = Path(__file__).parents[2] / "docs"
HUB_NAME = "microsoft/Phi-3.5-vision-instruct"
CODE = ("configuration_phi3_v.py", "modeling_phi3_v.py", "processing_phi3_v.py")


@pytest.fixture(scope="module")
def exported(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run, exported. Not to be changed."""
    return export(str(finished_run), out=tmp_path_factory.mktemp("exported") / "colors")


@pytest.fixture(scope="module")
def scripted(scripted_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripted model, exported, whose answers are known. Not to be changed."""
    return export(str(scripted_model_dir), out=tmp_path_factory.mktemp("exported") / "script")


def python_in(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


# -- what is in the folder -------------------------------------------------------------------------------------------


def test_an_exported_folder_has_the_published_layout(exported: Path, finished_run: Path) -> None:
    ours, run = load_file(exported / "model.safetensors"), load_file(finished_run / "final/model.safetensors")
    assert ours.keys() == run.keys()
    assert all(torch.equal(ours[name], run[name]) and ours[name].dtype == run[name].dtype for name in run)
    assert {file.name for file in exported.iterdir()} == {
        *(file.name for file in (finished_run / "final").iterdir()),
        "README.md",
    }
    processor = Phi3VProcessor.from_pretrained(exported)
    stops = json.loads((exported / "generation_config.json").read_text())
    assert stops["eos_token_id"] == list(processor.stop_token_ids)
    assert stops["pad_token_id"] == processor.pad_token_id
    assert json.loads((exported / "preprocessor_config.json").read_text())["num_crops"] == 1
    assert not any(b"/tmp" in file.read_bytes() for file in exported.iterdir()), "a path of this machine was told"


def test_a_lora_run_is_merged_as_merge_does_it(lora_run: Path, tmp_path: Path, capsys) -> None:
    out = export(str(lora_run), out=tmp_path / "exported")
    merge(str(lora_run), out=tmp_path / "merged")
    ours, merged = (load_file(folder / "model.safetensors") for folder in (out, tmp_path / "merged"))
    assert all(torch.equal(ours[name], merged[name]) for name in merged.keys() | ours.keys())
    said = capsys.readouterr().out
    assert "merging changed the logits by" in said
    assert "self-test  loaded from its files, its logits differ by" in said


def test_a_checkpoint_in_half_precision_stays_what_it_is(changed_model, tiny_model_dir: Path, tmp_path: Path) -> None:
    halves = {name: t.bfloat16() for name, t in load_file(tiny_model_dir / "model.safetensors").items()}
    folder = changed_model({"torch_dtype": "bfloat16"}, halves)
    out = export(str(folder), out=tmp_path / "out")
    found = load_file(out / "model.safetensors")
    assert all(torch.equal(found[name], halves[name]) and found[name].dtype == torch.bfloat16 for name in halves)


def test_an_adapter_over_a_quantized_base_is_exported_whole(tiny_checkpoint_dir: Path, tmp_path: Path, capsys) -> None:
    pytest.importorskip("bitsandbytes", reason="needs pip install 'phi3v[qlora]'")
    model, processor = load_model(tiny_checkpoint_dir)
    quantize(model, Quantization(), compute_dtype=torch.float32)
    kind = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "init": "gaussian", "dora": False, "rslora": False}
    model = add_lora(model, frozen=("vision", "projector"), **kind)
    save_model(model, processor, tmp_path / "adapter")
    out = export(str(tmp_path / "adapter"), out=tmp_path / "out")
    names = load_file(tiny_checkpoint_dir / "model.safetensors").keys()
    assert load_file(out / "model.safetensors").keys() == names
    assert not (out / "quantization.json").exists()
    assert "the merged model is not quantized: its logits differ by" in capsys.readouterr().out


def test_num_crops_are_those_of_the_run(lora_run: Path, tmp_path: Path, capsys) -> None:
    run = tmp_path / "run"
    shutil.copytree(lora_run, run)
    settings = run / "final/preprocessor_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "num_crops": 2}))
    out = export(str(run), out=tmp_path / "out")
    assert json.loads((out / "preprocessor_config.json").read_text())["num_crops"] == 2
    assert "images are cut into at most 2 crops" in capsys.readouterr().out


def test_rules_for_images_are_the_same_in_training_answers_and_export(
    settings_for: Callable[..., Run], tiny_data: Path, tmp_path: Path
) -> None:
    """A turned image has another number of tokens: the run would end if any part of it saw the image otherwise."""
    shutil.copytree(tiny_data.parent, tmp_path / "data")
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    Image.new("RGB", (900, 300), "red").save(tmp_path / "data/images/red.png", exif=exif)
    data = tmp_path / "data/train.jsonl"
    flags = {"train": data, "eval": data, "num_crops": 4, "score": "both", "labels": ("yes", "no")}
    flags |= {"lora": True, "max_steps": 2}
    run = settings_for(**flags, exif_orientation="apply", image_colors="visible")
    train(run)
    rules = ImageRules(exif_orientation="apply", image_colors="visible")
    answerer = Answerer.load(run.keeping.out)
    assert answerer.reading.rules == answerer.processor.rules == rules
    red = str(data.parent / "images/red.png")
    assert RunFolder(run.keeping.out).images["red.png"][:2] == [1008, 336]
    inputs = answerer.processor("<|image_1|>", [red])
    assert inputs["image_sizes"].tolist() == [[1008, 336]]
    assert list(answerer.stream((Turn(user="what is it", images=(red,)),), Sampling(max_new_tokens=1)))
    out = export(str(run.keeping.out), out=tmp_path / "exported")
    assert AutoProcessor.from_pretrained(out).rules == rules
    card = (out / "README.md").read_text()
    assert "turned as their EXIF orientation says" in card
    assert "laid on white" in card
    published = Answerer.load(out, Loading(exif_orientation="ignore", image_colors="published"))
    assert published.reading.rules == ImageRules()


def test_a_run_of_an_earlier_version_is_exported(old_run: Path, tmp_path: Path) -> None:
    out = export(str(old_run), out=tmp_path / "out")
    assert "| `--learning-rate` | `0.012` |" in (out / "README.md").read_text()


# -- loading it ------------------------------------------------------------------------------------------------------


def test_the_cards_own_example_answers(scripted: Path, tiny_data: Path) -> None:
    """The Python on the card, word for word but for the names in it: plain transformers after `import phi3v`."""
    (example,) = python_in((scripted / "README.md").read_text())
    assert '"script"' in example
    example = example.replace('"script"', repr(str(scripted)))
    example = example.replace('"image.png"', repr(str(tiny_data.parent / "images/red.png")))
    said: list[str] = []
    exec(example.replace("What is shown in this image?", "what is this"), {"print": said.append})
    assert said == ["a red picture"]


def test_the_readmes_example_answers(scripted: Path, tiny_data: Path) -> None:
    """The Python in the README, word for word but for the model, the image, the question, and what they need."""
    (example,) = (text for text in python_in((DOCS.parent / "README.md").read_text()) if "from_pretrained" in text)
    example = re.sub(r'from_pretrained\(("[^"]+"|\w+)', f"from_pretrained({str(scripted)!r}", example)
    example = example.replace('"page.png"', repr(str(tiny_data.parent / "images/red.png"))).replace(
        ", num_crops=16", ""
    )
    example = example.replace("What is the total?", "what is this").replace('"bfloat16"', '"float32"')
    said: list[str] = []
    exec(example, {"print": said.append})
    assert said == ["a red picture"]


def test_the_docs_example_answers_as_predict_does(
    scripted: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Python for plain transformers in docs/serve.md, word for word: two questions in a batch."""
    (example,) = (text for text in python_in((DOCS / "serve.md").read_text()) if "import phi3v" in text)
    (tmp_path / "exports").mkdir()
    (tmp_path / "exports/mine").symlink_to(scripted)
    for name in ("red.png", "blue.png"):
        (tmp_path / name).symlink_to(tiny_data.parent / "images" / name)
    monkeypatch.chdir(tmp_path)
    said: list[str] = []
    exec(example, {"print": said.append})
    asked = [("red.png", "what is the color"), ("blue.png", "is this red")]
    lines = [{"id": file, "conversations": [{"images": [file], "user": text}]} for file, text in asked]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = predict(str(scripted), Path("asked.jsonl"), image_root=tiny_data.parent / "images", out=Path("out.jsonl"))
    assert (
        said == [json.loads(line)["prediction"] for line in out.read_text().splitlines()] == ["blue", "a red picture"]
    )


# -- the self-test ---------------------------------------------------------------------------------------------------


def test_a_folder_that_is_another_model_is_not_kept(finished_run: Path, tmp_path: Path, monkeypatch) -> None:
    save = room.save_model

    def damaged(model: Any, processor: Any, folder: Path) -> None:
        save(model, processor, folder)
        tensors = load_file(folder / "model.safetensors")
        tensors["model.norm.weight"] *= 1.001
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(room, "save_model", damaged)
    with pytest.raises(InputError, match=r"self-test: the logits differ by \d\.\de-0\d .*kept"):
        export(str(finished_run), out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_does_not_stop_is_not_kept(finished_run: Path, tmp_path: Path, monkeypatch) -> None:
    real = room.carry

    def spoilt(base: Path, base_model: str | None, folder: Path) -> None:
        real(base, base_model, folder)
        (folder / "generation_config.json").write_text('{"eos_token_id": 2}')

    monkeypatch.setattr(room, "carry", spoilt)
    with pytest.raises(InputError, match=r"generation_config\.json stops at 2, the model of the run \[424, 417\]"):
        export(str(finished_run), out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_other_crops_is_not_kept(finished_run: Path, tmp_path: Path, monkeypatch) -> None:
    """As when the num_crops of the training do not reach the server: vLLM's well-known 757 tokens against 457."""
    real = room.carry

    def spoilt(base: Path, base_model: str | None, folder: Path) -> None:
        real(base, base_model, folder)
        file = folder / "preprocessor_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "num_crops": 16}))

    monkeypatch.setattr(room, "carry", spoilt)
    with pytest.raises(InputError, match=r"preprocessor_config\.json has num_crops 16, the model of the run 1;"):
        export(str(finished_run), out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# -- the published code ----------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A folder as it is before `carry`, of a base that names its remote code."""
    folder = tmp_path / "saved"
    shutil.copytree(tiny_model_dir, folder)
    config = json.loads((folder / "config.json").read_text())
    maps = {"AutoConfig": "configuration_phi3_v.Phi3VConfig", "AutoModelForCausalLM": f"{HUB_NAME}--modeling_phi3_v.M"}
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": maps}))
    return folder


def maps_of(folder: Path) -> set[str]:
    files = [folder / name for name in ("config.json", "preprocessor_config.json", "processor_config.json")]
    found = [json.loads(file.read_text()).get("auto_map", {}) for file in files]
    return {target for targets in found for target in targets.values()}


def test_python_files_beside_the_base_come_along(saved: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for name in (*CODE, "LICENSE", "sample_inference.py"):
        (base / name).write_text(f"# {name}")
    carry(base, None, saved)
    assert {*CODE, "LICENSE"} <= {file.name for file in saved.iterdir()}
    assert not (saved / "sample_inference.py").exists()
    assert maps_of(saved) >= {"configuration_phi3_v.Phi3VConfig", "modeling_phi3_v.M"}
    assert not any("--" in target for target in maps_of(saved)), "they lie here, and need no network"


def test_python_files_are_fetched_from_the_hub(saved: Path, tmp_path: Path, monkeypatch) -> None:
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for name in CODE:
        (snapshot / name).write_text(f"# {name}")
    asked = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(snapshot)

    monkeypatch.setattr(room, "snapshot_download", download)
    carry(Path(HUB_NAME), HUB_NAME, saved)
    assert asked == [(HUB_NAME, ["*_phi3_v.py", "LICENSE"])]
    assert all((saved / name).is_file() for name in CODE)


def test_without_them_the_files_name_those_on_the_hub(saved: Path, monkeypatch, capsys) -> None:
    def unreachable(*arguments: Any, **options: Any) -> str:
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(room, "snapshot_download", unreachable)
    carry(Path(HUB_NAME), HUB_NAME, saved)
    assert f"{HUB_NAME}--configuration_phi3_v.Phi3VConfig" in maps_of(saved)
    assert all(target.startswith(f"{HUB_NAME}--") for target in maps_of(saved))
    said = capsys.readouterr().out
    assert f"the Python files of {HUB_NAME} cannot be fetched: no network\n" in said
    assert "vLLM needs them, see docs/serve.md" in said


# -- refusals --------------------------------------------------------------------------------------------------------


def test_what_cannot_be_exported_is_refused(finished_run: Path, tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(InputError, match=r"/no/such/run: no such model folder"):
        export("/no/such/run", out=tmp_path / "out")
    (tmp_path / "there").mkdir()
    with pytest.raises(InputError, match=r"--out .*there exists already"):
        export(str(finished_run), out=tmp_path / "there")
    with pytest.raises(InputError, match="--private has no effect without --push"):
        export(str(finished_run), out=tmp_path / "out", private=True)
    with pytest.raises(InputError, match="--push mine: a name on the Hub is owner/model"):
        export(str(finished_run), out=tmp_path / "out", push="mine")
    monkeypatch.setattr(room, "get_token", lambda: None)
    with pytest.raises(InputError, match="--push me/mine needs a token of the Hub: run `hf auth login`, or set HF_TOK"):
        export(str(finished_run), out=tmp_path / "out", push="me/mine")
    assert [file.name for file in tmp_path.iterdir()] == ["there"]


# -- the Hub ---------------------------------------------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as a push of small files needs. The server keeps what it received."""

    server: Any

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        told = self.server.told
        if self.server.refuses:
            return self._say(403, {"error": "You have no access\nto this namespace"})
        assert self.headers["Authorization"] == "Bearer hf_test"
        if self.path == "/api/repos/create":
            told["repo"] = json.loads(body)
            return self._say(200, {"url": f"{self.server.url}/me/colors"})
        if self.path == "/api/models/me/colors/preupload/main":
            names = [file["path"] for file in json.loads(body)["files"]]
            files = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            return self._say(200, {"files": files})
        if self.path == "/api/models/me/colors/commit/main":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    told[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            commit = {"commitOid": "0" * 40, "commitUrl": f"{self.server.url}/me/colors/commit/{'0' * 40}"}
            return self._say(200, {"success": True, **commit, "hookOutput": ""})
        if self.path == "/api/validate-yaml":  # the Hub looks at the card before it takes it
            told["card"] = json.loads(body)
            return self._say(200, {"errors": [], "warnings": []})
        raise AssertionError(self.path)

    def do_GET(self) -> None:
        self._say(404, {"error": "Repository not found"})

    def _say(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *unused: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A stub of the Hub on this machine, and somebody who is logged in there."""
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url, server.told, server.refuses = f"http://127.0.0.1:{server.server_port}", {}, False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield server
    server.shutdown()
    server.server_close()


def test_a_push_brings_every_file_to_the_hub(hub: Any, finished_run: Path, tmp_path: Path, capsys) -> None:
    out = export(str(finished_run), out=tmp_path / "out", push="me/colors", private=True)
    files = {file.name: file.read_bytes() for file in out.iterdir()}
    assert {name: content for name, content in hub.told.items() if name in files} == files
    assert (hub.told["repo"]["name"], hub.told["repo"]["organization"]) == ("colors", "me")
    assert hub.told["repo"].get("private") is True or hub.told["repo"].get("visibility") == "private"
    assert f"pushed to       {hub.url}/me/colors" in capsys.readouterr().out


def test_a_push_that_is_refused_leaves_the_folder(hub: Any, finished_run: Path, tmp_path: Path) -> None:
    hub.refuses = True
    with pytest.raises(
        InputError, match=r"--push me/colors: .*403.* itself is whole, `hf upload me/colors .*out` tries again"
    ):
        export(str(finished_run), out=tmp_path / "out", push="me/colors")
    assert ModelCard.load(tmp_path / "out/README.md").data.license == "mit"


def test_a_hub_that_cannot_be_reached_leaves_the_folder(
    hub: Any, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(InputError, match=r"--push me/colors: .* itself is whole"):
        export(str(finished_run), out=tmp_path / "out", push="me/colors")
    assert (tmp_path / "out/config.json").is_file()
