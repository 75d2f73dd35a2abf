"""Phi-3.5-vision in plain PyTorch, with the interface of transformers.

Deliberate differences from the published code:
- the RoPE regime is chosen per example, from its own length, not from the length of a padded batch or a pack;
- image positions carry the id of `<|image|>`; the published negative ids are accepted and converted;
- the number of image positions is checked against the images;
- without a cache, a padded batch runs as a pack, so padding costs nothing and affects nothing;
- one call, `model(pack=...)`, runs whole trees of examples and returns logits at the target rows only.

Parameters, their names and their shapes are the published ones (592 tensors at the real size).
"""

from __future__ import annotations

import copy
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from phi3v.base.errors import InputError
from phi3v.data.image import CROP
from phi3v.model.attention import Attend, CachedAttention, PackedAttention
from phi3v.model.configuration import Phi3VConfig
from phi3v.model.decoder import Phi3VDecoderLayer, RMSNorm
from phi3v.model.rope import LongRope
from phi3v.model.vision import CLIPEmbeddings, ImageEmbedding, crops_of_pixel_values, crops_of_tiles, grid_of
from phi3v.model.weights import Shapes, check_shapes, checkpoint_folder, checkpoint_shapes
from phi3v.packing.layout import Layout, Tree
from phi3v.packing.loss import ROWS_PER_CHUNK, loss_of_rows

if TYPE_CHECKING:
    from phi3v.packing.pack import Pack

# transformers 5.24 renamed `past_key_values` to `cache`. Both names are accepted, and the installed one's is returned.
CACHE = "cache" if any(field.name == "cache" for field in fields(CausalLMOutputWithPast)) else "past_key_values"

# The published processor marks the positions of image k with -k.
MOST_NEGATIVE_ID = -1_000_000_000

# Arguments of `from_pretrained` that choose the files of a model on the Hub.
HUB = ("revision", "cache_dir", "token", "local_files_only", "force_download")


class Phi3VPreTrainedModel(PreTrainedModel):
    config_class = Phi3VConfig
    config: Phi3VConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["Phi3VDecoderLayer", "CLIPLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [r"vision_embed_tokens\.wte\.weight", r"position_ids$", r"inv_freq$"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, but only from safetensors: a pickle can run code."""
        return super().from_pretrained(pretrained_model_name_or_path, *args, **{**kwargs, "use_safetensors": True})

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
        # transformers would require the flash-attn package or a kernel from the Hub. We use PyTorch's kernel.
        if attn_implementation == "flash_attention_2":
            return attn_implementation
        return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        elif isinstance(module, nn.LayerNorm | RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, CLIPEmbeddings):
            nn.init.normal_(module.class_embedding, std=std)
        elif isinstance(module, ImageEmbedding):
            nn.init.zeros_(module.glb_GN)
            nn.init.zeros_(module.sub_GN)
        if isinstance(bias := getattr(module, "bias", None), nn.Parameter):
            nn.init.zeros_(bias)


class Phi3VModel(Phi3VPreTrainedModel):
    """Embeddings, image embeddings, decoder layers and the final norm."""

    def __init__(self, config: Phi3VConfig) -> None:
        super().__init__(config)
        # padding_idx: as published, the row of <|endoftext|> gets no gradient from the inputs
        padding = config.pad_token_id if (config.pad_token_id or 0) < config.vocab_size else None
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=padding)
        self.vision_embed_tokens = ImageEmbedding(config)
        self.layers = nn.ModuleList(Phi3VDecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rope = LongRope(config)
        self.gradient_checkpointing = False
        self.recomputed_layers = config.num_hidden_layers  # with gradient checkpointing, the first so many
        self.always_embed_images = False  # for engines whose ranks must all run the same modules
        self.post_init()

    # -- embeddings ------------------------------------------------------------------------------------------------

    def with_image_id(self, input_ids: Tensor) -> Tensor:
        """Replace the negative ids of the published processor by the id of `<|image|>`."""
        negative = (input_ids < 0) & (input_ids > MOST_NEGATIVE_ID)
        return input_ids.masked_fill(negative, self.config.image_token_id)

    def embed(self, input_ids: Tensor, crops: Tensor | None, grids: list[tuple[int, int]]) -> Tensor:
        """Token ids [...] and the crops of all their images, in order -> embeddings [..., H].

        Raises InputError if the images do not fill the image positions exactly.
        """
        x = self.embed_tokens(input_ids)
        positions = input_ids == self.config.image_token_id
        found = int(positions.sum())
        if not grids:
            if found:
                raise InputError(f"input_ids hold {found} image positions, but no images were given")
            return x + self._blank_image(x.device) if self.always_embed_images else x
        images = self.vision_embed_tokens(crops, grids).to(x.dtype)
        if found != (needed := images.shape[0]):
            raise InputError(f"input_ids hold {found} image positions, the {len(grids)} images given need {needed}")
        x = x.masked_scatter(positions[..., None], images)
        return F.dropout(x, self.config.embd_pdrop, self.training) if self.config.embd_pdrop else x

    def _blank_image(self, device: torch.device) -> Tensor:
        """A zero computed by the whole image embedder, so that its weights get gradients of zeros."""
        blank = torch.zeros(1, 3, CROP, CROP, device=device)
        return 0.0 * self.vision_embed_tokens(blank, [(1, 1)]).sum()

    def embed_pixel_values(self, input_ids: Tensor, pixel_values: Tensor | None, image_sizes: Tensor | None) -> Tensor:
        """`embed` for the published batch: pixel_values [n, N+1, 3, 336, 336], image_sizes [n, 2] (h, w)."""
        ids = self.with_image_id(input_ids)
        if pixel_values is None or not bool((ids == self.config.image_token_id).any()):
            return self.embed(ids, None, [])  # as published, pixel values without image positions are ignored
        if image_sizes is None:
            raise InputError("pixel_values came without image_sizes")
        grids = [grid_of((h, w)) for h, w in image_sizes.tolist()]
        return self.embed(ids, crops_of_pixel_values(pixel_values, grids), grids)

    def embed_pack(self, pack: Pack) -> Tensor:
        """Embeddings [T, H] of a pack."""
        grids = [grid_of((h, w)) for h, w in pack.image_sizes.tolist()]
        return self.embed(pack.input_ids, crops_of_tiles(pack.tiles, grids), grids)

    # -- decoder ---------------------------------------------------------------------------------------------------

    def attention_of(self, layout: Layout) -> PackedAttention:
        dropout = self.config.attention_dropout if self.training else 0.0
        return PackedAttention(layout, self.config._attn_implementation or "sdpa", self.config.sliding_window, dropout)

    def decode(self, x: Tensor, rope: tuple[Tensor, Tensor], attend: Attend, rows: Tensor | None = None) -> Tensor:
        """All layers and the final norm: [..., H] -> [..., H], or [R, H] at the token indices `rows` [R]."""
        last = len(self.layers) - 1
        recomputes = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        for number, layer in enumerate(self.layers):
            wanted = rows if number == last else None
            if recomputes and number < self.recomputed_layers:
                x = self._gradient_checkpointing_func(layer.__call__, x, rope, attend, wanted)
            else:
                x = layer(x, rope, attend, wanted)
        return self.norm(x)

    def decode_layout(
        self, x: Tensor, layout: Layout, rows: Tensor | None = None, position: Tensor | None = None
    ) -> Tensor:
        """`decode` for embeddings [T, H] of a pack; `position` [T] replaces the layout's own positions in RoPE."""
        rope = self.rope(layout.position if position is None else position, layout.long)
        return self.decode(x, rope, self.attention_of(layout), rows)

    def decode_batch(self, x: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> Tensor:
        """[B, L, H] with padding -> [B, L, H]. The real tokens run as a pack; rows of padding are zeros."""
        batch, length = x.shape[:2]
        if attention_mask is None:
            attention_mask = torch.ones(batch, length, dtype=torch.bool, device=x.device)
        real = attention_mask.bool()
        if position_ids is None:
            position_ids = torch.arange(length, device=x.device)
        border = self.config.original_max_position_embeddings
        lengths = [int(n) for n in real.sum(1)]
        layout = Layout.of([Tree(0, (n,), n > border) for n in lengths if n]).to(x.device)
        y = self.decode_layout(x[real], layout, position=position_ids.expand(batch, length)[real])
        return x.new_zeros(x.shape, dtype=y.dtype).masked_scatter(real[..., None], y)

    def decode_cached(
        self, x: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cache: Cache
    ) -> Tensor:
        """New tokens [B, L, H] after those in `cache` -> [B, L, H]; `attention_mask` [B, past + L]."""
        past, (batch, length) = cache.get_seq_length(), x.shape[:2]
        if attention_mask is None:
            attention_mask = torch.ones(batch, past + length, dtype=torch.long, device=x.device)
        if position_ids is None:
            position_ids = torch.arange(past, past + length, device=x.device)
        long = attention_mask.sum(1, keepdim=True) > self.config.original_max_position_embeddings
        rope = self.rope(position_ids.expand(batch, length), long)
        backend = self.config._attn_implementation or "sdpa"
        attend = CachedAttention(cache, attention_mask, length, backend, self.config.sliding_window)
        return self.decode(x, rope, attend)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """input_ids [B, L] (or inputs_embeds [B, L, H]) -> last_hidden_state [B, L, H] after the final norm."""
        if (input_ids is None) == (inputs_embeds is None):
            raise InputError("give either input_ids or inputs_embeds")
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds = self.embed_pixel_values(input_ids, pixel_values, image_sizes)
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None:
            cache = DynamicCache()
        if cache is not None:
            hidden = self.decode_cached(inputs_embeds, attention_mask, position_ids, cache)
        else:
            hidden = self.decode_batch(inputs_embeds, attention_mask, position_ids)
        return BaseModelOutputWithPast(last_hidden_state=hidden, **{CACHE: cache})


class Phi3VForCausalLM(Phi3VPreTrainedModel, GenerationMixin):
    """The whole model. `from_pretrained` reads, and `save_pretrained` writes, the published layout."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012  (only if the config ties)

    def __init__(self, config: Phi3VConfig) -> None:
        super().__init__(config)
        self.model = Phi3VModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.loss_rows_per_chunk = ROWS_PER_CHUNK
        self.post_init()
        self._stop_where_answers_end()

    def _stop_where_answers_end(self) -> None:
        # The published generation_config stops at </s>, which the model never generates.
        generation = self.generation_config
        if generation is not None and generation.eos_token_id in (None, self.config.eos_token_id):
            generation.eos_token_id = list(self.config.stop_token_ids)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        pack: Pack | None = None,
        learn: bool = False,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits in float32, [B, L, V], or [B, k, V] with `logits_to_keep`; with `pack`, [R, V] at `pack.target_rows`.

        `labels` [B, L] (-100 ignored, shifted inside) adds the mean cross entropy as `loss`. A pack carries its own
        targets and weights: with `learn` its `loss` is returned, and no logits.
        """
        if pack is not None:
            hidden = self.model.decode_layout(self.model.embed_pack(pack), pack.layout, pack.target_rows)
            if not learn:
                return CausalLMOutputWithPast(logits=self.lm_head(hidden).float())
            of_rows = loss_of_rows(self.lm_head, hidden, pack.targets, pack.loss_weights, self.loss_rows_per_chunk)
            return CausalLMOutputWithPast(loss=of_rows)
        cache = past_key_values if cache is None else cache
        out = self.model(
            input_ids, attention_mask, position_ids, cache, inputs_embeds, pixel_values, image_sizes, use_cache
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, keep if labels is None else slice(None)]).float()
        loss = None
        if labels is not None:
            if bool((labels[:, 1:] == -100).all()):
                raise InputError("labels: every label is -100 (ignored), there is nothing to learn from")
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: out.get(CACHE)})

    # -- generation ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, generation_config: Any = None, **kwargs: Any) -> Any:
        """`GenerationMixin.generate` for prompts with images: `generate(**processor(...), max_new_tokens=64)`.

        Images are encoded once, also for beams and for rows that are recomputed because they outgrew the short RoPE
        regime.
        """
        ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        if ids is None:
            raise InputError("generate needs input_ids")
        ids = self.model.with_image_id(ids)
        kwargs.pop("num_img_tokens", None)
        embeds = self.model.embed_pixel_values(ids, kwargs.pop("pixel_values", None), kwargs.pop("image_sizes", None))
        given = {"past_key_values", "cache", "cache_implementation"} & kwargs.keys()
        if kwargs.get("use_cache", True) and not given:
            kwargs[CACHE] = DynamicCache()  # one made from the config would drop keys outside the sliding window
        return super().generate(ids, generation_config, prompt_embeds=embeds, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        use_cache: bool = True,
        cache: Cache | None = None,
        logits_to_keep: int = 1,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Inputs of the next forward: the new tokens, or all when a row has just outgrown the short RoPE regime."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        cache = past_key_values if cache is None else cache
        past = 0 if cache is None else cache.get_seq_length()
        if past:
            assert cache is not None
            border = self.config.original_max_position_embeddings
            now, before = attention_mask.sum(1), attention_mask[:, :past].sum(1)
            if bool(((before <= border) & (now > border)).any()):
                cache.crop(-past)
                past = 0
        known = 0 if prompt_embeds is None else prompt_embeds.shape[1]
        embeds = self.model.embed_tokens(input_ids[:, max(past, known) :])
        if past < known:
            assert prompt_embeds is not None
            embeds = torch.cat([prompt_embeds[:, past:].to(embeds.dtype), embeds], dim=1)
        position_ids = (attention_mask.long().cumsum(1) - 1).masked_fill(attention_mask == 0, 1)
        return {
            "inputs_embeds": embeds,
            "attention_mask": attention_mask,
            "position_ids": position_ids[:, past:],
            CACHE: cache,
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep,
        }

    # -- the published layout --------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, but raises InputError, naming the tensors, if some are missing or have another shape.

        The headers of the files are checked before the model gets memory: a small file may describe a huge model.
        """
        name = pretrained_model_name_or_path
        folder = checkpoint_folder(name, **{key: kwargs[key] for key in HUB if key in kwargs})
        expected = cls._expected_shapes(kwargs.get("config"), folder)
        check_shapes(f"checkpoint {name}", checkpoint_shapes(folder), expected)
        made = super().from_pretrained(name, *args, **kwargs)
        (made[0] if isinstance(made, tuple) else made)._stop_where_answers_end()  # (model, info) on request
        return made

    @classmethod
    def _expected_shapes(cls, config: Phi3VConfig | None, folder: Path) -> Shapes:
        with torch.device("meta"):
            model = cls(Phi3VConfig.from_pretrained(folder) if config is None else copy.deepcopy(config))
        tied = cls._tied_weights_keys if model.config.tie_word_embeddings else {}
        return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}

    def save_pretrained(self, save_directory: Any, max_shard_size: int | str = "5GB", **kwargs: Any) -> None:
        """As in transformers, with shards of at most 5 GB, as published."""
        super().save_pretrained(save_directory, max_shard_size=max_shard_size, **kwargs)
