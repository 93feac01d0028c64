"""The picture shows every interval in its lane and colour."""

from pathlib import Path
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from eetrain.planning import timeline_picture
from eetrain.planning.schedule import one_forward_one_backward
from eetrain.planning.simulation import StageTimes, Timeline, simulate
from eetrain.planning.timeline_picture import draw_timeline


def timeline(micro_batches: int = 3) -> Timeline:
    schedule = one_forward_one_backward(3, micro_batches, warmup=(1, 0, 0), cooldown=(0, 0, 1))
    return simulate(schedule, [StageTimes(1, 0.5, 2)] * 3, send_activation=0.25, send_gradient=0.25)


def drawn(shown: Timeline) -> Any:
    figure = Figure()
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    timeline_picture._draw_lanes(axes, shown, 1.0)
    return axes


def boxes(axes: Any) -> dict[str, set[tuple[int, float, float]]]:
    """Colour -> (stage, start, end) of the boxes that were drawn."""
    found: dict[str, set[tuple[int, float, float]]] = {}
    for collection in axes.collections:
        red, green, blue = (round(255 * part) for part in collection.get_facecolor()[0][:3])
        for path in collection.get_paths():
            low, high = path.vertices.min(axis=0), path.vertices.max(axis=0)
            own = (round((low[1] + high[1]) / 2), round(low[0], 6), round(high[0], 6))
            found.setdefault(f"#{red:02x}{green:02x}{blue:02x}", set()).add(own)
    return found


def test_every_interval_is_drawn_in_the_colour_of_its_kind():
    shown = timeline()
    expected: dict[str, set[tuple[int, float, float]]] = {
        timeline_picture._BUBBLE: {(stage, 0.0, shown.seconds) for stage in range(3)}
    }
    for own in shown.intervals:
        extra = own.work != "send" and own.micro_batch in (-1, 3)
        name = ("extra forward" if own.work == "forward" else "extra backward") if extra else own.work
        expected.setdefault(timeline_picture._COLOURS[name], set()).add((own.stage, own.start, own.end))
    found = boxes(drawn(shown))
    assert found == expected
    assert len(found) == 7, "five kinds of work, transfers, bubbles"


def test_boxes_have_numbers_and_extra_ones_letters():
    texts = [(text.get_text(), round(text.get_position()[1])) for text in drawn(timeline()).texts]
    # Forward and backward each; "a" on stage 0 only, "A" forward everywhere and backward on stage 2.
    expected = [(str(number), stage) for number in (1, 2, 3) for stage in range(3) for _ in range(2)]
    expected += [("a", 0), ("a", 0), ("A", 0), ("A", 1), ("A", 2), ("A", 2)]
    assert sorted(texts) == sorted(expected)
    assert len(drawn(timeline(200)).texts) == 0, "too many to be read"


@pytest.mark.parametrize(("name", "start"), [("a.png", b"\x89PNG"), ("a.svg", b"<?xml")])
def test_files(name: str, start: bytes, tmp_path: Path):
    draw_timeline(timeline(), tmp_path / name, "a title")
    data = (tmp_path / name).read_bytes()
    assert data.startswith(start)
    if name.endswith("svg"):
        for word in ("a title", "bubble", "extra micro-batch, forward", "stage 2", "time in s"):
            assert f"<!-- {word} -->" in data.decode()
