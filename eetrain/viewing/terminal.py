"""Tokens as coloured terminal text."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

from eetrain.viewing.palette import depth_colour
from eetrain.viewing.tokens import Token, depth_shares, mean_depth, speculated

_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}
_C1 = dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


def visible(text: str) -> str:
    """Replace control characters: text of a model must not move the cursor or set the title of a terminal."""
    return text.translate(_PICTURES | _C1)


def render_tokens(tokens: Sequence[Token], num_blocks: int) -> Text:
    """The text, every token on the colour of the block that chose it."""
    rendered = Text()
    for token in tokens:
        colour = depth_colour(token.chosen_after, num_blocks)
        rendered.append(visible(token.text), style=f"{colour.text} on {colour.background}")
    return rendered


def legend(tokens: Sequence[Token], num_blocks: int, seconds: float) -> Text:
    """Depth -> share of tokens, mean depth and speed, on one line.

    Args:
        tokens: of all rows.
        num_blocks: of the model.
        seconds: that decoding them took.
    """
    drafts = speculated(tokens)
    line = Text("chosen after block " if drafts else "depth ")
    for share in depth_shares(tokens):
        colour = depth_colour(share.depth, num_blocks)
        line.append(f" {share.depth} ", style=f"{colour.text} on {colour.background}")
        line.append(f" {share.share:.0%}  ")
    mean = mean_depth(tokens)
    if mean is not None and not drafts:
        line.append(f"mean {mean:.2f} of {num_blocks}  ")
    line.append(f"{len(tokens)} tokens, {len(tokens) / seconds:.1f} tokens/s")
    return line
