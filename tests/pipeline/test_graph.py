from __future__ import annotations

import pytest
from toy_stages import ToyEvaluateConfig, ToySourceConfig, ToyTrainConfig

from posttrain.config import registry
from posttrain.errors import RecipeError
from posttrain.pipeline.graph import Graph, check_references


def stages(**configs):
    return {name: (registry.stage(cfg.type), cfg) for name, cfg in configs.items()}


def chain(**changes):
    configs = {
        "data": ToySourceConfig(),
        "train": ToyTrainConfig(inputs={"data": "data.train"}),
        "evaluate": ToyEvaluateConfig(inputs={"history": "train.history", "data": "data.heldout"}),
    }
    return stages(**{**configs, **changes})


def only_problem(found):
    problems = check_references(found)
    assert len(problems) == 1, problems
    return problems[0]


def test_a_good_chain_has_no_problems():
    assert check_references(chain()) == []
    assert Graph(chain()).order == ["data", "train", "evaluate"]


def test_misspelt_stage_names_the_nearest_reference():
    problem = only_problem(chain(evaluate=ToyEvaluateConfig(inputs={"history": "trian.history", "data": "data.train"})))
    assert "trian.history" in problem.what
    assert problem.where == "stages.evaluate.inputs.history"
    assert problem.fix == "write stages.evaluate.inputs.history=train.history"


def test_misspelt_split_and_output():
    problem = only_problem(chain(train=ToyTrainConfig(inputs={"data": "data.trian"})))
    assert "no output 'trian'" in problem.what and problem.fix.endswith("=data.train")


def test_data_without_split_names_both():
    assert only_problem(chain(train=ToyTrainConfig(inputs={"data": "data"}))).fix.endswith("data.train|data.heldout")


def test_bare_stage_means_its_only_output():
    found = chain(evaluate=ToyEvaluateConfig(inputs={"history": "train", "data": "data.heldout"}))
    assert check_references(found) == []
    assert Graph(found).edges["evaluate"]["history"].output == "history"


def test_missing_unknown_and_wrong_typed_inputs_are_reported_together():
    found = chain(evaluate=ToyEvaluateConfig(inputs={"histroy": "train.history", "data": "train.history"}))
    text = "\n".join(map(str, check_references(found)))
    assert "no input 'histroy'" in text and "write stages.evaluate.inputs.history" in text
    assert "'train.history' is a history, but input data of stage evaluate takes a dataset" in text
    assert "lacks its input 'history'" in text


def test_wrong_type_of_one_output_offers_fitting_references():
    problem = only_problem(chain(evaluate=ToyEvaluateConfig(inputs={"history": "data.train", "data": "data.train"})))
    assert problem.fix == "write stages.evaluate.inputs.history=train.history"


def test_cycle_names_its_members():
    found = chain(
        train=ToyTrainConfig(inputs={"data": "data.train", "before": "again.history"}),
        again=ToyTrainConfig(inputs={"data": "data.train", "before": "train.history"}),
    )
    problem = only_problem(found)
    assert "train" in problem.what and "again" in problem.what and problem.what.count("→") == 2
    with pytest.raises(RecipeError):
        Graph(found)


def test_stage_that_feeds_itself_is_a_cycle():
    found = chain(train=ToyTrainConfig(inputs={"data": "data.train", "before": "train.history"}))
    assert "train → train" in only_problem(found).what


def test_unused_sources_are_pruned_and_used_ones_kept():
    found = stages(**{"datasets.more": ToySourceConfig(), "data": ToySourceConfig()}) | chain()
    assert Graph(found).order == ["data", "train", "evaluate"]
    found = chain(train=ToyTrainConfig(inputs={"data": "datasets.more.train"})) | stages(
        **{"datasets.more": ToySourceConfig()}
    )
    assert "datasets.more" in Graph(found).order


def test_order_is_topological_and_otherwise_as_declared():
    late = {"first": ToyTrainConfig(inputs={"data": "data.train", "before": "second.history"})}
    late |= {name: ToyTrainConfig(inputs={"data": "data.train"}) for name in ("third", "second")}
    assert Graph(stages(**late, data=ToySourceConfig())).order == ["data", "third", "second", "first"]


def test_selections():
    graph = Graph(chain(other=ToyTrainConfig(inputs={"data": "data.train"})))
    assert graph.select() == {"data", "train", "evaluate", "other"}
    assert graph.select(from_="train") == {"train", "evaluate"}
    assert graph.select(until="train") == {"data", "train"}
    assert graph.select(from_="train", until="evaluate") == {"train", "evaluate"}
    assert graph.select(only="other") == {"other"}
    for wrong in ({"only": "trian"}, {"from_": "other", "until": "evaluate"}, {"only": "train", "until": "train"}):
        with pytest.raises(RecipeError):
            graph.select(**wrong)
    with pytest.raises(RecipeError, match="--only train"):
        graph.select(only="trian")
