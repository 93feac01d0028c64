"""Tokens as one self-contained HTML page: no script, no network, no font but the reader's own."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from eetrain.viewing.palette import depth_colour
from eetrain.viewing.tokens import Generation, Token, depth_shares, mean_depth, speculated

_STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1a1a1a; --line: #d0d0d0; }
@media (prefers-color-scheme: dark) { :root { --paper: #16181c; --ink: #e6e6e6; --line: #44474d; } }
body { background: var(--paper); color: var(--ink); font: 16px/1.7 system-ui, sans-serif; max-width: 60rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.2rem; } h2 { font-size: 1rem; margin-bottom: .3rem; }
.prompt, .text { white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid var(--line);
  border-radius: 6px; padding: .6rem .8rem; margin: .4rem 0; }
.prompt { opacity: .8; }
.text span { border-radius: 2px; box-shadow: inset 0 0 0 1px rgb(128 128 128 / 45%); }
.text span.silent::before { content: "\\00b7"; }
.legend { border-collapse: collapse; margin: .6rem 0; } .legend td, .legend th { padding: .1rem .8rem .1rem 0;
  text-align: right; font-variant-numeric: tabular-nums; } .legend td:first-child { padding-left: .5rem;
  padding-right: .5rem; border-radius: 3px; text-align: center; }
"""


def html_page(
    generations: Sequence[Generation], num_blocks: int, *, title: str, policy: str, seconds: float | None = None
) -> str:
    """The page: a legend, then every prompt with its text.

    Args:
        generations: what to show.
        num_blocks: of the model.
        title: of the page, such as the model's name.
        policy: that decoded them.
        seconds: that decoding took; shown as tokens per second.
    """
    tokens = [token for generation in generations for token in generation.tokens]
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}: tokens by depth</title><style>{_STYLE}</style></head><body>",
        f"<h1>{escape(title)} decoded with <code>{escape(policy)}</code></h1>",
        _summary(tokens, num_blocks, seconds),
        _legend(tokens, num_blocks),
        *(_section(generation, num_blocks) for generation in generations),
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def _summary(tokens: Sequence[Token], num_blocks: int, seconds: float | None) -> str:
    mean = mean_depth(tokens)
    facts = [f"{len(tokens)} tokens"]
    if speculated(tokens):
        facts.append(f"all of {num_blocks} blocks deep, coloured by the block that chose them first")
    elif mean is not None:
        facts.append(f"mean depth {mean:.2f} of {num_blocks} blocks")
    if seconds:
        facts.append(f"{len(tokens) / seconds:.1f} tokens/s")
    return f"<p>{', '.join(facts)}. Point at a token for its depth and id.</p>"


def _legend(tokens: Sequence[Token], num_blocks: int) -> str:
    rows = [
        f"<tr><td {_style(share.depth, num_blocks)}>{share.depth}</td><td>{share.tokens}</td>"
        f"<td>{share.share:.1%}</td></tr>"
        for share in depth_shares(tokens)
    ]
    what = "chosen after block" if speculated(tokens) else "depth"
    head = f"<tr><th>{what}</th><th>tokens</th><th>share</th></tr>"
    return f'<table class="legend">{head}{"".join(rows)}</table>'


def _section(generation: Generation, num_blocks: int) -> str:
    spans = "".join(_span(token, num_blocks) for token in generation.tokens)
    return (
        f'<section><h2>Prompt</h2><div class="prompt">{escape(generation.prompt)}</div>'
        f'<div class="text">{spans}</div></section>'
    )


def _span(token: Token, num_blocks: int) -> str:
    silent = "" if token.text else ' class="silent"'
    drafted = f", drafted after block {token.drafted_by}" if token.drafted_by else ""
    return (
        f"<span{silent} {_style(token.chosen_after, num_blocks)} "
        f'title="depth {token.depth} of {num_blocks}{drafted}, token {token.id}">{escape(token.text)}</span>'
    )


def _style(depth: int, num_blocks: int) -> str:
    colour = depth_colour(depth, num_blocks)
    return f'style="background:{colour.background};color:{colour.text}"'
