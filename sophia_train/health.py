"""What a run's metrics say about the health of its Hessian, in plain words."""

from collections.abc import Iterator, Mapping

LEAST_UNCLIPPED, MOST_UNCLIPPED = 0.03, 0.98
MOST_NEGATIVE = 0.5
LATE_INTERVALS = 3
SETTLING_REFRESHES = 10


class HealthMonitor:
    """Turns metrics into warnings, each one once until what it is about has passed.

    Args:
        interval: steps between refreshes of h; None for a run that has no Hessian, and nothing to warn of.
    """

    def __init__(self, interval: int | None) -> None:
        self.interval = interval
        self._standing: set[str] = set()

    def warnings(self, metrics: Mapping[str, float], step: int) -> list[str]:
        """What is new since the last call, in words: the finding, what it means, what to do.

        Args:
            metrics: of the trainer, by name.
            step: completed steps.
        """
        if self.interval is None:
            return []
        found = dict(self._findings(metrics, step, self.interval))
        new = [text for kind, text in found.items() if kind not in self._standing]
        self._standing = set(found)
        return new

    def _findings(self, metrics: Mapping[str, float], step: int, interval: int) -> Iterator[tuple[str, str]]:
        unclipped = metrics.get("optim/unclipped_fraction")
        if unclipped is not None and step > SETTLING_REFRESHES * interval:  # h starts at 0
            without_gradient = metrics.get("optim/hessian_zero_fraction", 0.0)  # so far: words not seen
            if unclipped - without_gradient < LEAST_UNCLIPPED:
                yield (
                    "clipped",
                    f"{1 - unclipped:.0%} of coordinates are clipped: this is sign momentum; "
                    "raise optimizer.gamma, or use gamma=auto",
                )
            elif unclipped > MOST_UNCLIPPED:
                yield (
                    "unclipped",
                    f"only {1 - unclipped:.0%} of coordinates are clipped: noise in h sets the steps; "
                    "lower optimizer.gamma, or use gamma=auto",
                )
        negative = metrics.get("optim/hessian_negative_fraction", 0.0)
        if negative > MOST_NEGATIVE:
            yield (
                "negative",
                f"{negative:.0%} of h is negative, and those coordinates take signed steps; "
                "use a larger hessian.batch_size, or hessian=gnb, whose estimate is never negative",
            )
        age = metrics.get("hessian/age", 0.0)
        if age > LATE_INTERVALS * interval:
            yield (
                "late",
                f"h is {age:.0f} steps old, refreshes are due every {interval}: estimates are not finite and "
                "dropped; lower optimizer.lr",
            )
        rejected = metrics.get("optim/hessian_rejected", 0.0)
        if rejected:
            yield (
                f"rejected {rejected:.0f}",
                f"{rejected:.0f} estimates of the Hessian were not finite and dropped so far",
            )
