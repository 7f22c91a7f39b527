"""A tokenizer and random models made in code: for smoke runs and tests, where seconds count and quality does not."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.config import plugins

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD, START = "<|bos|>", "<|im_end|>", "<|pad|>", "<|im_start|>"
TINY_VOCABULARY = 300

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _byte_characters() -> list[str]:
    """The printable stand-in of every byte that byte-level tokenizers use, in byte order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    characters, shift = [], 0
    for byte in range(256):
        if byte in printable:
            characters.append(chr(byte))
        else:
            characters.append(chr(256 + shift))
            shift += 1
    return characters


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of 300 tokens: id = byte, then bos 256, eos 257, pad 258, `<|im_start|>` 259, reserved.

    `decode(encode(text)) == text` for every text. Nothing is added by `encode`; the chat template ends every turn
    with EOS.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {character: byte for byte, character in enumerate(_byte_characters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    reserved = [f"<|reserved_{token}|>" for token in range(260, TINY_VOCABULARY)]
    specials = [BOS, EOS, PAD, START, *reserved]
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in specials])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=1 << 20,
    )


def write_random_model(folder: Path, architecture: dict[str, Any], seed: int, dtype: str = "float32") -> None:
    """Write a decoder with random weights, the tiny tokenizer and a generation config into `folder`.

    Args:
        architecture: `config.json` fields; `model_type` names the family (llama, mistral, qwen2, qwen3)
            or a type of an installed package.
        seed: of the weights; the same seed and architecture give the same bytes.
        dtype: of the stored weights.

    Raises:
        ValueError: the vocabulary is smaller than the tokenizer's.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    from posttrain.models.foreign import register

    if architecture["vocab_size"] < TINY_VOCABULARY:
        raise ValueError(f"a random model needs vocab_size >= {TINY_VOCABULARY}, got {architecture['vocab_size']}")
    tokenizer = tiny_tokenizer()
    tokens = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    register(architecture["model_type"])
    config = AutoConfig.for_model(**{**config_fields(architecture), **tokens})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.to(getattr(torch, dtype))
    model.config.dtype = getattr(torch, dtype)
    model.generation_config = GenerationConfig(**tokens)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def config_fields(architecture: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a transformers config for an `architecture:` section.

    `qk_norm` is implied by the family there and `sliding_window` must be switched off for Mistral, whose config has
    one by default.
    """
    fields = {name: value for name, value in architecture.items() if name != "qk_norm"}
    if fields["model_type"] in plugins.names(plugins.MODELS):
        return fields
    if fields["model_type"] != "llama":
        fields.setdefault("sliding_window", None)
    if fields["model_type"] not in ("llama", "qwen3"):
        fields.pop("attention_bias", None)
    return fields
