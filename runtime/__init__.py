"""What a run needs that is not in the paper. `start` is its setup in one call."""

from runtime.output import start

__all__ = ["start"]
