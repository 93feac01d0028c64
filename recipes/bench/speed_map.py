"""A picture of a sweep: exit against draft length, one panel a batch size; colour and first line the speed-up."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure


def draw_map(rows: Sequence[dict[str, Any]], path: Path, title: str, where: str) -> Figure:
    """Write the picture as PNG.

    Args:
        rows: with batch_size, exit, draft, over_never and acceptance.
        path: of the file.
        title: what is shown.
        where: machine and versions.
    """
    batches = list(dict.fromkeys(row["batch_size"] for row in rows))
    exits = sorted({row["exit"] for row in rows})
    drafts = sorted({row["draft"] for row in rows})
    width = max(7.5, len(batches) * (1.5 + 0.95 * len(drafts)) + 1.2)
    figure = Figure(figsize=(width, 2.4 + 0.75 * len(exits)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(batches), squeeze=False, sharey=True)[0]
    reach = max(0.05, *(abs(row["over_never"] - 1) for row in rows))
    norm = TwoSlopeNorm(1.0, 1.0 - reach, 1.0 + reach)
    for panel, batch in zip(panels, batches, strict=True):
        cells = {(row["exit"], row["draft"]): row for row in rows if row["batch_size"] == batch}
        image = _panel(panel, cells, exits, drafts, norm)
        panel.set_title(f"batch {batch}", fontsize=12)
    panels[0].set_ylabel("exit after block", fontsize=12)
    figure.colorbar(image, ax=list(panels), label="times the full depth", shrink=0.9)
    figure.suptitle(f"{title}\n{where}", fontsize=10)
    figure.savefig(path, dpi=130)
    return figure


def _panel(
    panel: Any,
    cells: dict[tuple[int, int], dict[str, Any]],
    exits: Sequence[int],
    drafts: Sequence[int],
    norm: TwoSlopeNorm,
) -> Any:
    values = np.array([[cells[layer, draft]["over_never"] for draft in drafts] for layer in exits])
    image = panel.imshow(values, cmap="RdBu", norm=norm, aspect="auto", origin="lower")
    panel.set_xticks(range(len(drafts)), [str(draft) for draft in drafts], fontsize=11)
    panel.set_yticks(range(len(exits)), [str(layer) for layer in exits], fontsize=11)
    panel.set_xlabel("drafts a round", fontsize=12)
    for y, layer in enumerate(exits):
        for x, draft in enumerate(drafts):
            row = cells[layer, draft]
            accepted = "" if row["acceptance"] is None else f"\n{row['acceptance']:.0%} right"
            text = f"{row['over_never']:.2f}{accepted}"
            dark = abs(norm(row["over_never"]) - 0.5) > 0.3
            panel.text(x, y, text, ha="center", va="center", fontsize=10, color="white" if dark else "black")
    return image
