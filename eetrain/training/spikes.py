"""Running statistics of a loss, and whether its next value stands out of them. Pure arithmetic."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

DECAY = 0.98
"""Of the weights of past losses: a loss counts half as much after 34 steps."""

FLOOR = 0.01
"""Least deviation that counts, as a share of the mean: a rise of a few per cent is no spike, however quiet the loss."""

LEVEL = 10
"""So many spikes in a row are no spikes but where the loss now is."""


@dataclass
class LossWatch:
    """Mean and deviation of the losses so far, the later ones counting more, and the spikes among them.

    With decay ``b`` the ``i``-th of ``n`` losses has the weight ``w_i = (1 - b) b^(n-i) / (1 - b^n)``; they add up to 1
    from the first loss on (the bias correction of Adam, arXiv 1412.6980, section 3). Mean ``m_n = sum_i w_i x_i`` and
    variance ``s_n^2 = sum_i w_i (x_i - m_n)^2`` are kept up by (T. Finch, "Incremental calculation of weighted mean and
    variance", 2009, section 9, with a weight that changes)::

        a_n = (1 - b) / (1 - b^n)        d = x_n - m_(n-1)
        m_n = m_(n-1) + a_n d            s_n^2 = (1 - a_n) (s_(n-1)^2 + a_n d^2)

    A loss ``x > m + deviations * max(s, FLOOR |m|)`` is a spike. It is not counted in, so that it cannot hide the next
    one; only after :data:`LEVEL` in a row the statistics begin anew. A falling loss is none.

    Args:
        deviations: how far above the mean a spike is.
        after: losses that are counted in before any is called a spike.
    """

    deviations: float
    after: int
    count: int = 0
    mean: float = 0.0
    variance: float = 0.0
    in_a_row: int = 0

    @property
    def deviation(self) -> float:
        """The running deviation, at least its floor."""
        return max(math.sqrt(self.variance), FLOOR * abs(self.mean))

    @property
    def limit(self) -> float:
        """Losses above it are spikes; infinite while there are none yet."""
        return math.inf if self.count < self.after else self.mean + self.deviations * self.deviation

    def see(self, loss: float) -> bool:
        """Whether a loss is a spike; counts it in if not."""
        if loss > self.limit:
            self.in_a_row += 1
            if self.in_a_row == LEVEL:
                self.count, self.mean, self.variance, self.in_a_row = 0, 0.0, 0.0, 0
            return True
        self.in_a_row = 0
        self.count += 1
        weight = (1 - DECAY) / (1 - DECAY**self.count)
        step = loss - self.mean
        self.mean += weight * step
        self.variance = (1 - weight) * (self.variance + weight * step**2)
        return False

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, without the settings, which may be changed."""
        return {name: value for name, value in asdict(self).items() if name not in ("deviations", "after")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        for name, value in state.items():
            setattr(self, name, value)
