"""Problems in an evaluation: sampled answers, scores, pass@k by task and level, resume, refusals."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import pytest
import torch
from evaluation_case import config, context, save_model
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from posttrain.data.tasks import problem_of
from posttrain.errors import RecipeError, StageError, StopRequested
from posttrain.generation import DecodeEngine
from posttrain.methods.evaluation import answers as answers_module
from posttrain.methods.evaluation.answers import Answers, Problem
from posttrain.methods.evaluation.config import EvaluateConfig, ProblemSettings
from posttrain.methods.evaluation.intervals import NO_DIFFERENCE
from posttrain.methods.evaluation.pass_at_k import pass_at_k
from posttrain.methods.evaluation.problems import Measured, find_problems
from posttrain.methods.evaluation.stage import Evaluate
from posttrain.models.tiny import tiny_tokenizer
from posttrain.pipeline.stage import ArtifactMeta
from posttrain.rewards.score import COUNTS, Scores

SMALL = {"samples": 4, "k": [1, 2], "max_new_tokens": 6, "batch_rows": 5}


def row(number: int, name: str = "chain_sum", level: int | None = 0, **fields) -> dict:
    task = {"name": name, "settings": {"max_terms": 3}, "seed": 5, "size": 9, "index": number}
    entry = problem_of(task)
    if level is not None:
        task["difficulty"] = level
    turns = [{"role": "user", "content": entry["question"]}, {"role": "assistant", "content": entry["answer"]}]
    return {"id": f"p{number}", "text": "User: x", "messages": turns, "task": task, "answer": entry["answer"], **fields}


def rows() -> list[dict]:
    return [row(n, "chain_sum" if n % 2 else "products", n % 3) for n in range(6)]


def save_rows(folder: Path, found: list[dict]) -> Path:
    folder.mkdir(parents=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in found), encoding="utf-8")
    return folder


class FakeRewards:
    """Scores by a hash of the answer, in this process; a row with `broken` cannot be scored."""

    calls = 0
    share = 3

    def __init__(self, rewards, answer, **_) -> None:
        self.rewards = rewards

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        pass

    def score(self, prompts, completions, rows, lengths) -> Scores:
        type(self).calls += 1
        assert all(problem_of(one["task"])["question"] in prompt for prompt, one in zip(prompts, rows, strict=True))
        scores = [
            None if one.get("broken") else float(hashlib.sha256(text.encode()).digest()[0] % self.share == 0)
            for text, one in zip(completions, rows, strict=True)
        ]
        counts = dict.fromkeys(COUNTS, 0) | {"parse_failures": 1, "timeouts": 2}
        return Scores({"correct": scores}, counts)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("problems")
    return {
        "model": save_model(root / "model", seed=1),
        "baseline": save_model(root / "baseline", seed=2),
        "data": save_rows(root / "data", rows()),
    }


@pytest.fixture
def fake(monkeypatch) -> type[FakeRewards]:
    monkeypatch.setattr(answers_module, "RewardSet", FakeRewards)
    FakeRewards.calls = 0
    return FakeRewards


def run(work: Path, cfg: EvaluateConfig, **inputs: Path) -> tuple[dict, Path]:
    ctx = context(work, cfg, **inputs)
    return (Evaluate().run(ctx), ctx.result)[1], work / "outputs" / "evaluation"


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_figures_are_those_of_the_counts_in_the_files(folders, fake, tmp_path: Path) -> None:
    result, folder = run(tmp_path, config(problems=SMALL), **folders)
    found = lines(folder / "problems.jsonl")
    assert [(one["id"], one["task"], one["difficulty"], one["n"]) for one in found] == [
        (one["id"], one["task"]["name"], one["task"]["difficulty"], 4) for one in rows()
    ]
    assert {0} < {count for one in found for count in one["correct"].values()}
    for name, prefix in (("model", ""), ("baseline", "baseline_")):
        for k in (1, 2):
            expected = sum(pass_at_k(4, one["correct"][name], k) for one in found) / 6
            assert result[f"{prefix}pass@{k}"] == pytest.approx(expected)
            assert result[f"{prefix}pass@{k}_low"] <= expected <= result[f"{prefix}pass@{k}_high"]
    assert result["difference_pass@1"] == pytest.approx(result["pass@1"] - result["baseline_pass@1"])
    assert result["difference_pass@1_verdict"] in (NO_DIFFERENCE, "better", "worse")
    detail = result["problems"]
    assert detail["problems"] == 6 and detail["left_out"] == {"without": 0, "too_long": 0, "unscorable": 0}
    for field, groups in (("task", {"chain_sum", "products"}), ("difficulty", {"0", "1", "2"})):
        by = detail[f"by_{field}"]
        assert set(by) == groups
        for value, figures in by.items():
            own = [one["correct"]["model"] for one in found if str(one[field]) == value]
            assert figures["problems"] == len(own)
            assert figures["model"]["pass@2"] == pytest.approx(sum(pass_at_k(4, c, 2) for c in own) / len(own))
            assert figures["difference"]["pass@2"] == pytest.approx(
                figures["model"]["pass@2"] - figures["baseline"]["pass@2"]
            )
    assert detail["settings"]["temperature"] == 1.0 and detail["settings"]["reward"]["type"] == "gym"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["problems"] == detail and metrics["pass@1"] == result["pass@1"]


def test_answers_are_the_decoders_own_and_their_entropy_is_the_models(folders, fake, tmp_path: Path) -> None:
    result, folder = run(tmp_path, config(problems=SMALL), **folders)
    model = AutoModelForCausalLM.from_pretrained(folders["model"], attn_implementation="eager").eval()
    tokenizer = tiny_tokenizer()
    prompts = [
        tokenizer.apply_chat_template(one["messages"][:1], tokenize=False, add_generation_prompt=True)
        if tokenizer.chat_template
        else f"User: {one['messages'][0]['content']}\n\nAssistant:"
        for one in rows()
    ]
    ids = [tokenizer(prompt, add_special_tokens=not tokenizer.chat_template)["input_ids"] for prompt in prompts]
    every = [prompt for prompt in ids for _ in range(4)]
    engine = DecodeEngine(model, 24, max(map(len, ids)) + 6)
    cfg = ProblemSettings(**SMALL)
    from posttrain.generation.tokens import stop_tokens

    drawn = engine.generate(every, cfg.sampling(11, stop_tokens(model, tokenizer)), list(range(24)))
    figures = result["problems"]["answers"]["model"]
    tokens = sum(map(len, drawn.tokens))
    assert figures["tokens"] == tokens and figures["mean_tokens"] == tokens / 24 and figures["answers"] == 24
    assert figures["cut_off"] == sum(not ended for ended in drawn.finished) / 24
    assert figures["parse_failures"] == pytest.approx(5 / 24) and figures["timeouts"] == 10
    nll = 0.0
    for prompt, answer in zip(every, drawn.tokens, strict=True):
        with torch.no_grad():
            log_p = torch.log_softmax(model(torch.tensor([[*prompt, *answer]])).logits[0].double(), -1)
        nll -= sum(log_p[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer))
    assert figures["entropy"] == pytest.approx(nll / tokens, rel=1e-5)
    shown = json.loads((folder / "answers.json").read_text())
    assert [one["id"] for one in shown] == ["p0", "p1", "p2", "p3"]
    texts = [tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in drawn.tokens]
    assert shown[1]["model"] == texts[4:6] and len(shown[1]["baseline"]) == 2
    assert shown[1]["answer"] == rows()[1]["answer"] and problem_of(rows()[1]["task"])["question"] in shown[1]["prompt"]


@pytest.mark.parametrize("decoder", ["engine", "transformers"])
def test_a_second_run_and_a_resumed_one_are_bit_equal(folders, fake, tmp_path, monkeypatch, decoder) -> None:
    if decoder == "transformers":
        monkeypatch.setattr(answers_module, "unsupported", lambda model: "this test")
    cfg = config(problems=SMALL)
    undisturbed, _ = run(tmp_path / "a", cfg, **folders)
    calls, fake.calls = fake.calls, 0
    assert calls == 2 * 5
    ctx = context(tmp_path / "b", cfg, **folders)
    stop = tmp_path / "b" / "STOP"
    ctx.progress = lambda done, total, unit="", **_: stop.touch() if (done, unit) == (2, "batch") else None
    with pytest.raises(StopRequested):
        Evaluate().run(ctx)
    partial = tmp_path / "b" / "problems_model.jsonl"
    assert len(lines(partial)) == 2 == fake.calls
    with partial.open("a") as file:
        file.write('{"batch": 2, "ans')
    stop.unlink()
    assert run(tmp_path / "b", cfg, **folders)[0] == undisturbed
    assert fake.calls == calls
    for name in ("metrics.json", "problems.jsonl", "answers.json", "documents.jsonl"):
        files = [tmp_path / side / "outputs" / "evaluation" / name for side in ("a", "b")]
        assert files[0].read_bytes() == files[1].read_bytes(), name


def test_transformers_answers_have_their_entropy_too(folders, fake, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(answers_module, "unsupported", lambda model: "this test")
    torch.manual_seed(123)
    state = torch.random.get_rng_state()
    result, _ = run(tmp_path, config(problems={**SMALL, "temperature": 0.7}), **folders)
    assert torch.equal(state, torch.random.get_rng_state())
    figures = result["problems"]["answers"]["model"]
    assert 0 < figures["entropy"] < 2 * math.log(300) and 1 <= figures["mean_tokens"] <= 6
    model = AutoModelForCausalLM.from_pretrained(folders["model"], attn_implementation="eager").eval()
    with torch.no_grad():
        logits = model(torch.tensor([[5, 6, 7, 8]])).logits[0].double()
    for temperature in (0.0, 0.5, 1.0):
        log_p = torch.log_softmax(logits / (temperature or 1.0), -1)
        expected = -(log_p[1, 7] + log_p[2, 8]).item()
        assert answers_module.negative_logprob(model, [5, 6], [7, 8], temperature) == pytest.approx(expected, rel=1e-5)


def test_the_same_problem_has_different_samples_and_models_share_their_draws(folders, fake, tmp_path) -> None:
    same = {**folders, "baseline": folders["model"]}
    result, folder = run(tmp_path, config(problems=SMALL), **same)
    shown = json.loads((folder / "answers.json").read_text())
    assert any(one["model"][0] != one["model"][1] for one in shown)
    assert all(one["model"] == one["baseline"] for one in shown)
    assert result["difference_pass@1"] == result["difference_pass@1_low"] == 0.0
    assert result["difference_pass@1_verdict"] == NO_DIFFERENCE


def test_rows_that_do_not_fit_are_passed_over_and_counted(folders, fake, tmp_path: Path) -> None:
    long = row(7)
    long["messages"][0]["content"] = problem_of(long["task"])["question"] + "x" * 400
    found = [{"id": "t", "text": "plain"}, long, row(0, broken=True), *rows()]
    data = save_rows(tmp_path / "data", found)
    model = save_model(tmp_path / "model", max_position_embeddings=300)
    cfg = config(problems={**SMALL, "max_problems": 4})
    result, folder = run(tmp_path / "w", cfg, model=model, data=data)
    assert result["problems"]["left_out"] == {"without": 1, "too_long": 1, "unscorable": 1}
    assert [one["id"] for one in lines(folder / "problems.jsonl")] == ["p0", "p1", "p2"]
    assert result["problems"]["problems"] == 3 and "difference_pass@1" not in result
    assert set(lines(folder / "problems.jsonl")[0]["correct"]) == {"model"}


def test_data_without_problems_is_refused(folders, fake, tmp_path: Path) -> None:
    data = save_rows(tmp_path / "data", [{"id": str(n), "text": "some text"} for n in range(3)])
    with pytest.raises(StageError, match="3 rows have no `task`"):
        run(tmp_path / "a", config(problems=SMALL), model=folders["model"], data=data)
    data = save_rows(tmp_path / "broken", [row(n, broken=True) for n in range(3)])
    with pytest.raises(StageError, match="none of the answers to 3 problems could be scored"):
        run(tmp_path / "b", config(problems=SMALL), model=folders["model"], data=data)


def test_real_rewards_score_right_answers(folders, tmp_path: Path, monkeypatch) -> None:
    """The tasks' own scores in their processes; the model is made to answer rightly every other time."""
    cfg = config(problems={**SMALL, "max_problems": 2, "pool": {"workers": 1}})
    tokenizer = tiny_tokenizer()

    def writer(model, tokenizer_, problems, settings, seed):
        def write(number, batch):
            texts = [f"<answer>{p.row['answer'] if s % 2 else 'x'}</answer>" for p, s in batch]
            tokens = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
            return tokens, [1.0] * len(batch), [True] * len(batch)

        return write

    monkeypatch.setattr(answers_module, "_writer", writer)
    result, folder = run(tmp_path, cfg, model=folders["model"], data=folders["data"])
    assert [one["correct"] for one in lines(folder / "problems.jsonl")] == [{"model": 2}] * 2
    assert result["pass@1"] == 0.5 and result["pass@2"] == pytest.approx(1 - 1 / 6)
    assert result["problems"]["answers"]["model"]["parse_failures"] == 0.0


def meta(**extra) -> dict[str, ArtifactMeta]:
    return {"model": ArtifactMeta("model"), "data": ArtifactMeta("dataset", rows=9, extra=extra)}


def test_a_plan_refuses_data_that_cannot_be_scored() -> None:
    math_reward = {**SMALL, "reward": {"type": "math"}}
    for problems, extra, says in (
        (SMALL, {"rows": "messages", "fields": []}, "no `task`"),
        (math_reward, {"rows": "messages", "fields": ["task"]}, "no `answer`"),
        ({**SMALL, "reward": {"type": "code"}}, {"fields": ["answer"]}, "no `tests` or `test_code`"),
        (SMALL, {"rows": "text"}, "its rows are plain text"),
    ):
        with pytest.raises(RecipeError, match="data=reasoning_gym_rl") as error:
            Evaluate().check(config(problems=problems), meta(**extra))
        assert says in str(error.value)
    Evaluate().check(config(problems=SMALL), meta(rows="messages", fields=["answer", "task"]))
    Evaluate().check(config(problems=math_reward), meta(fields=["answer"]))
    Evaluate().check(config(problems=SMALL), meta(rows="messages"))  # unknown fields: seen when it runs
    Evaluate().check(config(), meta(rows="text", fields=[]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"samples": 8}, r"k=16 needs 16 samples, not 8: set samples=16 or k=\[1, 4\]"),
        ({"k": [0]}, "begin at 1"),
        ({"k": []}, "at least 1 item"),
        ({"reward": {"type": "length", "target": 1, "limit": 2}}, "does not say whether an answer is right"),
        ({"temperature": 0}, "greedy samples are all alike"),
        ({"temperature": 1e-9}, "`temperature`.*too close to zero"),
        ({"top_p": 0}, "top_p"),
    ],
)
def test_settings_that_do_not_fit(fields, message) -> None:
    with pytest.raises(ValidationError, match=message):
        ProblemSettings(**fields)


def test_defaults_and_k() -> None:
    assert (ProblemSettings().samples, ProblemSettings().k, ProblemSettings().temperature) == (16, (1, 4, 16), 1.0)
    assert ProblemSettings(k=[4, 2, 4]).k == (1, 2, 4)
    assert ProblemSettings(samples=1, k=[1], temperature=0).sampling(3, (7,)).greedy
    drawn = ProblemSettings(top_p=0.9, top_k=5, temperature=0.5, max_new_tokens=7).sampling(3, (7,))
    assert (drawn.top_p, drawn.top_k, drawn.temperature, drawn.max_new_tokens, drawn.seed, drawn.stop) == (
        0.9,
        5,
        0.5,
        7,
        3,
        (7,),
    )


def test_the_key_has_problems_only_where_there_are_any() -> None:
    assert "problems" not in config().key_fields() and Evaluate().external(config()) == {}
    found = config(problems=SMALL)
    assert found.key_fields()["problems"]["samples"] == 4
    assert found.key_fields() == config(problems={**SMALL, "pool": {"workers": 9}}).key_fields()
    for other in ({"top_p": 0.5}, {"batch_rows": 6}, {"pool": {"memory_mb": 2048}}, {"answer": {"find": "whole"}}):
        assert found.key_fields() != config(problems={**SMALL, **other}).key_fields()
    json.dumps(found.key_fields())
    assert set(Evaluate().external(found)["reward"]) == {"reasoning_gym"}


def test_the_estimate_counts_the_answers() -> None:
    from source_models import make_source

    from posttrain.models.architecture import normalise

    arch = normalise(make_source("llama").config.to_dict())
    metas = {"model": ArtifactMeta("model", arch), "data": ArtifactMeta("dataset", rows=7)}
    metas["baseline"] = metas["model"]
    plain, asked = (Evaluate().estimate(config(problems=p), metas) for p in (None, SMALL))
    assert asked.tokens - plain.tokens == 2 * 7 * 4 * 6
    few = Evaluate().estimate(config(problems={**SMALL, "max_problems": 3}), metas)
    assert few.tokens - plain.tokens == 2 * 3 * 4 * 6
    wide = Evaluate().estimate(config(problems={**SMALL, "batch_rows": 500}), metas)
    assert wide.memory["cache"] == 500 * (256 + 6) * 2 * 2 * 2 * 16 * 4
    assert wide.memory["sampling"] == 500 * arch["vocab_size"] * 8 and "sampling" not in plain.memory
    assert "decoder" in asked.memory and "decoder" not in plain.memory


def test_only_problems_scored_for_both_models_count_and_part_of_a_point_is_not_right(tmp_path: Path) -> None:
    asked = [Problem(n, f"p{n}", "gcd" if n else "lcm", None, "?", [1], {}) for n in range(3)]
    full = [1.0, 0.5, 0.0, 1.0]
    answers = {
        "model": Answers([full, full, full], {}, []),
        "baseline": Answers([full, [1.0, None, 0.0, 0.0], [0.99] * 4], {}, []),
    }
    found = Measured(asked, answers, {}, context(tmp_path, config(problems=SMALL)))
    figures = found.figures()
    assert figures["problems"]["left_out"] == {"unscorable": 1} and figures["problems"]["problems"] == 2
    assert {name: group["problems"] for name, group in figures["problems"]["by_task"].items()} == {"gcd": 1, "lcm": 1}
    found.write(tmp_path)
    assert [(one["id"], one["correct"]) for one in lines(tmp_path / "problems.jsonl")] == [
        ("p0", {"model": 2, "baseline": 2}),
        ("p2", {"model": 2, "baseline": 0}),
    ]


def test_a_prompt_fits_if_the_whole_answer_does() -> None:
    tokenizer, cfg = tiny_tokenizer(), ProblemSettings(**SMALL)
    length = len(find_problems([row(0)], tokenizer, math.inf, cfg)[0][0].prompt)
    assert len(find_problems([row(0)], tokenizer, length + 6, cfg)[0]) == 1
    with pytest.raises(StageError, match="1 leave no room for 6 new tokens"):
        find_problems([row(0)], tokenizer, length + 5, cfg)


def test_answers_of_transformers_end_at_a_stop_token_and_batches_differ(folders, monkeypatch) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders["model"]).eval()
    seeds = []

    def generate(model, rows_, sampling, pad):
        seeds.append(sampling.seed)
        return [[5, sampling.stop[0], 0, 0], [5, 6, 7, 8]]

    monkeypatch.setattr(answers_module, "generate_by_transformers", generate)
    monkeypatch.setattr(answers_module, "unsupported", lambda model: "this test")
    cfg = ProblemSettings(**SMALL)
    asked = [(Problem(n, "p", None, None, "?", [1, 2], {}), 0) for n in range(2)]
    write = answers_module._writer(model, tiny_tokenizer(), [asked[0][0]], cfg, 7)
    (tokens, nll, ended), _ = write(0, asked), write(1, asked)
    assert [len(one) for one in tokens] == [2, 4] and ended == [True, False] and all(value > 0 for value in nll)
    assert len(set(seeds)) == 2
