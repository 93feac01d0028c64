"""Depth fixed in advance: which blocks each position of a text runs, as pure arithmetic."""

from eetrain.schedules.schedule import FOREVER, PROMPT, BlockSchedule
from eetrain.schedules.specs import D3, HSD, SCHEDULES, ScheduleSpec, SkipDecode, Static, Unified, parse_schedule

__all__ = [
    "D3",
    "FOREVER",
    "HSD",
    "PROMPT",
    "SCHEDULES",
    "BlockSchedule",
    "ScheduleSpec",
    "SkipDecode",
    "Static",
    "Unified",
    "parse_schedule",
]
