"""Configuration of a decoder whose layers were converted one by one from a pretrained source.

No `from __future__ import annotations` here: the strict dataclass of transformers checks the annotations' values.
"""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from .registry_upcycled import MIXERS

SOURCES = ("llama", "mistral", "qwen2", "qwen3")
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")
_COPIED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "attention_dropout",
)
_BIASES = {
    "llama": lambda source: (source.attention_bias, source.attention_bias, source.mlp_bias),
    "mistral": lambda source: (False, False, False),
    "qwen2": lambda source: (True, False, False),
    "qwen3": lambda source: (source.attention_bias, source.attention_bias, False),
}
"""q/k/v, o and MLP biases of each family."""


@strict
class UpcycledConfig(PreTrainedConfig):
    """Shapes of the source plus one mixer per layer; make it with `from_source`.

    Fields that differ from layer to layer (`kv_lora_rank`, `q_lora_rank`) are one value or a list with one entry per
    layer, None where the layer does not use it.

    Attributes:
        mixers: name of each layer's mixer, from the table in `registry_upcycled.py`; null is full attention everywhere.
        kv_lora_rank: r, width of the cached latent; q_lora_rank: rank of the query projection, null for a full one.
        qk_nope_head_dim, qk_rope_head_dim, v_head_dim: per-head widths of latent attention, d_n, d_r, d_v.
        rope_frequency_indices: d_r/2 indices into the source's d_h/2 frequencies that the rotary key turns with, in
            order, possibly repeated (several shared keys side by side, d_r up to G·d_h); null is evenly spread from the
            fastest (every (d_h/d_r)-th where that is an integer).
        latent_rope_parameters: rotary settings of latent layers alone: frequencies and attention factor that
            transformers gives a head of width d_r; null turns them with the source's frequencies.
        query_pre_attn_scalar: latent attention scales its scores by this to the power -1/2; null is the source's d_h.
        attention_bias, attention_out_bias, mlp_bias: biases on the query/key/value, output and MLP projections.
        latent_bias: bias on `kv_a_proj_with_mqa`; latent_out_bias: on a latent layer's `o_proj`, null as
            `attention_out_bias`. The query of a latent layer has a bias where `attention_bias` is set.
        qk_norm: RMSNorm on each query and key head before the rotation (Qwen3). A latent layer then compresses its
            normalised keys (see `latent_upcycled.py`).
        qk_latent_layernorm: RMSNorm on the latents of latent attention.
        mamba_conv_kernel: K, tokens that the convolution of a `mamba2` layer spans; mamba_conv_activation: whether SiLU
            follows it.
        mamba_norm: RMSNorm per head behind the gate; false leaves the gate alone.
        mamba_repeat_before_conv: shared x and B get their H heads before the convolution, which then has taps of its
            own for each.
        mamba_bias, mamba_out_bias: biases on `in_proj` and `out_proj`; null as `attention_bias`, `attention_out_bias`.
            With `qk_norm` B and C are normalised per head as keys and queries are, after the convolution.
        layer_types: derived; transformers' cache classes read it.
    """

    model_type = "upcycled"
    keys_to_ignore_at_inference = ["past_key_values"]
    _auto_class = "AutoConfig"

    source_model_type: str = "llama"
    mixers: list[str] | None = None
    vocab_size: int = 32000
    hidden_size: int = 2048
    intermediate_size: int = 8192
    num_hidden_layers: int = 16
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False
    rope_parameters: dict | None = None
    attention_dropout: int | float | None = 0.0
    attention_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    kv_lora_rank: int | list[int | None] | None = None
    q_lora_rank: int | list[int | None] | None = None
    qk_nope_head_dim: int | None = None
    qk_rope_head_dim: int | None = None
    v_head_dim: int | None = None
    rope_frequency_indices: list[int] | None = None
    latent_rope_parameters: dict | None = None
    query_pre_attn_scalar: int | float | None = None
    latent_bias: bool = False
    latent_out_bias: bool | None = None
    qk_latent_layernorm: bool = False
    mamba_conv_kernel: int = 4
    mamba_conv_activation: bool = True
    mamba_norm: bool = True
    mamba_repeat_before_conv: bool = False
    mamba_bias: bool | None = None
    mamba_out_bias: bool | None = None
    layer_types: list[str] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.mixers is None:
            self.mixers = ["full_attention"] * self.num_hidden_layers
        _check_mixers(self.mixers, self.num_hidden_layers)
        self.layer_types = [MIXERS[mixer].cache_layer for mixer in self.mixers]
        if self.latent_out_bias is None:
            self.latent_out_bias = self.attention_out_bias
        if self.mamba_bias is None:
            self.mamba_bias = self.attention_bias
        if self.mamba_out_bias is None:
            self.mamba_out_bias = self.attention_out_bias
        if self.mamba_conv_kernel < 1:
            raise ValueError(f"mamba_conv_kernel {self.mamba_conv_kernel} must be at least 1")
        if "latent_attention" in self.mixers:
            _check_latent(self)
        super().__post_init__(**kwargs)
        _check_rope(self.rope_parameters)

    def validate_architecture(self) -> None:
        if self.source_model_type not in SOURCES:
            raise ValueError(f"source_model_type {self.source_model_type!r} is not one of {', '.join(SOURCES)}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"{self.num_attention_heads} query heads cannot share {self.num_key_value_heads} key/value heads evenly"
            )

    def layer_value(self, name: str, layer_idx: int) -> Any:
        """The value of a field that is one value for all layers or a list with one entry per layer."""
        value = getattr(self, name)
        return value[layer_idx] if isinstance(value, list) else value

    def kept_frequencies(self) -> list[int]:
        """Indices of the source's frequencies that the rotary key of latent attention turns with, d_r/2 of them."""
        if self.rope_frequency_indices is not None:
            return list(self.rope_frequency_indices)
        kept, pairs = self.qk_rope_head_dim // 2, self.head_dim // 2
        return [index * pairs // kept for index in range(kept)]

    @classmethod
    def from_source(
        cls, source_config: PreTrainedConfig, mixers: list[str] | None = None, **fields: Any
    ) -> "UpcycledConfig":
        """The configuration of a conversion of that model: its shapes, the given mixers and further fields.

        `source_config` may itself be upcycled; its fields then stay unless given.

        Raises:
            ValueError: the source has something its blocks cannot follow, or the fields do not fit each other.
        """
        if isinstance(source_config, cls) or source_config.model_type == cls.model_type:
            base = source_config.to_dict()
            for name in ("model_type", "layer_types", "auto_map", "architectures", "transformers_version"):
                base.pop(name, None)
            return cls(**{**base, **({"mixers": list(mixers)} if mixers is not None else {}), **fields})
        _check_source(source_config)
        family = source_config.model_type
        attention_bias, out_bias, mlp_bias = _BIASES[family](source_config)
        heads = source_config.num_attention_heads
        head_dim = getattr(source_config, "head_dim", None) or source_config.hidden_size // heads
        base = {
            "source_model_type": family,
            "head_dim": head_dim,
            "rope_parameters": dict(source_config.rope_parameters),
            "attention_bias": attention_bias,
            "attention_out_bias": out_bias,
            "mlp_bias": mlp_bias,
            "qk_norm": family == "qwen3",
            "dtype": source_config.dtype,
            **{name: getattr(source_config, name) for name in _COPIED},
        }
        return cls(mixers=list(mixers) if mixers is not None else None, **{**base, **fields})


def _check_source(config: PreTrainedConfig) -> None:
    if config.model_type not in SOURCES:
        raise ValueError(f"cannot upcycle model_type {config.model_type!r}; supported: {', '.join(SOURCES)}")
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None) or []
    if any("sliding" in kind for kind in layer_types) or (
        not layer_types and window is not None and window < config.max_position_embeddings
    ):
        raise ValueError(f"cannot upcycle a model with sliding-window layers (window {window})")
    partial = (config.rope_parameters or {}).get("partial_rotary_factor", 1.0)
    if partial != 1.0:
        raise ValueError(f"cannot upcycle a model that rotates only a part of each head ({partial})")


def _check_mixers(mixers: list[str], layers: int) -> None:
    unknown = sorted(set(mixers) - set(MIXERS))
    if unknown:
        raise ValueError(f"unknown mixers {', '.join(unknown)}; known: {', '.join(sorted(MIXERS))}")
    if len(mixers) != layers:
        raise ValueError(f"{len(mixers)} mixers for {layers} layers")


def _check_rope(rope: dict) -> None:
    if rope["rope_type"] not in ROPE_TYPES:
        raise ValueError(f"rope_type {rope['rope_type']!r} is not one of {', '.join(ROPE_TYPES)}")


def _check_latent(config: UpcycledConfig) -> None:
    for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
        if getattr(config, name) is None:
            raise ValueError(f"latent_attention needs {name}")
    if config.qk_norm and config.qk_latent_layernorm:
        raise ValueError(
            "qk_latent_layernorm cannot be combined with qk_norm: such latents hold normalised keys already"
        )
    rope, widest = config.qk_rope_head_dim, config.num_key_value_heads * config.head_dim
    if rope % 2 or not 0 < rope <= widest:
        raise ValueError(f"qk_rope_head_dim {rope} must be even and between 2 and the source's keys together, {widest}")
    if config.qk_nope_head_dim < 0 or config.v_head_dim < 1:
        raise ValueError(
            f"qk_nope_head_dim {config.qk_nope_head_dim} must not be negative, v_head_dim {config.v_head_dim} must be "
            "positive"
        )
    _check_latent_rope(config)
    for name in ("kv_lora_rank", "q_lora_rank"):
        _check_ranks(config, name)


def _check_latent_rope(config: UpcycledConfig) -> None:
    rope, pairs, own = config.qk_rope_head_dim, config.head_dim // 2, config.latent_rope_parameters
    if own is None:
        indices = config.kept_frequencies()
        if len(indices) != rope // 2 or any(not 0 <= index < pairs for index in indices):
            raise ValueError(
                f"rope_frequency_indices must hold {rope // 2} indices below {pairs} for qk_rope_head_dim {rope}, "
                f"not {indices}"
            )
        return
    if config.rope_frequency_indices is not None:
        raise ValueError("rope_frequency_indices and latent_rope_parameters exclude each other: give one of them")
    kinds = [kind for kind in ROPE_TYPES if kind != "dynamic"]
    if own.get("rope_type") not in kinds or not own.get("rope_theta"):
        raise ValueError(f"latent_rope_parameters need rope_theta and a rope_type of {', '.join(kinds)}, not {own}")


def _check_ranks(config: UpcycledConfig, name: str) -> None:
    ranks = getattr(config, name)
    if isinstance(ranks, list) and len(ranks) != config.num_hidden_layers:
        raise ValueError(f"{name} lists {len(ranks)} ranks for {config.num_hidden_layers} layers")
    for layer, mixer in enumerate(config.mixers):
        rank = config.layer_value(name, layer)
        if mixer != "latent_attention" or (rank is None and name == "q_lora_rank"):
            continue
        if rank is None or rank < 1:
            raise ValueError(f"{name} of layer {layer} is {rank}; it must be at least 1")
