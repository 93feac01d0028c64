"""`eetrain evaluate`: quality, depth and speed of exit policies on prompts."""

from __future__ import annotations

from eetrain.commands.evaluate_table import show_report
from eetrain.commands.opening import as_list, open_for_decoding
from eetrain.commands.output import print_json, progress
from eetrain.commands.policies import default_policies, split_policies
from eetrain.commands.templates import chosen_template, described
from eetrain.data import Template
from eetrain.errors import ConfigError
from eetrain.evaluation import EvaluationSettings, evaluate_policies, read_samples


def evaluate(
    model: str,
    data: str | list[str] | None = None,
    template: Template | None = None,
    prompt: str | None = None,
    response: str | None = None,
    prompt_tokens: int | None = None,
    policies: str | list[str] | None = None,
    limit: int | None = None,
    batch_size: int = 1,
    max_new_tokens: int = 64,
    repeats: int = 3,
    likelihood: bool = False,
    out: str | None = None,
    json: bool = False,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
) -> int:
    r"""Measure exit policies: quality next to depth next to time, from the same generations.

    Args:
        model: folder or hub id; a model without exits is measured with the policy never.
        data: files, patterns or hub:name@config#split; rows with an equal prompt give one prompt with several
            references.
        template: how rows become prompts and responses, as for training.
        prompt: instead of a template: the prompt with {field} for fields; \n, \t, \\ are newline, tab, backslash.
        response: instead of a template: the response, likewise.
        prompt_tokens: for plain text: continue the first so many tokens of each document.
        policies: such as never,always:6,threshold:0.9 or a list; by default never, the stored one, each exit, and the
            gates or two thresholds.
        limit: use at most this many prompts.
        batch_size: prompts decoded together.
        max_new_tokens: at most so many tokens a prompt.
        repeats: timed passes, of which medians are taken, after one that is not timed; 0 measures no time.
        likelihood: also measure how likely each policy makes the first reference of a prompt, in one more pass a
            policy; always done for plain text.
        out: folder for results.json, results.csv, outputs.jsonl and frontier.png.
        json: write one JSON object.
        dtype: of the weights, auto keeps the stored one.
        device: auto, cpu, cuda, cuda:1...
        trust_remote_code: run code that comes with the checkpoint.
    """
    if data is None:
        raise ConfigError("There is no data to evaluate on.", hint="Set --data FILE.")
    if limit is not None and limit < 1:
        raise ConfigError(f"limit={limit}, must be at least 1.", hint="Leave it out for all prompts.")
    chosen = chosen_template(template, prompt, response)
    opened, encoder = open_for_decoding(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    settings = EvaluationSettings(
        tuple(split_policies(policies) or default_policies(opened)), batch_size, max_new_tokens, repeats, likelihood
    )
    config = opened.causal_lm.config.get_text_config(decoder=True)
    samples = read_samples(
        data,
        chosen,
        encoder,
        limit=limit,
        prompt_tokens=prompt_tokens,
        continuation=max_new_tokens,
        max_length=getattr(config, "max_position_embeddings", None),
    )
    with progress() as on_step:
        report = evaluate_policies(opened, encoder, samples, settings, on_step)
    report = report.with_settings(
        {
            "model": model,
            "data": as_list(data),
            "template": described(chosen),
            "prompt_tokens": prompt_tokens,
            "limit": limit,
            "prompts": len(samples),
        }
    )
    files = [str(path) for path in report.write(out)] if out is not None else []
    if json:
        print_json({**report.to_dict(), "files": files})
    else:
        show_report(report)
    return 0
