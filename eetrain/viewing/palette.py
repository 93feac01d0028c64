"""Depth as colour: the cividis ramp, which reads alike with and without red-green blindness.

Shallow tokens are bright, deep ones dark, so the order survives a print in grey. Cividis: Nuñez, Anderton and
Renslow 2018, PLOS ONE 13(7), arXiv 1712.01662; here ten of its colours, the ones between are mixed.
"""

from __future__ import annotations

from dataclasses import dataclass

_RAMP = ("fee838", "e1cc55", "c3b369", "a59c74", "8a8678", "707173", "575d6d", "3b496c", "123570", "00224e")


@dataclass(frozen=True)
class Colour:
    """A background and the text colour that is readable on it, both as ``#rrggbb``."""

    background: str
    text: str


def depth_colour(depth: int, num_blocks: int) -> Colour:
    """The colour of a token that ran ``depth`` of ``num_blocks`` blocks, ``1 <= depth <= num_blocks``."""
    assert 1 <= depth <= num_blocks
    place = (depth - 1) / max(num_blocks - 1, 1) * (len(_RAMP) - 1)
    lower = min(int(place), len(_RAMP) - 2)
    share = place - lower
    rgb = [round(a + share * (b - a)) for a, b in zip(_rgb(_RAMP[lower]), _rgb(_RAMP[lower + 1]), strict=True)]
    background = "#" + "".join(f"{channel:02x}" for channel in rgb)
    return Colour(background, max(("#000000", "#ffffff"), key=lambda text: contrast(text, background)))


def contrast(one: str, other: str) -> float:
    """Contrast of two ``#rrggbb`` colours, 1 to 21 (WCAG 2.1: text should have 4.5)."""
    light, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: str) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in _rgb(colour))]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _rgb(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour.removeprefix("#")))
