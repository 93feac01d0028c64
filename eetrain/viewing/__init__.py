"""Generated text with the depth of every token: in the terminal and as a page."""

from eetrain.viewing.detokenize import Detokenizer, decoded_text, token_texts
from eetrain.viewing.html import html_page
from eetrain.viewing.palette import Colour, depth_colour
from eetrain.viewing.streaming import DepthStreamer
from eetrain.viewing.terminal import legend, render_tokens, visible
from eetrain.viewing.tokens import DepthShare, Generation, Token, depth_shares, mean_depth

__all__ = [
    "Colour",
    "DepthShare",
    "DepthStreamer",
    "Detokenizer",
    "Generation",
    "Token",
    "decoded_text",
    "depth_colour",
    "depth_shares",
    "html_page",
    "legend",
    "mean_depth",
    "render_tokens",
    "token_texts",
    "visible",
]
