"""The model card: what the checkpoint is, how to open it, and the measured quality and speed if there are any."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import __version__ as transformers_version

if TYPE_CHECKING:
    from eetrain.exits import MultiExitModel

_USE = """```python
from transformers import AutoModelForCausalLM

plain = AutoModelForCausalLM.from_pretrained(FOLDER)  # the full-depth model, without eetrain

from eetrain import MultiExitModel

model = MultiExitModel.from_pretrained(FOLDER)
model.generate(**inputs, max_new_tokens=64, exit_policy="{policy}")
```"""


def model_card(model: MultiExitModel, exit_policy: str | None, results: list[dict[str, Any]] | None) -> str:
    """The text of the folder's ``README.md``.

    Args:
        model: whose parts are described.
        exit_policy: the default policy, if one is stored.
        results: one row per policy, from ``eetrain evaluate``.
    """
    kind = model.causal_lm.config.model_type
    layers = ", ".join(map(str, model.exit_layers)) or "none"
    heads = sum(parameter.numel() for parameter in model.exits.parameters())
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [early-exit, eetrain]",
        "---",
        "",
        f"# A {kind} decoder with early exits",
        "",
        "| | |",
        "|---|---|",
        f"| blocks | {model.num_blocks} |",
        f"| exits after blocks | {layers} |",
        f"| heads | `{model.config.head}`, output matrix {model.config.output}, {heads:,} parameters |",
        f"| default policy | `{exit_policy or 'never'}` |",
        f"| written with | transformers {transformers_version} |",
        "",
        "Policies other than `never` change the output: they are lossy unless they say otherwise.",
        "",
        *_trained_for(model, exit_policy),
        _USE.replace("{policy}", exit_policy or ("threshold:0.9" if model.exit_layers else "never")),
        "",
    ]
    if results:
        lines += ["## Measured", "", *_table(results), ""]
    return "\n".join(lines)


def _trained_for(model: MultiExitModel, exit_policy: str | None) -> list[str]:
    if exit_policy is None or model.exit_layers:
        return []
    return [
        f"The weights were trained to decode under `{exit_policy}`. At full depth, as the plain model runs them, they "
        "may be worse than what they were trained from.",
        "",
    ]


def _table(results: list[dict[str, Any]]) -> list[str]:
    columns = list(results[0])
    rows = [[_shown(row.get(column)) for column in columns] for row in results]
    head = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    return head + [f"| {' | '.join(row)} |" for row in rows]


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
