"""What every training stage says of the model that it has made."""

from __future__ import annotations

from source_models import make_source

from posttrain.methods.distillation import Distill
from posttrain.models.tiny import TINY_VOCABULARY, tiny_tokenizer
from posttrain.pipeline.stage import ArtifactMeta


def test_what_was_open_in_the_plan_is_known_of_a_model_that_is_there(tmp_path):
    make_source(vocab_size=TINY_VOCABULARY).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    predicted = ArtifactMeta("model", extra={"open": ["kv_lora_rank"], "label": "source"})
    measured = Distill().measure("model", tmp_path, predicted)
    assert measured.architecture["vocab_size"] == TINY_VOCABULARY
    assert measured.extra["label"] == "source" and "open" not in measured.extra
