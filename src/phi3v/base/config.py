"""Everything a run can be told, and what cannot go together.

The command line is derived from these dataclasses: a field is a flag, its docstring the help. A run folder keeps the
resolved values in `config.json`, and `load_run` reads them back.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from phi3v.base.errors import InputError
from phi3v.base.jsonfile import read_object

Part = Literal["vision", "projector", "embeddings"]
Precision = Literal["auto", "bf16", "fp16", "fp32"]
Attention = Literal["auto", "sdpa", "eager", "flex_attention", "flash_attention_2"]
Optimizer = Literal["adamw", "adamw-8bit", "adamw-bf16"]


@dataclass(frozen=True, kw_only=True)
class Base:
    """The checkpoint training starts from."""

    model: str = "microsoft/Phi-3.5-vision-instruct"
    """A folder in the published layout, or a name on the Hugging Face Hub."""

    num_crops: int | None = None
    """Tiles an image may be cut into: 16 suits single images, 4 several frames. Default: the checkpoint's own."""

    attention: Attention = "auto"
    """How attention is computed. All choices compute the same. auto: flash_attention_2 (PyTorch's kernel, or that of
    flash-attn) on CUDA in bf16 or fp16, else sdpa."""

    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the layers with torch.compile, which takes its time at the start: the same arithmetic in fewer kernels.
    auto: on for CUDA, unless the weights are split over processes or `--dora` is on."""

    fp8: bool = False
    """Multiply in fp8 in the decoder while it learns: approximate, faster on Hopper, Ada and later, needs torchao."""

    dtype: Precision = "auto"
    """Precision of the arithmetic. Trainable weights are kept in float32, frozen ones in this precision. auto: bf16
    where the hardware has it, else fp16 with loss scaling on CUDA, else fp32; with `--optimizer adamw-bf16` bf16."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """What is learnt from, and how it is laid out in steps and packs."""

    train: Path | None = None
    """Training conversations, one JSON object a line."""

    eval: Path | None = None
    """Conversations to be evaluated on, in the same format."""

    image_root: Path | None = None
    """Folder the image paths are relative to. Default: the folder `images` beside each data file."""

    batch_size: int = 16
    """Examples (`--questions all`) or pages (otherwise) of an optimizer step, exactly, however many packs they fill."""

    questions: Literal["all", "expected", "random"] = "all"
    """Pages with several questions. all: every question is an example. expected: the page counts once, its questions
    averaged. random: the page counts once, with one question drawn anew every epoch."""

    weighting: Literal["example", "token"] = "example"
    """example: mean over an example's supervised tokens, then over examples. token: mean over all supervised tokens."""

    share_prefix: bool = True
    """Compute a page once for all its questions. The loss is the same without, only slower."""

    pack: bool = True
    """Several pages in one forward pass. The loss is the same without, only slower."""

    max_tokens_per_pack: int | None = None
    """Tokens of one forward pass. Larger keeps a GPU busier until memory runs out; the result is the same. Default:
    8192 on a GPU, 4096 on a CPU, which one page keeps busy."""

    max_crops_per_pack: int = 64
    """336x336 crops of one forward pass."""

    num_workers: int | None = None
    """Processes that read images. Default: one for every core but one, at most 4, and none on two cores or fewer."""

    on_bad_example: Literal["stop", "skip"] = "stop"
    """An image that has become unreadable while the run goes on. stop: end, naming it. skip: go on without its examples
    (the mean is over the others), list them in log.jsonl and count them in the report."""


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """Which weights learn."""

    freeze: tuple[Part, ...] = ()
    """Parts that do not learn. vision: CLIP. projector: the image projection and separators. embeddings: tokens."""

    freeze_vision_model: bool = False
    """Freeze the image embedder: short for `--freeze vision projector`."""

    lora: bool = False
    """Train low-rank adapters instead of the weights: on the decoder, its head, and the parts that are not frozen."""

    qlora: bool = False
    """LoRA over a base whose decoder weights are held in four bits (nf4)."""

    quantize: tuple[Literal["vision", "projector"], ...] = ()
    """Further parts that `--qlora` holds in four bits."""

    double_quant: bool = False
    """With `--qlora`: quantise the scales as well, 0.4 bits less a weight."""

    lora_rank: int = 64
    """Rank of the adapters."""

    lora_alpha: float | None = None
    """Scale of the adapters. Default: twice the rank."""

    lora_dropout: float = 0.0
    """Dropout before the adapters."""

    lora_init: Literal["gaussian", "default", "pissa", "olora"] = "gaussian"
    """How the adapters start. default: PEFT's Kaiming."""

    dora: bool = False
    """Decompose the weights into direction and magnitude (DoRA)."""

    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead of alpha / rank (rsLoRA)."""

    activation_memory: Literal["auto", "none", "full"] = "auto"
    """full: keep only the layers' inputs and recompute the rest in the backward pass. none: keep everything. auto: on a
    GPU recompute as few layers as its free memory needs, on a CPU none."""

    @property
    def frozen(self) -> tuple[Part, ...]:
        named = {*self.freeze, *(("vision", "projector") if self.freeze_vision_model else ())}
        return tuple(part for part in typing.get_args(Part) if part in named)

    @property
    def adapters(self) -> bool:
        """Whether adapters learn, not the weights themselves."""
        return self.lora or self.qlora

    @property
    def alpha(self) -> float:
        return 2 * self.lora_rank if self.lora_alpha is None else self.lora_alpha


@dataclass(frozen=True, kw_only=True)
class Optim:
    """AdamW and its schedule. The defaults are the original recipe's."""

    optimizer: Optimizer = "adamw"
    """adamw: all float32, 16 bytes a weight that learns. adamw-8bit: moments in eight bits, 10 bytes (pip install
    'phi3v[qlora]'). adamw-bf16: weights, gradients and moments in bf16, stochastically rounded, 8 bytes."""

    epochs: float = 1.0
    """Passes over the data; a fraction stops within one."""

    max_steps: int | None = None
    """Stop after this many optimizer steps; the schedule ends there too."""

    learning_rate: float = 4e-5
    """Of everything without a learning rate of its own."""

    vision_learning_rate: float | None = None
    """Of CLIP."""

    projector_learning_rate: float | None = None
    """Of the image projection and separators."""

    weight_decay: float = 0.01
    """Of all weights but biases and norms."""

    beta1: float = 0.9
    """Decay of the first moment."""

    beta2: float = 0.95
    """Decay of the second moment."""

    eps: float = 1e-7
    """Added to the denominator."""

    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm."""

    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Of the learning rate after the warm-up."""

    warmup_steps: int = 50
    """Steps in which the learning rate rises from zero."""


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """How several processes share the work (`torchrun --nproc_per_node=N -m phi3v train ...`)."""

    parallel: Literal["auto", "ddp", "fsdp2", "zero1", "zero2", "zero3"] = "auto"
    """ddp: every GPU holds everything. zero1, zero2: the optimizer's state (and gradients) are split. fsdp2, zero3: the
    weights too. auto: zero2 for the whole model (fsdp2 without DeepSpeed), ddp for adapters, on CPUs, and for any
    `--optimizer` but adamw, which is the only one that can be split."""

    rank_timeout_minutes: float = 30.0
    """A process that has not come to where the others wait after so long is reported, and the job ends."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Answering the questions of `--eval`."""

    eval_before: bool = True
    """Evaluate before training."""

    eval_every_steps: int | None = None
    """Evaluate every so many steps."""

    eval_limit: int | None = None
    """Questions of the evaluations before and during training, evenly spread. The final one always takes all."""

    max_new_tokens: int = 64
    """Longest answer, in tokens."""

    score: Literal["generate", "labels", "both"] = "generate"
    """generate: the answer is what the model writes. labels: of a closed set of labels, the most likely one, found in
    one pass. both: written answers, and the scores of the labels beside them (accuracy, AUROC)."""

    labels: tuple[str, ...] = ()
    """The closed set. Default: the answers of the training data, if they are few."""


@dataclass(frozen=True, kw_only=True)
class Keeping:
    """The run folder and what goes on around the loop."""

    out: Path = Path("runs/latest")
    """The run folder. A finished run in it is never overwritten."""

    save_every_steps: int | None = None
    """Checkpoint every so many steps. One is always written at the end."""

    keep_checkpoints: int = 2
    """Newest checkpoints kept, besides the one that scored best."""

    resume: Literal["no", "auto"] = "no"
    """auto: go on exactly where the newest whole checkpoint in the run folder stands, or start where there is none."""

    max_minutes: float | None = None
    """Checkpoint and end after so long, to be resumed."""

    seed: int = 42
    """Of the data order, adapters and dropout."""

    track: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = ()
    """Trackers that receive the log as well."""

    progress: bool = True
    """Show a progress bar."""

    dry_run: bool = False
    """Print what would be done, and stop."""


# What numbers must be, in words and as a test, and which: the names of flags. NaN is never right.
LIMITS: dict[str, tuple[Callable[[float], bool], tuple[str, ...]]] = {
    "at least 1": (
        lambda value: value >= 1,
        (
            *("batch_size", "max_tokens_per_pack", "max_crops_per_pack", "lora_rank", "max_new_tokens", "num_crops"),
            *("max_steps", "eval_every_steps", "eval_limit", "save_every_steps", "keep_checkpoints", "limit"),
            *("num_gpus", "nodes", "picture_size", "crop_size"),
        ),
    ),
    "positive": (
        lambda value: value > 0,
        (
            *("epochs", "learning_rate", "eps", "max_grad_norm", "lora_alpha"),
            *("max_minutes", "rank_timeout_minutes"),
        ),
    ),
    "at least 0": (
        lambda value: value >= 0,
        (
            *("num_workers", "vision_learning_rate", "projector_learning_rate", "weight_decay", "warmup_steps", "seed"),
            *("temperature", "picture_mb"),
        ),
    ),
    "at least 0 and below 1": (lambda value: 0 <= value < 1, ("lora_dropout", "beta1", "beta2")),
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """A training run."""

    base: Base = field(default_factory=Base)
    data: Data = field(default_factory=Data)
    tuning: Tuning = field(default_factory=Tuning)
    optim: Optim = field(default_factory=Optim)
    scaling: Scaling = field(default_factory=Scaling)
    evaluation: Evaluation = field(default_factory=Evaluation)
    keeping: Keeping = field(default_factory=Keeping)

    def check(self) -> None:
        """Raises InputError, naming the flag to change, for what cannot be run."""
        if self.data.train is None:
            raise InputError("--train is missing: give the training conversations, a .jsonl file")
        if self.evaluation.labels and self.evaluation.score == "generate":
            raise InputError("--labels has no effect with --score generate: choose labels or both")
        if self.evaluation.eval_every_steps is not None and self.data.eval is None:
            raise InputError("--eval-every-steps needs --eval")
        groups = [getattr(self, group.name) for group in dataclasses.fields(self)]
        values = {name: value for group in groups for name, value in vars(group).items()}
        check_numbers(values)
        for part in self.tuning.frozen:
            if values.get(f"{part}_learning_rate") is not None:
                raise InputError(f"--{part}-learning-rate has no effect: the {part} is frozen")
        for tracker in self.keeping.track:
            if importlib.util.find_spec(tracker) is None:  # before anything is loaded
                raise InputError(f"--track {tracker}: it is not installed (pip install {tracker})")
        for name in ("lora_rank", "lora_alpha", "lora_dropout", "lora_init", "dora", "rslora"):
            if not self.tuning.adapters and values[name] != getattr(Tuning, name):
                raise InputError(f"--{name.replace('_', '-')} has no effect without --lora or --qlora")
        for name in ("quantize", "double_quant"):
            if not self.tuning.qlora and values[name]:
                raise InputError(f"--{name.replace('_', '-')} has no effect without --qlora")
        if self.tuning.qlora and self.tuning.lora_init in ("pissa", "olora"):
            raise InputError(f"--lora-init {self.tuning.lora_init} decomposes the weights, which --qlora has quantised")
        if self.base.fp8 and self.tuning.adapters:
            raise InputError("--fp8 is for weights that learn: leave it out with --lora and --qlora")
        optimizer, parallel = self.optim.optimizer, self.scaling.parallel
        if optimizer != "adamw" and parallel not in ("auto", "ddp"):
            raise InputError(f"--optimizer {optimizer} cannot be split by --parallel {parallel}: choose ddp")
        if optimizer == "adamw-8bit" and importlib.util.find_spec("bitsandbytes") is None:
            raise InputError("--optimizer adamw-8bit needs bitsandbytes: pip install 'phi3v[qlora]'")
        if optimizer == "adamw-bf16" and self.base.dtype == "fp16":
            raise InputError(
                "--optimizer adamw-bf16 cannot learn in --dtype fp16: loss scaling is for gradients in fp16, its own "
                "are bf16 (choose --dtype bf16, or --optimizer adamw-8bit)"
            )
        if optimizer == "adamw-bf16" and self.base.dtype == "fp32":
            raise InputError("--optimizer adamw-bf16 cannot learn in --dtype fp32: its weights are bf16")
        if "embeddings" in self.tuning.frozen and self.tuning.adapters:
            raise InputError("--freeze embeddings has no effect with --lora: adapters never touch the embeddings")

    @property
    def precision(self) -> Precision:
        """Of the arithmetic, as `pick_dtype` understands it: bf16 weights are multiplied in bf16 on any hardware."""
        return "bf16" if self.optim.optimizer == "adamw-bf16" else self.base.dtype

    def to_dict(self) -> dict[str, Any]:
        """Nested, with paths as strings: what `config.json` holds."""
        return json.loads(json.dumps(dataclasses.asdict(self), default=str))


def check_numbers(flags: Mapping[str, Any]) -> None:
    """Raises InputError for a number that cannot be, by the name of its flag; None stands for a default and passes."""
    for limit, (holds, names) in LIMITS.items():
        for name in names:
            if (value := flags.get(name)) is not None and not holds(value):
                raise InputError(f"--{name.replace('_', '-')} is {value}, it must be {limit}")


def load_run(folder: Path) -> Run:
    """The run kept in `folder/config.json`. Raises InputError when there is none, or it is not one of ours."""
    file = folder / "config.json"
    if not file.exists():
        raise InputError(f"{folder} is not a run folder: it has no config.json")
    try:
        return _build(Run, read_object(file))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{file}: not the configuration of a run ({error})") from None


def _build(cls: type, values: dict[str, Any]) -> Any:
    hints = typing.get_type_hints(cls)
    return cls(**{name: _value(hints[name], value) for name, value in values.items()})


def _value(hint: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value)
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is not None and Path in options:
        return Path(value)
    return tuple(value) if isinstance(value, list) else value
