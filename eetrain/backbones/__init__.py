"""What is needed of any Hugging Face decoder: find its parts, harvest block arguments, run blocks i..j, project."""

from eetrain.backbones.anatomy import (
    Anatomy,
    blocks_of,
    causal_lm_of,
    decoder_of,
    dissect,
    final_norm,
    output_projection,
)
from eetrain.backbones.harvest import Harvest, Harvester, call_block
from eetrain.backbones.partial import PartialBlocks, count_zero
from eetrain.backbones.projection import Projection
from eetrain.backbones.ragged import check_ragged, narrowed, picked, ragged_masks
from eetrain.backbones.recorder import Call

__all__ = [
    "Anatomy",
    "Call",
    "Harvest",
    "Harvester",
    "PartialBlocks",
    "Projection",
    "blocks_of",
    "call_block",
    "causal_lm_of",
    "check_ragged",
    "count_zero",
    "decoder_of",
    "dissect",
    "final_norm",
    "narrowed",
    "output_projection",
    "picked",
    "ragged_masks",
]
