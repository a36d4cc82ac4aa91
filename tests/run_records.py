"""Records of steps and evaluations as a run makes them, for tests of what is done with them."""

from __future__ import annotations

from trainer.metrics import Evaluation, StepMetrics
from trainer.phases import Phase

METRICS = StepMetrics(
    step=1,
    policy_version=1,
    rollouts=4,
    groups=2,
    zero_variance_groups=1,
    dropped_rollouts=2,
    reward_mean=0.5,
    reward_std=0.5,
    reward_min=0.0,
    reward_max=1.0,
    response_tokens_mean=3.0,
    response_tokens_max=4,
    turns_mean=1.5,
    staleness_mean=0.25,
    staleness_max=1,
    tokens_sampled=12,
    tokens_trained=10,
    tokens_left_out=2,
    tokens_dropped=5,
    updates=1,
    loss=0.125,
    grad_norm=1.0,
    learning_rate=1e-6,
    entropy=1.5,
    clipped_low_share=0.0,
    clipped_high_share=0.1,
    masked_share=0.0,
    kl_reference=None,
    kl_with_replay=1e-4,
    kl_without_replay=1e-3,
    extreme_share_with_replay=0.0,
    extreme_share_without_replay=0.01,
    rows_total=22,
    rows_replayed=20,
    rows_verified=20,
    rows_fallback=2,
    rows_compared=20,
    rows_flipped=3,
    rows_verified_share=1.0,
    rows_fallback_share=2 / 22,
    rows_flipped_share=3 / 20,
    tokens_per_second=100.0,
    peak_rss_bytes=2**30,
    peak_device_bytes=None,
    seconds={phase.value: 0.5 for phase in Phase},
    dropped_by={"stale": 2},
    shares={"dual_clipped": 0.01},
)
"""A step in which everything was measured but what needs a reference policy or an accelerator."""

EVALUATION = Evaluation(
    policy_version=0,
    num_tasks=5,
    num_failed=0,
    reward_mean=0.4,
    tokens_sampled=100,
    reward_low=0.2,
    reward_high=0.6,
    figures={"truncated_share": 0.2},
)
