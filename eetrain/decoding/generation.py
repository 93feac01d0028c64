"""`model.generate`: transformers prepares and checks everything around the loop, eetrain runs the loop."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import MaxLengthCriteria, StoppingCriteriaList, StopStringCriteria

from eetrain.decoding.loop import EarlyExitOutput, decode
from eetrain.decoding.policies import Never, parse_policy
from eetrain.decoding.policy import Policy
from eetrain.decoding.runner import StepRunner
from eetrain.decoding.speculation.loop import decode_speculatively
from eetrain.decoding.speculation.runner import SpeculativeRunner
from eetrain.decoding.start import start
from eetrain.errors import ConfigError, UnsupportedModelError

if TYPE_CHECKING:
    from eetrain.exits import MultiExitModel

_REFUSED_ARGUMENTS = {
    "assistant_model": "speculation with a second model",
    "past_key_values": "starting from a cache of somebody else's",
    "inputs_embeds": "prompts given as embeddings",
    "negative_prompt_ids": "classifier-free guidance",
    "custom_generate": "another generation loop",
}
_REFUSED_SETTINGS: dict[str, tuple[tuple[Any, ...], str]] = {
    "num_beams": ((None, 1), "beam search would have to reorder rows whose depths differ"),
    "penalty_alpha": ((None, 0), "contrastive search compares hidden states of the full depth"),
    "dola_layers": ((None,), "DoLa contrasts layers that an early token does not run"),
    "assistant_early_exit": ((None,), "it drafts with transformers' own loop"),
    "prompt_lookup_num_tokens": ((None,), "it verifies with transformers' own loop"),
    "prefill_chunk_size": ((None,), "the prompt is run in one piece"),
    "cache_implementation": (
        (None, "dynamic", "hybrid"),
        "eetrain keeps a cache of its own, with ragged lengths",
    ),
    "use_cache": ((None, True), "the loop is built on the cache"),
    "output_attentions": ((None, False), "rows run different blocks"),
    "output_hidden_states": ((None, False), "rows run different blocks"),
}


def generate(
    model: MultiExitModel,
    inputs: Tensor | None = None,
    *,
    exit_policy: str | Policy | None = None,
    streamer: Any = None,
    tokenizer: Any = None,
    **kwargs: Any,
) -> Tensor | EarlyExitOutput:
    """See :meth:`eetrain.exits.MultiExitModel.generate`."""
    lm = model.causal_lm
    policy = _policy(model, exit_policy, kwargs.get("generation_config"))
    _refuse(lm.generation_config, kwargs)
    _check_cacheable(model)
    _check_prompt(lm, kwargs.get("input_ids") if inputs is None else inputs)
    kwargs["stopping_criteria"] = _stopping(lm, kwargs, tokenizer)

    def loop(
        lm: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Tensor | EarlyExitOutput:
        _stop_at_positions(lm, stopping_criteria)
        mask, positions = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
        runner = start(model, policy, input_ids, mask, positions)
        if isinstance(runner, SpeculativeRunner):
            return decode_speculatively(
                runner, input_ids, logits_processor, stopping_criteria, generation_config, streamer
            )
        assert isinstance(runner, StepRunner)
        return decode(runner, input_ids, logits_processor, stopping_criteria, generation_config, streamer)

    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            # transformers drops the streamer on its way to a custom loop, so the loop holds it as well.
            result: Tensor | EarlyExitOutput = lm.generate(inputs, custom_generate=loop, streamer=streamer, **kwargs)
    finally:
        # One by one: a frozen backbone may have been in eval mode while its exits were training.
        for module, training in modes:
            module.training = training
    return result


def _policy(model: MultiExitModel, exit_policy: str | Policy | None, given: Any) -> Policy:
    """The policy asked for, else the one in the generation config given, else the one stored with the model."""
    stored = (getattr(config, "exit_policy", None) for config in (given, model.causal_lm.generation_config))
    policy = parse_policy(exit_policy or next(filter(None, stored), Never()))
    policy.check(model)
    return policy


def _refuse(defaults: Any, kwargs: dict[str, Any]) -> None:
    for name, what in _REFUSED_ARGUMENTS.items():
        if kwargs.get(name) is not None:
            raise ConfigError(
                f"generate({name}=...) is not supported with exits: {what}.",
                hint="model.causal_lm.generate runs the plain model with all of transformers' modes.",
            )
    given = kwargs.get("generation_config")
    # Stored with a checkpoint use_cache=False is a habit of training, not a wish: tokens are the same either way.
    settings = {name: kwargs.get(name, getattr(given or defaults, name, None)) for name in _REFUSED_SETTINGS}
    settings["use_cache"] = kwargs.get("use_cache", getattr(given, "use_cache", None))
    for name, value in settings.items():
        allowed, why = _REFUSED_SETTINGS[name]
        if value not in allowed:
            raise ConfigError(
                f"generate({name}={value!r}) is not supported with exits: {why}.",
                hint="Greedy search and sampling are; model.causal_lm.generate has the other modes.",
            )


def _check_cacheable(model: MultiExitModel) -> None:
    config = model.causal_lm.config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    unknown = kinds - {"full_attention", "sliding_attention"}
    if unknown or not model.anatomy.takes_cache:
        found = ", ".join(sorted(unknown)) or "no key/value cache"
        raise UnsupportedModelError(
            f"Decoding with exits needs attention blocks with a key/value cache; this backbone has {found}.",
            hint="model.causal_lm.generate decodes at full depth.",
        )


def _stopping(lm: Any, kwargs: dict[str, Any], tokenizer: Any) -> StoppingCriteriaList:
    """The user's criteria, and stop strings, whose tokenizer transformers drops on its way to a custom loop."""
    criteria = StoppingCriteriaList(kwargs.pop("stopping_criteria", None) or [])
    strings = kwargs.pop("stop_strings", None)
    for config in (kwargs.get("generation_config"), lm.generation_config):
        stored = getattr(config, "stop_strings", None)
        if stored is not None:
            raise ConfigError(
                f"stop_strings={stored!r} stand in a generation config, which has no tokenizer.",
                hint="Take them out of it and pass generate(..., stop_strings=[...], tokenizer=tokenizer).",
            )
    if strings is not None:
        if tokenizer is None:
            raise ConfigError(
                f"stop_strings={strings!r} needs a tokenizer.",
                hint="Pass generate(..., tokenizer=tokenizer).",
            )
        criteria.append(StopStringCriteria(stop_strings=strings, tokenizer=tokenizer))
    return criteria


def _positions(lm: Any) -> int | None:
    limit: int | None = getattr(lm.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return limit


def _check_prompt(lm: Any, prompt: Tensor | None) -> None:
    limit = _positions(lm)
    if prompt is not None and limit is not None and prompt.shape[-1] >= limit:
        raise ConfigError(
            f"The prompt has {prompt.shape[-1]} tokens, but the model has {limit} positions.",
            hint="Shorten the prompt, or use a model with a longer context.",
        )


def _stop_at_positions(lm: Any, stopping_criteria: StoppingCriteriaList) -> None:
    """Stop where the model's positions end, with a warning if more was asked for."""
    limit, asked = _positions(lm), stopping_criteria.max_length
    if limit is not None and asked is not None and asked > limit:
        warnings.warn(f"{asked} tokens asked for, the model has {limit} positions: stopping there.", stacklevel=2)
        stopping_criteria.append(MaxLengthCriteria(max_length=limit))
