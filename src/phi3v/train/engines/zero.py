"""DeepSpeed ZeRO: the optimizer's state (1), the gradients too (2), or the weights as well (3) are split over ranks."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from typing import Any

import torch
from torch import Tensor, nn

from phi3v.base.errors import InputError
from phi3v.base.ranks import Ranks
from phi3v.model.decoder import Phi3VDecoderLayer
from phi3v.model.parts import quantized_weights
from phi3v.model.vision import CLIPEmbeddings
from phi3v.packing.pack import Pack
from phi3v.train.engines.engine import (
    SCALE_WINDOW,
    Engine,
    EngineSettings,
    Slice,
    StepResult,
    empty,
    empty_twin,
    idle_step,
    rounded,
    unwrap,
)


class Zero(Engine):
    """Below float32 DeepSpeed keeps the model in that precision, and float32 masters of what learns in its shards."""

    def __init__(self, model: Any, ranks: Ranks, settings: EngineSettings, *, stage: int) -> None:
        super().__init__(model, ranks, settings)
        deepspeed = _deepspeed()
        self.stage, dtype = stage, settings.dtype
        self.twin: Any = empty_twin(model, shared=quantized_weights(model)) if stage == 3 else None
        learns = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        exact = {name: p for name, p in learns.items() if torch.promote_types(p.dtype, dtype) != dtype}
        self.optimizer = settings.make_optimizer(model)
        config = _config(stage, settings)
        if stage == 3:
            self._split(deepspeed, config)
        _place(model, ranks.device, dtype)
        with redirect_stdout(io.StringIO()):  # tables of memory
            self.engine, *_ = deepspeed.initialize(model=model, optimizer=self.optimizer, config=config)
        self.zero = self.engine.optimizer
        self.parameters: dict[str, Any] = dict(model.named_parameters())
        if dtype == torch.float16:
            self.zero.loss_scaler.min_scale = 0.0  # the loop decides when it has become too small
        for part in self.slices():
            if (start := exact.get(part.name)) is not None:  # the masters are made of rounded weights
                part.weight.copy_(start.reshape(-1)[part.start : part.start + part.weight.numel()])

    def _split(self, deepspeed: Any, config: dict[str, Any]) -> None:
        """Splits the weights one part after another: the model is never whole on a device."""
        network = unwrap(self.model).model
        for part in [*network.layers, self.model]:
            _place(part, self.ranks.device, self.settings.dtype)
            deepspeed.zero.Init(module=part, config_dict_or_path=config)
        # Every call gathers weights: all ranks must make equally many, however many crops and rows they have.
        network.vision_embed_tokens.frozen_crops_per_call = unwrap(self.model).loss_rows_per_chunk = sys.maxsize
        _register_borrowed_weights(deepspeed, self.model)

    def learn(self, pack: Pack, *, last: bool) -> Tensor:
        self.engine.set_gradient_accumulation_boundary(last)
        loss = self.engine(pack=pack, learn=True).loss
        self.engine.backward(loss * self.ranks.num)
        if not last:
            self.engine.step()  # counts the pack, nothing else
        return loss.detach()

    def step(self) -> StepResult:
        self.engine.step()
        skipped = bool(self.zero.overflow)
        return StepResult(float(self.engine.get_global_grad_norm()), skipped, skipped and self.has_scale_left())

    def gradients(self) -> Iterator[tuple[str, Tensor | None]]:
        from deepspeed.utils import safe_get_full_grad

        for name, parameter in self.parameters.items():
            yield name, safe_get_full_grad(parameter) if parameter.requires_grad else None

    def slices(self) -> Iterator[Slice]:
        for name, parameter in self.parameters.items():
            if parameter.requires_grad and (found := self._slice(name, parameter)):
                yield found

    def _slice(self, name: str, parameter: Any) -> Slice | None:
        """None where other ranks hold all of it."""
        if self.stage < 3:
            if (mapping := parameter._hp_mapping) is None:
                return None
            # Stage 1 in bf16 has an optimizer of its own, with another name for the masters of this rank.
            flats = getattr(self.zero, "single_partition_of_fp32_groups", None)
            flats = self.zero.fp32_groups_flat_partition if flats is None else flats
            flat, shape = flats[mapping.param_group_index], tuple(parameter.shape)
            start, weight = mapping.lp_fragment_address.start, mapping.hp_fragment
            at = mapping.hp_fragment_address.start
        else:
            group, at, part = self.zero.grad_position[self.zero.get_param_id(parameter)]
            flat, shape = self.zero.fp32_partitioned_groups_flat[group], tuple(parameter.ds_shape)
            start = min(self.ranks.rank * part, parameter.ds_numel)
            weight = flat.narrow(0, at, min(part, parameter.ds_numel - start))  # without the padding
        state = self.optimizer.state.get(flat, {})
        return Slice(
            name=name,
            shape=shape,
            start=start,
            weight=weight.detach(),
            state={key: value.narrow(0, at, weight.numel()) for key, value in state.items() if key != "step"},
            count=state.get("step"),
        )

    @contextmanager
    def writable(self) -> Iterator[list[Slice]]:
        if self.stage < 3:
            idle_step(self.optimizer)
            yield list(self.slices())
            self.zero._lazy_init_hp_params_optimizer_state()
            self.zero.update_lp_params()  # the model's own weights follow the masters
            return
        for number, flat in enumerate(self.zero.fp32_partitioned_groups_flat):
            group = self.optimizer.param_groups[self.zero.sub_group_to_group_id[number]]
            group["params"] = [flat]
            idle_step(self.optimizer)
            group["params"] = []
        yield list(self.slices())
        for number in range(len(self.zero.fp32_partitioned_groups_flat)):
            self.zero._reassign_or_swap_out_partitioned_parameters(number)

    @contextmanager
    def whole(self) -> Iterator[Any]:
        if self.stage < 3:
            yield self.model
            return
        for name, twin in self.twin.named_parameters():
            if twin.is_floating_point():
                with self._gathered([self.parameters[name]]):
                    twin.data = self.parameters[name].detach().clone()
        with self._gathered(quantized_weights(self.model)):  # the twin's own, too
            try:
                yield self.twin
            finally:
                empty(self.twin)

    def final(self, dtype: torch.dtype | None) -> Any:
        from deepspeed.utils import safe_get_full_fp32_param

        model = self.twin if self.stage == 3 else self.model
        for name, target in model.named_parameters():
            parameter = self.parameters[name]
            if parameter.requires_grad:
                target.data = rounded(safe_get_full_fp32_param(parameter), dtype)
            elif target.is_floating_point():
                with self._gathered([parameter]):
                    target.data = rounded(parameter.detach(), dtype).clone()
        self._gathered(quantized_weights(self.model)).__enter__()  # for good
        return model

    def _gathered(self, parameters: list[Any]) -> AbstractContextManager[Any]:
        """ZeRO-3's split parameters, whole while the context lasts; below stage 3 they always are."""
        from deepspeed.runtime.zero.partition_parameters import GatheredParameters

        return GatheredParameters(parameters) if self.stage == 3 else nullcontext()

    def scaler_state(self) -> dict[str, Any]:
        if self.settings.dtype != torch.float16:
            return {}
        scaler = self.zero.loss_scaler
        good_steps = (scaler.cur_iter - 1 - scaler.last_overflow_iter) % SCALE_WINDOW
        return {"scale": float(scaler.cur_scale), "good_steps": good_steps}

    def load_scaler_state(self, state: dict[str, Any]) -> None:
        if self.settings.dtype == torch.float16 and state:
            scaler = self.zero.loss_scaler
            scaler.cur_scale, scaler.cur_iter, scaler.last_overflow_iter = state["scale"], state["good_steps"], -1


def _place(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Everything in one precision, as DeepSpeed wants it; four-bit weights stay where and as they are."""
    for parameter in module.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(device, dtype)


def _deepspeed() -> Any:
    try:
        import deepspeed
    except ImportError as error:
        raise InputError("--parallel zero1|zero2|zero3 needs DeepSpeed: pip install 'phi3v[deepspeed]'") from error
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # On CPUs it would first compile an operator for sums over shared memory, for a minute; gloo does without.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_init_required=False, verbose=False)
    return deepspeed


def _config(stage: int, settings: EngineSettings) -> dict[str, Any]:
    """The guide's settings as far as they are not DeepSpeed's defaults; gradients are added up in float32."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": settings.max_grad_norm,
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": torch.cuda.is_available(),
            "stage3_param_persistence_threshold": 0,
        },
        "bf16": {"enabled": settings.dtype == torch.bfloat16},
        "fp16": {
            "enabled": settings.dtype == torch.float16,
            "loss_scale": 0,
            "initial_scale_power": 16,
            "loss_scale_window": SCALE_WINDOW,
            "hysteresis": 1,
        },
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }


def _register_borrowed_weights(deepspeed: Any, model: nn.Module) -> None:
    """ZeRO-3 gathers the weights that a module owns when it runs; those of a submodule it uses must be registered."""
    module: Any
    for module in model.modules():
        if isinstance(module, CLIPEmbeddings):
            deepspeed.zero.register_external_parameter(module, module.patch_embedding.weight)
            deepspeed.zero.register_external_parameter(module, module.position_embedding.weight)
        elif isinstance(module, Phi3VDecoderLayer) and type(module.self_attn.qkv_proj) is nn.Linear:
            deepspeed.zero.register_external_parameter(module, module.self_attn.qkv_proj.weight)
