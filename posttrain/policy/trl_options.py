"""Fields of TRL's `GRPOConfig` that a stage's `trl:` section may set, and those that are the stage's own settings.

Plain names, so that a plan can refuse a typo without importing TRL; a test compares them with the installed TRL.
"""

from __future__ import annotations

FREE = frozenset(
    {
        "cache_implementation",
        "ds3_gather_for_generation",
        "entropy_coef_delta",
        "entropy_coef_max",
        "entropy_coef_min",
        "entropy_target",
        "generation_kwargs",
        "off_policy_mask_threshold",
        "repetition_penalty",
        "router_aux_loss_coef",
        "sapo_temperature_neg",
        "sapo_temperature_pos",
        "transformers_continuous_batching_config",
        "use_adaptive_entropy",
        "use_bias_correction_kl",
        "vespo_k_neg",
        "vespo_k_pos",
        "vespo_lambda_neg",
        "vespo_lambda_pos",
        "vllm_enable_sleep_mode",
        "vllm_gpu_memory_utilization",
        "vllm_group_port",
        "vllm_importance_sampling_clip_max",
        "vllm_importance_sampling_clip_min",
        "vllm_importance_sampling_correction",
        "vllm_importance_sampling_mode",
        "vllm_max_model_length",
        "vllm_model_impl",
        "vllm_server_base_url",
        "vllm_server_host",
        "vllm_server_port",
        "vllm_server_timeout",
        "vllm_structured_outputs_regex",
        "vllm_tensor_parallel_size",
    }
)
"""What `trl:` may set, verbatim."""

OWN = {
    "beta": "beta",
    "cast_lm_head_to_fp32": "",
    "chat_template_kwargs": "",
    "delta": "delta",
    "disable_dropout": "",
    "entropy_coef": "entropy_coef",
    "epsilon": "epsilon",
    "epsilon_high": "epsilon_high",
    "generation_batch_size": "generation_batch_size",
    "importance_sampling_level": "importance_sampling_level",
    "log_completions": "kept_completions",
    "log_completions_hub_repo": "",
    "log_multimodal": "",
    "log_unique_prompts": "",
    "loss_type": "loss_type",
    "mask_truncated_completions": "mask_truncated_completions",
    "max_completion_length": "max_completion_length",
    "max_tool_calling_iterations": "",
    "min_p": "min_p",
    "model_init_kwargs": "",
    "multi_objective_aggregation": "multi_objective_aggregation",
    "num_completions_to_print": "",
    "num_generations": "num_generations",
    "num_generations_eval": "",
    "num_iterations": "num_iterations",
    "pad_to_multiple_of": "",
    "ref_model_mixup_alpha": "",
    "ref_model_sync_steps": "",
    "reward_weights": "rewards.NAME.weight",
    "scale_rewards": "scale_rewards",
    "shuffle_dataset": "",
    "steps_per_generation": "updates_per_generation",
    "sync_ref_model": "",
    "temperature": "temperature",
    "top_entropy_quantile": "top_entropy_quantile",
    "top_k": "top_k",
    "top_p": "top_p",
    "trust_remote_code": "",
    "use_transformers_continuous_batching": "rollout=continuous_batching",
    "use_transformers_paged": "rollout=continuous_batching",
    "use_vllm": "rollout=vllm_colocate",
    "vllm_importance_sampling_cap": "trl.vllm_importance_sampling_clip_max",
    "vllm_mode": "rollout=vllm_server",
}
"""Fields that `trl:` may not set, and the setting that does it; empty: the stage decides."""


BY_TRL = ("transformers", "continuous_batching")
WAYS = {
    "cache_implementation": BY_TRL,
    "generation_kwargs": (*BY_TRL, "vllm_colocate", "vllm_server"),
    "repetition_penalty": (*BY_TRL, "vllm_colocate", "vllm_server"),
    "transformers_continuous_batching_config": ("continuous_batching",),
}
"""Fields that act with some values of `rollout` only; those of vLLM besides."""


def problem_of(name: str, rollout: str = "auto") -> tuple[str, str] | None:
    """What is wrong with setting that field, and what to do instead; None if `trl:` may set it."""
    if name in FREE:
        ways = ("vllm_colocate", "vllm_server") if name.startswith("vllm_") else WAYS.get(name)
        if ways is None or rollout in ways:
            return None
        return f"trl.{name} does nothing with rollout={rollout}", f"rollout={' or '.join(ways)}"
    if name in OWN:
        instead = OWN[name]
        return f"trl.{name} is decided by the stage", f"set {instead}" if instead else f"leave trl.{name} out"
    from posttrain.config.suggest import nearest

    guess = nearest(name, [*FREE, *OWN])
    return f"TRL's GRPOConfig has no {name} that a stage could pass on", f"did you mean trl.{guess}?" if guess else ""
