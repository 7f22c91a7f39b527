"""Tiny random source models of each family. A module of its own: nested conftest files shadow the name `conftest`."""

from __future__ import annotations

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def make_source(family: str = "llama", *, seed: int = 0, **changes):
    """A tiny random source model in fp32 evaluation mode: D 64, H 4, G 2, d_h 16, 2 layers, vocabulary 300."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": 258,
        "initializer_range": 0.2,
        "attn_implementation": "eager",
    }
    if family == "mistral":
        fields["sliding_window"] = None
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**fields, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model
