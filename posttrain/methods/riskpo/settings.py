"""Settings of the risk estimator: which measure, of which scores, and how an answer gets its share."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Risk = Literal["mvar", "cvar", "entropic", "pass_at_k", "mean"]
Strategy = Literal["random", "stratified", "anti_stratified"]
Credit = Literal["rb", "shared", "sum_mean", "std", "uniform", "score"]
Baseline = Literal["natural", "copy_mean", "none"]
QuantileSource = Literal["ema_hist", "tracked", "bundle", "batch"]
Scale = Literal["none", "group_std", "bundle_std", "batch_std", "quantile_range"]


class RiskSettings(BaseModel):
    """What the advantages of a batch of rewards `[questions, generations]` are computed from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    risk: Risk = Field(
        "mvar",
        description="Measure that is raised. mvar: (1 + omega) times the integral of the quantiles up to alpha, plus "
        "that from alpha to beta. cvar: mean of the lowest share alpha. entropic: -log E exp(-t R) / t, t being "
        "temperature. pass_at_k: chance that one of k answers is right; level=question and rewards 0 and 1 only. mean: "
        "the mean reward, no risk.",
    )
    alpha: float = Field(
        0.2, ge=0, lt=1, description="Share of lowest scores that count 1 + omega times; of risk=cvar the only ones."
    )
    beta: float = Field(
        0.8,
        gt=0,
        le=1,
        description="Share of lowest scores that count at all: better ones give 0. Where that share of the scores is "
        "the worst possible one nothing has a gradient: at 0.8 with five questions a bundle, below 4.4 % right.",
    )
    omega: float = Field(
        0.5,
        ge=0,
        description="Extra weight of the lowest share alpha. The released code's w_mix is another weight: 1 + omega = "
        "w_mix (beta - alpha) / alpha.",
    )
    temperature: float = Field(
        1.0, gt=0, description="t of risk=entropic, per unit of score: larger looks more at the worst scores."
    )
    k: int = Field(4, ge=1, description="Answers of which one must be right; for risk=pass_at_k, at most generations.")
    level: Literal["bundle", "question"] = Field(
        "bundle",
        description="What the risk is taken over. bundle: sums of bundle_size rewards of different questions. "
        "question: the questions' mean rewards, which needs no bundles and weighs hard questions more. With binary "
        "rewards and bundles=random, bundle is a step size times the mean reward's gradient.",
    )
    bundle_size: int = Field(5, ge=1, description="Questions of a bundle; the questions of a batch are a multiple.")
    bundles: Strategy = Field(
        "random",
        description="Which questions share a bundle. stratified: those of like difficulty, which makes the hard ones "
        "weigh more. anti_stratified: every bundle spans the difficulties, which makes the easy ones weigh more.",
    )
    credit: Credit = Field(
        "rb",
        description="Share of an answer in its bundle's score phi. rb: expectation of phi over the other questions' "
        "answers, less its mean over the question's other answers; same gradient as shared on average, less noise. "
        "shared: phi itself (the paper); uniform: the released code's name of it. sum_mean: phi times the answer's "
        "part in the sum of centred rewards. std: phi over the question's standard deviation. score: half of phi if "
        "the reward is positive, else 1.5 of it. The last three are the released code's and no gradient of anything.",
    )
    baseline: Baseline = Field(
        "natural",
        description="Constant in phi. natural: phi <= 0, and 0 from the upper quantile on. none: 0 at the lower "
        "quantile. copy_mean: mean phi of the bundle's copies is taken off. credit=rb has a baseline of its own, in "
        "which this one cancels.",
    )
    quantile_source: QuantileSource = Field(
        "ema_hist",
        description="Where the quantiles at alpha and beta come from. ema_hist: decayed histogram of the scores of "
        "earlier steps. tracked: stochastic approximation at 19 levels over earlier steps (the paper). batch: scores "
        "of this batch. bundle: the few copies of each bundle alone (what the released code does).",
    )
    quantile_lr: float = Field(0.1, gt=0, description="Step of quantile_source=tracked, in units of the score.")
    hist_decay: float = Field(
        0.9, ge=0, lt=1, description="Weight that a step of quantile_source=ema_hist keeps at each further one."
    )
    scale: Scale = Field(
        "none",
        description="Divisor of the advantages. group_std: standard deviation of the question's rewards + 1e-4 "
        "(GRPO). bundle_std: of the bundle's copies + 1e-6 (the released code). batch_std: of all scores of the batch. "
        "quantile_range: from the lower to the upper quantile. The last two leave the advantages alone where 0.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        for wrong, sentence in (*self._measure_faults(), *self._scale_faults(), *self._question_faults()):
            if wrong:
                raise ValueError(sentence)
        return self

    def _measure_faults(self) -> tuple[tuple[bool, str], ...]:
        return (
            (self.alpha >= self.beta, f"alpha={self.alpha} is not below beta={self.beta}"),
            (
                self.risk == "cvar" and self.alpha == 0,
                "risk=cvar is the mean of a share alpha of the scores: alpha > 0",
            ),
            (
                self.risk == "pass_at_k" and self.level == "bundle",
                "risk=pass_at_k is about the answers of one question: set level=question",
            ),
            (
                self.baseline == "none" and self.risk != "mvar",
                f"baseline=none is a variant of risk=mvar: risk={self.risk} has natural and copy_mean",
            ),
        )

    def _scale_faults(self) -> tuple[tuple[bool, str], ...]:
        centred = self.level == "question" or self.credit == "rb"
        alone = self.bundle_size == 1 and self.credit in ("shared", "uniform") and self.baseline == "copy_mean"
        return (
            (
                self.scale == "bundle_std" and (self.quantile_source != "bundle" or self.credit == "rb"),
                "scale=bundle_std divides by about 0 where all copies of a bundle are equal, which only "
                "quantile_source=bundle without credit=rb answers with 0: set those, or another scale",
            ),
            (
                self.scale == "group_std" and not centred and not alone,
                "scale=group_std divides by about 0 for a question whose answers are all equal: it needs credit=rb, "
                "level=question, or bundle_size=1 with credit=shared and baseline=copy_mean",
            ),
            (
                self.scale == "quantile_range" and self.risk != "mvar",
                f"scale=quantile_range is of risk=mvar: risk={self.risk} has no two quantiles",
            ),
        )

    def _question_faults(self) -> tuple[tuple[bool, str], ...]:
        question = self.level == "question"
        return (
            (question and self.credit != "rb", f"level=question has no bundle to share: credit={self.credit} is none"),
            (question and self.bundles != "random", f"level=question has no bundles: leave out bundles={self.bundles}"),
            (
                question and self.quantile_source == "bundle",
                "level=question has no bundles: quantile_source is ema_hist, tracked or batch",
            ),
        )
