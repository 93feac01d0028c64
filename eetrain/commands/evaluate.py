"""`eetrain evaluate`: quality, depth and speed of exit policies on prompts."""

from __future__ import annotations

from typing import Any

from eetrain.commands.evaluate_table import show_report
from eetrain.commands.opening import as_list, open_for_decoding, unescaped
from eetrain.commands.output import print_json, progress
from eetrain.data import PromptResponse, Template, Text
from eetrain.data.templates import FieldText
from eetrain.errors import ConfigError
from eetrain.evaluation import EvaluationSettings, evaluate_policies, read_samples
from eetrain.exits import MultiExitModel


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
        policies: such as never,always:6,threshold:0.9 or a list; by default never, each exit, threshold:0.7 and 0.9.
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
    chosen = _template(template, prompt, response)
    opened, encoder = open_for_decoding(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    settings = EvaluationSettings(
        tuple(split_policies(policies) or _default_policies(opened)), batch_size, max_new_tokens, repeats, likelihood
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
            "template": _described(chosen),
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


def split_policies(policies: str | list[str] | None) -> list[str]:
    """Policies of a list, or of one string whose commas also separate options.

    A part that reads ``name=value`` belongs to the policy before it; anything else begins a policy.

    Example:
        >>> split_policies("never,threshold:0.9,measure=margin,always:6")
        ['never', 'threshold:0.9,measure=margin', 'always:6']
    """
    found: list[str] = []
    for text in as_list(policies):
        for part in text.split(","):
            option = "=" in part and ":" not in part.partition("=")[0]
            if option and found:
                found[-1] += f",{part}"
            else:
                found.append(part.strip())
    return found


def _default_policies(model: MultiExitModel) -> list[str]:
    inner = [layer for layer in model.exit_layers if layer < model.num_blocks]
    if not inner:
        return ["never"]
    return ["never", *(f"always:{layer}" for layer in inner), "threshold:0.7", "threshold:0.9"]


def _template(template: Template | None, prompt: str | None, response: str | None) -> Template:
    if prompt is None and response is None:
        return Text() if template is None else template
    if template is not None:
        raise ConfigError(
            "Both a template and --prompt or --response are set.", hint="Use one way to say what a row becomes."
        )
    if prompt is None or response is None:
        missing = "prompt" if prompt is None else "response"
        raise ConfigError(
            f"--{missing} is missing.", hint="Give both, for example --prompt '{question}\\n' --response '{answer}'."
        )
    return PromptResponse(unescaped(prompt), unescaped(response))


def _described(template: Template) -> dict[str, Any]:
    kind = type(template)
    settings: dict[str, Any] = {}
    for name, value in vars(template).items():
        if isinstance(value, FieldText):
            settings[name] = _spelled(value)
        elif value is None or isinstance(value, str | int | float):
            settings[name] = value
    return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": settings}


def _spelled(text: FieldText) -> str:
    """As it is written in a template."""
    parts = [
        literal.replace("{", "{{").replace("}", "}}") + ("" if field is None else f"{{{field}}}")
        for literal, field in text.parts
    ]
    return "".join(parts)
