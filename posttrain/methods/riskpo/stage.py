"""The `riskpo` stage: `grpo` with the advantages of a risk measure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from posttrain.methods.riskpo.config import RiskpoConfig
from posttrain.methods.riskpo.presets import account
from posttrain.pipeline.stage import ArtifactMeta
from posttrain.policy.stage import PolicyStage


class Riskpo(PolicyStage):
    """Reinforcement learning with verifiable rewards that raises the lower tail of the scores."""

    type: ClassVar[str] = "riskpo"
    version: ClassVar[str] = "1"
    Config = RiskpoConfig

    def trainer(self) -> type:
        from posttrain.methods.riskpo.trainer import RiskpoTrainer

        return RiskpoTrainer

    def notes(self, cfg: RiskpoConfig, inputs: Mapping[str, ArtifactMeta]) -> tuple[str, ...]:
        said = account(cfg.preset, cfg.model_dump(mode="json"))
        if cfg.risk.level == "bundle" and cfg.risk.bundles == "random" and cfg.risk.bundle_size > 1:
            said += (
                "; with random bundles of binary rewards the risk is a function of mean accuracy alone: it sets the "
                "step's size, not which questions count (risk.bundles=stratified or risk.level=question do)"
            )
        return (*super().notes(cfg, inputs), said)
