"""Tiny models of every kind the decoder knows, prompts of uneven lengths, and what transformers makes of them."""

from __future__ import annotations

import torch
from source_models import FAMILIES, make_source

PAD = 258
LATENT = {"kv_lora_rank": 24, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16}
MIXED = ["full_attention", "latent_attention"]
HYBRID = ["mamba2", "full_attention"]


def make_upcycled(family: str = "llama", mixers: list[str] | None = None, seed: int = 1, source=None, **fields):
    """An upcycled model whose new mixers are random; null mixers: latent attention in both layers."""
    from posttrain.models.upcycled.configuration_upcycled import UpcycledConfig
    from posttrain.models.upcycling import build_upcycled

    source = source or make_source(family)
    config = UpcycledConfig.from_source(
        source.config, mixers=mixers or ["latent_attention"] * 2, **({**LATENT, **fields} if mixers != [] else {})
    )
    model = build_upcycled(source, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.isnan().any():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(1 + 0.3 * noise if "norm" in name else 0.14 * noise)
    return model.eval()


def make_full(family: str = "llama"):
    from posttrain.models.upcycling import convert_full_attention

    return convert_full_attention(make_source(family))


YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MODELS = {
    **{family: (lambda family=family: make_source(family)) for family in FAMILIES},
    "untied": lambda: make_source(tie_word_embeddings=False),
    "biases": lambda: make_source(attention_bias=True, mlp_bias=True),
    "yarn": lambda: make_source("qwen2", rope_parameters=YARN),
    "llama3 rope": lambda: make_source(rope_parameters=LLAMA3),
    "upcycled full": make_full,
    "upcycled qwen3": lambda: make_full("qwen3"),
    "latent": make_upcycled,
    "mixed": lambda: make_upcycled(mixers=MIXED, kv_lora_rank=[None, 24]),
    "latent with biases": lambda: make_upcycled("qwen2", latent_bias=True, latent_out_bias=True),
    "latent, low-rank query": lambda: make_upcycled(q_lora_rank=12, qk_latent_layernorm=True),
    "latent, rotary only": lambda: make_upcycled(qk_nope_head_dim=0, qk_rope_head_dim=16, query_pre_attn_scalar=5.0),
    "states": lambda: make_upcycled(mixers=["mamba2"] * 2),
    "hybrid": lambda: make_upcycled(mixers=HYBRID),
    "states and latents": lambda: make_upcycled(mixers=["mamba2", "latent_attention"], kv_lora_rank=[None, 24]),
    "hybrid qwen3": lambda: make_upcycled("qwen3", mixers=HYBRID, mamba_bias=True),
    "hybrid with biases": lambda: make_upcycled("qwen2", mixers=HYBRID, mamba_out_bias=True, mamba_conv_kernel=6),
    "hybrid, own taps": lambda: make_upcycled(mixers=HYBRID, mamba_repeat_before_conv=True, mamba_conv_kernel=1),
    "hybrid, neutral": lambda: make_upcycled(mixers=HYBRID, mamba_conv_activation=False, mamba_norm=False),
    "latent, wide values": lambda: make_upcycled(v_head_dim=24, rope_frequency_indices=[7, 0, 3, 1]),
    "latent qk norm": lambda: make_upcycled("qwen3"),
    "latent qk norm, low-rank query": lambda: make_upcycled(
        source=make_source("qwen3", attention_bias=True), q_lora_rank=12, latent_bias=True, kv_lora_rank=[40, 6]
    ),
    "latent, all heads' rotary keys": lambda: make_upcycled(
        qk_nope_head_dim=0, qk_rope_head_dim=32, rope_frequency_indices=[*range(8)] * 2
    ),
    "latent, own rotary settings": lambda: make_upcycled(latent_rope_parameters=YARN),
    "latent, yarn": lambda: make_upcycled(source=make_source(rope_parameters=YARN), kv_lora_rank=[40, 6]),
}
"""Between them they use every feature of the decoder."""


def prompts(lengths: tuple[int, ...] = (5, 9, 12, 1, 12), seed: int = 3) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (length,), generator=generator).tolist() for length in lengths]


def generate(model, rows: list[list[int]], new_tokens: int, stop: tuple[int, ...] = ()) -> list[list[int]]:
    """transformers' greedy answers to a left-padded batch, cut behind the first stop token."""
    from transformers import GenerationConfig

    width, device = max(map(len, rows)), model.device
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=new_tokens, eos_token_id=list(stop) or None, pad_token_id=PAD
    )
    answers = model.generate(ids, attention_mask=mask)[:, width:].tolist()
    return [_cut(answer, stop) for answer in answers]


def _cut(answer: list[int], stop: tuple[int, ...]) -> list[int]:
    ends = [index for index, token in enumerate(answer) if token in stop]
    return answer[: ends[0] + 1] if ends else answer


@torch.no_grad()
def full_logprobs(model, prompt: list[int], answer: list[int], temperature: float = 1.0) -> torch.Tensor:
    """log softmax(logits / T) of the answer's tokens from one full forward pass, fp32 [T]."""
    ids = torch.tensor([prompt + answer], device=model.device)
    logits = model(ids).logits[0, len(prompt) - 1 : -1].float() / temperature
    return logits.log_softmax(-1).gather(-1, ids[0, len(prompt) :, None])[:, 0]
