"""What the losses of a run say about its health, in a sentence with a cure."""

import statistics
from collections import deque
from collections.abc import Iterable

SPIKE = 2.0  # times the median of the records before
DEAD = 0.98  # of the loss at the start: above it nothing has been learned
FIRST, RECENT = 5, 20  # records that stand for the start and for now


class LossWatch:
    """Warns of a loss that jumps, and, once, of one that never leaves its start value.

    Args:
        losses: of the records that a continued run has written before.
    """

    def __init__(self, losses: Iterable[float] = ()):
        self.first: list[float] = []
        self.recent: deque[float] = deque(maxlen=RECENT)
        self.said_dead = False
        for loss in losses:
            self.warnings(loss)

    def warnings(self, loss: float) -> list[str]:
        """Take the loss of the next record; the sentences that it calls for."""
        found = []
        if len(self.recent) >= RECENT // 2:
            usual = statistics.median(self.recent)
            if loss > SPIKE * usual:
                found.append(
                    f"loss {loss:.4g} is {loss / usual:.1f} times what was usual before; if it "
                    "stays there, continue from an earlier checkpoint with a lower "
                    "train.learning_rate"
                )
        if len(self.first) < FIRST:
            self.first.append(loss)
        self.recent.append(loss)
        if len(self.recent) == RECENT and not self.said_dead:
            start, now = statistics.fmean(self.first), statistics.fmean(self.recent)
            if now > DEAD * start:
                self.said_dead = True
                found.append(
                    f"loss {now:.4g} is still where it began ({start:.4g}): nothing is learned; "
                    "look at the originals in samples/ and at train.learning_rate"
                )
        return found
