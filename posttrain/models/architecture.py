"""Shapes of a decoder from its `config.json` fields: parameters and cache bytes without weights, without torch.

Legend: D hidden_size, I intermediate_size, V vocab_size, L layers, H query heads, G KV heads, d_h head_dim,
r kv_lora_rank, d_n/d_r/d_v position-free key, rotary key and value width of a latent-attention head, K tokens of a
Mamba-2 layer's convolution.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from posttrain.config import plugins
from posttrain.errors import RecipeError

if TYPE_CHECKING:
    from posttrain.config.plugins import Plugin

SUPPORTED_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Dense decoders whose blocks the upcycled model can follow."""

SUPPORTED_ROPE = ("default", "linear", "dynamic", "yarn", "llama3")
MIXERS = ("full_attention", "latent_attention", "mamba2")

_COMMON: dict[str, Any] = {
    "tie_word_embeddings": False,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "mlp_bias": False,
    "attention_bias": False,
    "head_dim": None,
    "num_key_value_heads": None,
}
_FAMILY: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 131072},
    "qwen2": {"num_key_value_heads": 32, "max_position_embeddings": 32768},
    "qwen3": {"num_key_value_heads": 32, "max_position_embeddings": 32768, "head_dim": 128},
}
"""What transformers assumes where a family's `config.json` is silent, as far as it differs between families."""
_FIXED_BIASES = {
    "llama": {},
    "mistral": {"attention_bias": False, "mlp_bias": False},
    "qwen2": {"attention_bias": True, "mlp_bias": False},
    "qwen3": {"mlp_bias": False},
}
"""Biases that a family has or lacks whatever its `config.json` says."""
_OUT_BIAS_FOLLOWS = ("llama", "qwen3")
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_LATENT = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_LATENT_OPTIONAL: dict[str, Any] = {
    "q_lora_rank": None,
    "rope_frequency_indices": None,
    "latent_rope_parameters": None,
    "query_pre_attn_scalar": None,
    "latent_bias": False,
    "latent_out_bias": None,
    "qk_latent_layernorm": False,
}
_MAMBA_OPTIONAL: dict[str, Any] = {
    "mamba_conv_kernel": 4,
    "mamba_conv_activation": True,
    "mamba_norm": True,
    "mamba_repeat_before_conv": False,
    "mamba_bias": None,
    "mamba_out_bias": None,
}
STATE_SIZE = 4
"""Bytes of an element of a recurrent state: fp32, whatever the type of the model."""


def normalise(config: Mapping[str, Any]) -> dict[str, Any]:
    """The architecture dict of a `config.json`: the fields that shapes depend on, with every default filled in.

    Accepts its own result unchanged. Both spellings of the rotary settings are understood (`rope_parameters`, or
    `rope_theta` with `rope_scaling`). A model type of an installed package is counted as the supported family that its
    package names, in `counted_as`.

    Raises:
        RecipeError: the model is not one that can be converted or counted; the message names what is supported.
    """
    model_type = str(config.get("model_type") or "")
    family = str(config.get("source_model_type") or "") if model_type == "upcycled" else model_type
    if model_type not in (*SUPPORTED_FAMILIES, "upcycled") and (plugin := plugins.lookup(plugins.MODELS, model_type)):
        return _foreign(config, plugin)
    _refuse_what_no_family_has(config, model_type)
    if family not in SUPPORTED_FAMILIES:
        _unsupported(f"model_type {model_type or 'missing'!r}" if model_type != "upcycled" else f"source {family!r}")
    missing = [name for name in _REQUIRED if not isinstance(config.get(name), int)]
    if missing:
        raise RecipeError(
            f"the {model_type} configuration lacks {', '.join(missing)}",
            where="config.json (or `architecture:` of the model)",
            fix=f"add {missing[0]}: <integer>",
        )
    _refuse_what_is_not_handled(config, family)
    defaults = {**_COMMON, **_FAMILY[family]}
    heads = config["num_attention_heads"]
    result = {"model_type": model_type, **{name: config[name] for name in _REQUIRED}}
    result |= {name: default if config.get(name) is None else config[name] for name, default in defaults.items()}
    result["num_key_value_heads"] = config.get("num_key_value_heads", defaults["num_key_value_heads"]) or heads
    result["head_dim"] = result["head_dim"] or result["hidden_size"] // heads
    result["qk_norm"] = bool(config.get("qk_norm")) if model_type == "upcycled" else family == "qwen3"
    if model_type != "upcycled":
        result |= _FIXED_BIASES[family]
    out_bias = family in _OUT_BIAS_FOLLOWS and result["attention_bias"]
    result["attention_out_bias"] = bool(config.get("attention_out_bias", out_bias))
    result["rope_parameters"] = _rope(config)
    if model_type == "mistral":
        result["sliding_window"] = None
    if model_type == "upcycled":
        result |= _upcycled_fields(config, result["num_hidden_layers"])
        result["source_model_type"] = family
    return result


def _foreign(config: Mapping[str, Any], plugin: Plugin) -> dict[str, Any]:
    """The architecture of a model type of an installed package: that of a supported family with the same shapes."""
    described = dict(config)
    if "counted_as" not in config:
        describe = getattr(plugins.load(plugin), "architecture", None)
        described = {**config, "model_type": "llama"} if describe is None else dict(describe(config))
        described["counted_as"] = described.get("model_type")
    family = described["counted_as"]
    if family not in SUPPORTED_FAMILIES:
        fix = f"let `architecture` give one of the families {', '.join(SUPPORTED_FAMILIES)}"
        raise plugins.refuse(plugin, f"is to be counted as {family!r}, which is no supported family", fix)
    return {**normalise({**described, "model_type": family}), "model_type": plugin.name, "counted_as": family}


def per_layer(value: Any, layer: int) -> Any:
    """The value of that layer, of a field that is one value for all layers or a list with one per layer."""
    return value[layer] if isinstance(value, list | tuple) else value


def mixers(arch: Mapping[str, Any]) -> list[str]:
    """Mixer of every layer; a plain source has full attention everywhere."""
    return list(arch.get("mixers") or ["full_attention"] * arch["num_hidden_layers"])


def parameter_count(arch: Mapping[str, Any]) -> int:
    """Parameters of the model with these shapes; tied embeddings count once. Equal to the model's own count."""
    width, vocabulary = arch["hidden_size"], arch["vocab_size"]
    embeddings = vocabulary * width * (1 if arch["tie_word_embeddings"] else 2)
    return embeddings + width + sum(layer_parameters(arch, layer) for layer in range(arch["num_hidden_layers"]))


def layer_parameters(arch: Mapping[str, Any], layer: int) -> int:
    """Parameters of one block: mixer, MLP and the two norms."""
    width, inner = arch["hidden_size"], arch["intermediate_size"]
    mlp = 3 * width * inner + (2 * inner + width if arch["mlp_bias"] else 0)
    return mixer_parameters(arch, layer) + mlp + 2 * width


def mixer_parameters(arch: Mapping[str, Any], layer: int) -> int:
    """Parameters of one layer's mixer."""
    kind = mixers(arch)[layer]
    if kind == "mamba2":
        return _mamba_parameters(arch)
    return _latent_parameters(arch, layer) if kind == "latent_attention" else _full_parameters(arch)


def cache_elements_per_token(arch: Mapping[str, Any]) -> list[int]:
    """Cached elements one token adds, per layer: 2·G·d_h for full attention, r + d_r for latent attention, else 0."""
    full = 2 * arch["num_key_value_heads"] * arch["head_dim"]
    elements = {"full_attention": lambda _: full, "mamba2": lambda _: 0}
    elements["latent_attention"] = lambda layer: per_layer(arch["kv_lora_rank"], layer) + arch["qk_rope_head_dim"]
    return [elements[mixer](layer) for layer, mixer in enumerate(mixers(arch))]


def cache_bytes_per_token(arch: Mapping[str, Any], element_size: int = 2) -> int:
    """Bytes by which the cache grows per token, all layers; `element_size` in bytes (2: bf16).

    States do not grow and do not count here: see `cache_state_bytes`.
    """
    return element_size * sum(cache_elements_per_token(arch))


def state_elements(arch: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Elements a sequence holds whatever its length, per layer: recurrent state H·d_h², K columns of the convolution.

    Both are 0 for attention. The columns are those of x, B and C: H·d_h + 2·G·d_h channels, or 3·H·d_h where shared
    heads are repeated before the convolution.
    """
    heads, head = arch["num_attention_heads"], arch["head_dim"]
    return [
        (heads * head**2, arch["mamba_conv_kernel"] * _mamba_channels(arch)) if mixer == "mamba2" else (0, 0)
        for mixer in mixers(arch)
    ]


def cache_state_bytes(arch: Mapping[str, Any], element_size: int = 2, state_size: int = STATE_SIZE) -> int:
    """Constant bytes of one sequence's cache, all layers; `state_size` is that of a recurrent state's element."""
    return sum(state * state_size + columns * element_size for state, columns in state_elements(arch))


def cache_bytes(arch: Mapping[str, Any], tokens: int, element_size: int = 2, state_size: int = STATE_SIZE) -> int:
    """All bytes of the cache of one sequence of `tokens` tokens, constant state included."""
    growing = tokens * cache_bytes_per_token(arch, element_size)
    return growing + cache_state_bytes(arch, element_size, state_size)


def cache_ratios(
    arch: Mapping[str, Any],
    baseline: Mapping[str, Any],
    tokens: int,
    element_size: int = 2,
    state_size: int = STATE_SIZE,
) -> tuple[float, float]:
    """The cache relative to the baseline's at this length: without constant states (what papers print), and with them.

    The first does not depend on the length.
    """
    growing = cache_bytes_per_token(arch, element_size) / cache_bytes_per_token(baseline, element_size)
    ours, theirs = (cache_bytes(model, tokens, element_size, state_size) for model in (arch, baseline))
    return growing, ours / theirs


LENGTHS = (2048, 8192, 32_768, 131_072)
"""Tokens at which caches with constant states are compared: a state weighs more, the shorter the text."""


def plain_attention(arch: Mapping[str, Any]) -> dict[str, Any]:
    """The same model with full attention in every layer: what a smaller cache is measured against."""
    return {**arch, "mixers": ["full_attention"] * arch["num_hidden_layers"]}


def cache_ratios_at(arch: Mapping[str, Any], element_size: int = 2) -> dict[str, Any]:
    """Cache relative to plain attention's, as plans and evaluations record it.

    `cache_ratio_without_states` is one number, `cache_ratio_with_states` one for each of `LENGTHS`, whose names are
    strings as in JSON.
    """
    baseline = plain_attention(arch)
    at = {length: cache_ratios(arch, baseline, length, element_size) for length in LENGTHS}
    return {
        "cache_ratio_without_states": at[LENGTHS[0]][0],
        "cache_ratio_with_states": {str(length): honest for length, (_, honest) in at.items()},
    }


def _full_parameters(arch: Mapping[str, Any]) -> int:
    width, query = arch["hidden_size"], arch["num_attention_heads"] * arch["head_dim"]
    key_value = 2 * arch["num_key_value_heads"] * arch["head_dim"]
    count = width * (query + key_value) + query * width
    if arch["attention_bias"]:
        count += query + key_value
    return count + (width if arch["attention_out_bias"] else 0) + (2 * arch["head_dim"] if arch["qk_norm"] else 0)


def _latent_parameters(arch: Mapping[str, Any], layer: int) -> int:
    width, heads = arch["hidden_size"], arch["num_attention_heads"]
    rank, query_rank = per_layer(arch["kv_lora_rank"], layer), per_layer(arch["q_lora_rank"], layer)
    nope, rope, value = arch["qk_nope_head_dim"], arch["qk_rope_head_dim"], arch["v_head_dim"]
    query, latent = heads * (nope + rope), rank + rope
    count = 0
    if arch["qk_norm"]:
        head, keys = arch["head_dim"], arch["num_key_value_heads"] * arch["head_dim"]
        query = heads * head
        # k_proj, the keys' columns of kv_a, q_map, and one norm each for queries and keys.
        count += width * keys + keys * latent + keys * (nope + rope) + 2 * head
        count += keys if arch["attention_bias"] else 0
    count += width * query if query_rank is None else query_rank * (width + query)
    count += width * latent + rank * heads * (nope + value) + heads * value * width
    count += (query if arch["attention_bias"] else 0) + (latent if arch["latent_bias"] else 0)
    count += width if arch["latent_out_bias"] else 0
    return count + (rank + (query_rank or 0) if arch["qk_latent_layernorm"] else 0)


def _mamba_channels(arch: Mapping[str, Any]) -> int:
    """Channels of the convolution."""
    inner, shared = (arch[name] * arch["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    return 3 * inner if arch["mamba_repeat_before_conv"] else inner + 2 * shared


def _mamba_parameters(arch: Mapping[str, Any]) -> int:
    width, heads, head = arch["hidden_size"], arch["num_attention_heads"], arch["head_dim"]
    inner, shared = heads * head, arch["num_key_value_heads"] * head
    rows = 2 * inner + 2 * shared + heads  # z, C; x, B; dt
    count = width * rows + inner * width + (arch["mamba_conv_kernel"] + 1) * _mamba_channels(arch)
    count += 3 * heads  # A_log, dt_bias, D
    count += (inner if arch["mamba_norm"] else 0) + (2 * head if arch["qk_norm"] else 0)
    return count + (rows if arch["mamba_bias"] else 0) + (width if arch["mamba_out_bias"] else 0)


def _upcycled_fields(config: Mapping[str, Any], layers: int) -> dict[str, Any]:
    kinds = list(config.get("mixers") or [])
    unknown = sorted(set(kinds) - set(MIXERS))
    if len(kinds) != layers or unknown:
        raise RecipeError(
            f"`mixers` must name one mixer for each of {layers} layers, not {kinds}",
            where="config.json",
            fix=f"known mixers: {', '.join(MIXERS)}",
        )
    missing = [name for name in _LATENT if config.get(name) is None] if "latent_attention" in kinds else []
    if missing:
        raise RecipeError(f"latent_attention needs {', '.join(missing)}", where="config.json", fix="convert it again")
    fields = {"mixers": kinds, **{name: config.get(name) for name in _LATENT}}
    fields.update({name: config.get(name, default) for name, default in _LATENT_OPTIONAL.items()})
    if fields["latent_out_bias"] is None:
        fields["latent_out_bias"] = bool(config.get("attention_out_bias"))
    fields.update({name: config.get(name, default) for name, default in _MAMBA_OPTIONAL.items()})
    for name, source in (("mamba_bias", "attention_bias"), ("mamba_out_bias", "attention_out_bias")):
        if fields[name] is None:
            fields[name] = bool(config.get(source))
    return fields


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kind = rope.pop("type", None)
    rope.setdefault("rope_type", kind or "default")
    rope.setdefault("rope_theta", config.get("rope_theta") or 10000.0)
    partial = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor")
    if partial not in (None, 1, 1.0):
        _unsupported(f"partial rotary embedding (factor {partial})")
    if rope["rope_type"] not in SUPPORTED_ROPE:
        _unsupported(f"rope_type {rope['rope_type']!r} (supported: {', '.join(SUPPORTED_ROPE)})")
    return rope


def _refuse_what_no_family_has(config: Mapping[str, Any], model_type: str) -> None:
    """The reason before the name: a family that is not in the list says more about itself than its name."""
    of = f" (model_type {model_type!r})" if model_type else ""
    for name in ("num_experts", "num_local_experts", "n_routed_experts"):
        if config.get(name):
            _unsupported(f"mixture of experts, {name} {config[name]}{of}")
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if config.get(name):
            _unsupported(f"soft-capped logits ({name}){of}")
    nested = config.get("attn_config")
    alibi = config.get("alibi") or (nested.get("alibi") if isinstance(nested, Mapping) else None)
    if alibi or config.get("position_embedding_type") == "alibi":
        _unsupported(f"ALiBi instead of rotary embedding{of}")


def _refuse_what_is_not_handled(config: Mapping[str, Any], family: str) -> None:
    if config.get("quantization_config"):
        _unsupported("quantised weights (quantization_config)")
    if window := _sliding_window(config, family):
        _unsupported(f"sliding-window layers (window {window})")


def _sliding_window(config: Mapping[str, Any], family: str) -> int | None:
    """The window, if some layer has one that is shorter than the context; as transformers reads the configuration."""
    layer_types = config.get("layer_types")
    if layer_types and config.get("model_type") != "upcycled" and any("sliding" in kind for kind in layer_types):
        return config.get("sliding_window") or 1
    if config.get("model_type") == "mistral":
        window = config.get("sliding_window", 4096)
        context = config.get("max_position_embeddings") or _FAMILY["mistral"]["max_position_embeddings"]
        return window if window is not None and window < context else None
    if family.startswith("qwen") and config.get("use_sliding_window") and not layer_types:
        full_layers = config.get("max_window_layers", 28)
        return config.get("sliding_window", 4096) if full_layers < config["num_hidden_layers"] else None
    return None


def _unsupported(what: str) -> None:
    raise RecipeError(
        f"unsupported architecture: {what}",
        where="config.json (or `architecture:` of the model)",
        fix=f"use a dense full-attention model of a supported family: {', '.join(SUPPORTED_FAMILIES)}",
    )
