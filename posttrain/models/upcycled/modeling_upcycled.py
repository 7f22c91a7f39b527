"""The upcycled decoder: blocks of the source family, with a mixer of its own in every layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask, find_packed_sequence_indices
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .cache_upcycled import new_cache, only_states
from .configuration_upcycled import UpcycledConfig
from .norm_upcycled import UpcycledRMSNorm
from .registry_upcycled import MIXERS
from .rotary_upcycled import UpcycledRotaryEmbedding


class UpcycledMLP(nn.Module):
    """Gated MLP of the source: `down(act(gate(x)) · up(x))`."""

    def __init__(self, config: UpcycledConfig) -> None:
        super().__init__()
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(width, inner, bias=bias)
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class UpcycledDecoderLayer(GradientCheckpointingLayer):
    """One block: norm, mixer, norm, MLP. The mixer is `self_attn` whatever its kind, as in the source's checkpoints."""

    def __init__(self, config: UpcycledConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = MIXERS[config.mixers[layer_idx]].load()(config, layer_idx)
        self.mlp = UpcycledMLP(config)
        self.input_layernorm = UpcycledRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = UpcycledRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class UpcycledPreTrainedModel(PreTrainedModel):
    """What both model classes share."""

    config_class = UpcycledConfig
    config: UpcycledConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["UpcycledDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = False
    _supports_flex_attn = False
    _keep_in_fp32_modules_strict = ["A_log", "dt_bias", "D"]  # of Mamba-2 layers, in bf16 too
    _can_record_outputs = {"hidden_states": UpcycledDecoderLayer}

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, UpcycledRotaryEmbedding):
            module.reset_buffers()
        elif hasattr(module, "reset_decays"):
            module.reset_decays()
        else:
            super()._init_weights(module)
            if getattr(module, "q_map", None) is not None:  # a parameter of latent attention's own
                init.normal_(module.q_map, std=self.config.initializer_range)


class UpcycledModel(UpcycledPreTrainedModel):
    """Embeddings, blocks and final norm."""

    _auto_class = "AutoModel"

    def __init__(self, config: UpcycledConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(UpcycledDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = UpcycledRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = UpcycledRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states [B, T, D]. `attention_mask` is 2-D over past and present tokens, or a ready 4-D causal mask.

        Rows of several packed documents need `position_ids` that start anew at each, no `attention_mask` and no past.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if kwargs.get("output_attentions"):
            raise ValueError("this model does not return attention weights")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if position_ids is None:
            # Where no layer counts the tokens of the past, none needs to know either.
            counted = past_key_values is not None and not only_states(self.config)
            past = past_key_values.get_seq_length() if counted else 0
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past).unsqueeze(0)
        # A new cache is made after the masks: with one, transformers no longer looks for packed documents.
        masks = self._masks(inputs_embeds, attention_mask, past_key_values, position_ids)
        if use_cache and past_key_values is None:
            past_key_values = new_cache(self.config)
        embeddings = self.rotary_emb(inputs_embeds, position_ids=position_ids)
        hidden_states = inputs_embeds
        for index, layer in enumerate(self.layers):
            spec, group = MIXERS[self.config.mixers[index]], self.rotary_emb.groups[index]
            own = {"documents": masks["documents"]} if "documents" in spec.masks else {}
            hidden_states = layer(
                hidden_states,
                position_embeddings=None if group is None else embeddings[group],
                attention_mask=masks["causal"] if "causal" in spec.masks else None,
                padding_mask=masks["padding"] if "padding" in spec.masks else None,
                position_ids=position_ids,
                past_key_values=past_key_values,
                **own,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)

    def _masks(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | dict[str, Any] | None,
        past_key_values: Cache | None,
        position_ids: torch.Tensor,
    ) -> dict[str, Any]:
        """Each kind of mask that some layer wants."""
        if isinstance(attention_mask, dict):  # `generate` makes them itself for a static cache, by cache layer
            causal, padding = attention_mask.get("full_attention"), attention_mask.get("linear_attention")
            return {"causal": causal, "padding": padding, "documents": None}
        wanted = {kind for mixer in self.config.mixers for kind in MIXERS[mixer].masks}
        masks: dict[str, Any] = {"causal": None, "padding": None, "documents": None}
        if "causal" in wanted:
            masks["causal"] = create_causal_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
            )
        if "padding" in wanted:
            masks["padding"] = _padding_mask(attention_mask, inputs_embeds.shape[1])
        # The same condition as in the causal mask's code: layers of one model must see the same documents.
        if "documents" in wanted and attention_mask is None and past_key_values is None:
            masks["documents"] = find_packed_sequence_indices(position_ids.expand(inputs_embeds.shape[0], -1))
        return masks


def _padding_mask(attention_mask: torch.Tensor | None, length: int) -> torch.Tensor | None:
    """The last `length` columns of a 2-D mask, or None: nothing is padded, or it is one decoded token."""
    if attention_mask is None or length == 1:
        return None
    if attention_mask.ndim != 2:
        raise ValueError("layers that carry a state need a 2-D attention mask [batch, tokens], not a ready 4-D one")
    return None if torch.all(attention_mask == 1) else attention_mask[:, -length:]


class UpcycledForCausalLM(UpcycledPreTrainedModel, GenerationMixin):
    """The decoder with its language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _auto_class = "AutoModelForCausalLM"

    def __init__(self, config: UpcycledConfig) -> None:
        super().__init__(config)
        self.model = UpcycledModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """As transformers does it, but for a model of states alone, whose cache must count."""
        given = model_kwargs.get("past_key_values") is not None
        if given or generation_config.use_cache is False or not only_states(self.config):
            super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        else:
            model_kwargs["past_key_values"] = new_cache(self.config)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, V] of the last `logits_to_keep` positions (0: all) and, with `labels`, the shifted loss."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )
