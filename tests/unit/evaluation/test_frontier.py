from pathlib import Path

import pytest
import torch
from matplotlib.image import imread

from eetrain.evaluation import FrontierPoint, draw_frontier, frontier


def coloured(path: Path, colour: tuple[float, float, float]) -> int:
    pixels = imread(path)[..., :3]
    return int((abs(pixels - torch.tensor(colour).numpy()).max(axis=-1) < 0.01).sum())


def test_frontier_gives_each_series_its_colour(tmp_path: Path) -> None:
    blue, orange = (0, 0x72 / 255, 0xB2 / 255), (0xE6 / 255, 0x9F / 255, 0)
    points = [FrontierPoint("never", 60.0, 4.0, 10.0), FrontierPoint("always:2", 50.0, 2.0, 19.0)]
    draw_frontier(
        [*points, FrontierPoint("always:3", 55.0, 3.0, 17.0)], tmp_path / "one.png", quality="BLEU", num_blocks=4
    )
    more = [*points, FrontierPoint("threshold:0.9", 58.0, 3.0, 15.0)]
    draw_frontier(more, tmp_path / "two.png", quality="BLEU", num_blocks=4)
    assert coloured(tmp_path / "one.png", blue) > 100
    assert coloured(tmp_path / "one.png", orange) == 0
    assert coloured(tmp_path / "two.png", orange) > 100


def test_frontier_series_are_policies_but_for_their_first_number() -> None:
    names = {
        FrontierPoint(policy, 1.0, 1.0, None, model).series
        for policy in ("threshold:0.5", "threshold:0.9", "threshold:0.9,repair=propagate", "always:6", "never")
        for model in ("", "tuned")
    }
    kinds = {"threshold", "threshold, propagate", "always", "never"}
    assert names == kinds | {f"tuned: {kind}" for kind in kinds}
    assert FrontierPoint("threshold:0.5,cap=3", 1.0, 1.0, None).number == "0.5"


def test_frontier_without_times_has_one_panel(tmp_path: Path) -> None:
    points = [FrontierPoint("never", 60.0, 4.0, None), FrontierPoint("always:2", 50.0, 2.0, None)]
    draw_frontier(points, tmp_path / "one.png", quality="BLEU", num_blocks=4)
    height, width, _ = imread(tmp_path / "one.png").shape
    assert (width, height) == (910, 702)


@pytest.mark.parametrize(
    ("policy", "kind", "number"),
    [
        ("never", "never", ""),
        ("always:6", "always", "6"),
        ("threshold:0.7,repair=propagate", "threshold, propagate", "0.7"),
        ("threshold:0.7,measure=margin,cap=3", "threshold, margin, cap=3", "0.7"),
        ("threshold:0.7,exits=3+6", "threshold, exits=3+6", "0.7"),
        ("skipdecode:max=9,min=3", "skipdecode max/min", "9/3"),
        ("skipdecode:speed=2,length=48,prompt=full", "skipdecode speed, length=48, full", "2"),
        ("gate:0.5,cost_weight=0.3,repair=propagate", "gate cost_weight, propagate", "0.3"),
        ("gate:0.7,cost_weight=0.3", "gate cost_weight, 0.7", "0.3"),
        ("gate:0.5", "gate", "0.5"),
        ("speculative:exit=4,draft=6", "speculative exit/draft", "4/6"),
    ],
)
def test_short_names(policy: str, kind: str, number: str) -> None:
    point = FrontierPoint(policy, 1.0, 1.0, None)
    assert (point.kind, point.number) == (kind, number)


FOUR_BY_SIX = [
    FrontierPoint(policy, 60.0 - 3 * place + model, 12.0 - place, 90.0 + 9 * place, f"m{model}", low, low + 2)
    for model in range(4)
    for place, policy in enumerate(
        [
            "never",
            "always:6",
            "threshold:0.7",
            "threshold:0.9",
            "threshold:0.7,repair=propagate",
            "skipdecode:max=9,min=3",
        ]
    )
    for low in [59.0 - 3 * place + model]
]


def test_legend_of_several_models_is_their_sum_with_kinds_and_not_the_product() -> None:
    styles = frontier._styles(FOUR_BY_SIX, several=True)
    assert len(styles) == 4 * 5, "two thresholds are one series"
    assert len(set(styles.values())) == 4 * 5, "no two series look alike"
    labels = [handle.get_label() for handle in frontier._legend(FOUR_BY_SIX, styles, several=True)]
    kinds = ["never", "always", "threshold", "threshold, propagate", "skipdecode max/min"]
    assert labels == ["m0", "m1", "m2", "m3", *kinds]
    assert len({styles[f"m{model}: always"][0] for model in range(4)}) == 4
    assert len({styles[f"m2: {kind}"][1] for kind in kinds}) == 5


def axes_of(points: list[FrontierPoint], path: Path, monkeypatch: pytest.MonkeyPatch, **options: bool) -> list:
    drawn = []
    place = frontier.place_numbers
    monkeypatch.setattr(frontier, "place_numbers", lambda axes, renderer: (drawn.append(axes), place(axes, renderer)))
    draw_frontier(points, path, quality="nats", num_blocks=None, **options)
    return drawn


def test_whiskers_span_the_intervals_in_both_panels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for axes in axes_of(FOUR_BY_SIX, tmp_path / "a.png", monkeypatch):
        spans = [tuple(line.get_ydata()) for line in axes.lines if line.get_alpha() == 0.35]
        assert sorted(spans) == sorted((point.low, point.high) for point in FOUR_BY_SIX)


def test_less_is_better_turns_the_axis_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = [FrontierPoint("never", 1.0, 4.0, 10.0), FrontierPoint("always:2", 2.0, 2.0, 19.0)]
    for turned in (False, True):
        for axes in axes_of(points, tmp_path / "a.png", monkeypatch, lower_is_better=turned):
            bottom, top = axes.get_ylim()
            assert bool(bottom > top) is turned
    assert axes.figure.axes[0].get_ylabel() == "nats (less is better)"
    assert axes.figure.axes[0].get_xlabel() == "blocks per token, repair included", "models of several depths"


def test_numbers_of_four_models_do_not_cover_one_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for axes in axes_of(FOUR_BY_SIX, tmp_path / "a.png", monkeypatch):
        renderer = axes.figure.canvas.get_renderer()
        boxes = [text.get_window_extent(renderer) for text in axes.texts if text.get_text()]
        assert len(boxes) == 20
        covered = sum(one.overlaps(other) for place, one in enumerate(boxes) for other in boxes[:place])
        assert covered <= 2
