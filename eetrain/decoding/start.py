"""From a policy to a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from eetrain.decoding.exit_runner import ExitRunner
from eetrain.decoding.policies import Scheduled, parse_policy
from eetrain.decoding.policy import ExitPolicy, Policy
from eetrain.decoding.runner import Runner
from eetrain.decoding.schedule_runner import ScheduleRunner
from eetrain.decoding.speculation import Speculative
from eetrain.decoding.speculation.runner import SpeculativeRunner

if TYPE_CHECKING:
    from eetrain.exits import MultiExitModel


def start(
    model: MultiExitModel,
    policy: str | Policy,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> Runner:
    """A decoding run under a policy.

    Args:
        model: in eval mode.
        policy: or its string.
        input_ids: prompts ``[B, T]``, left-padded.
        attention_mask: ``[B, T]`` or ``None`` when nothing is padded.
        position_ids: ``[B, T]``; by default counted from each row's first real token.

    Raises:
        ConfigError: the policy does not parse or does not fit the model.
    """
    policy = parse_policy(policy)
    policy.check(model)
    if position_ids is None and attention_mask is not None:
        position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    if isinstance(policy, Scheduled):
        schedule = policy.spec.build(model.num_blocks)
        return ScheduleRunner(model, schedule, input_ids, attention_mask, position_ids)
    if isinstance(policy, Speculative):
        return SpeculativeRunner(model, policy, input_ids, attention_mask, position_ids)
    assert isinstance(policy, ExitPolicy)
    return ExitRunner(model, policy, input_ids, attention_mask, position_ids)
