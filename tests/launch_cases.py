"""What launch.py runs on several processes."""

import small
from runtime.options import one_line_errors


def train(case: str, changes: dict) -> None:
    """A small run of a trainer, as its script would do it."""
    with one_line_errors():
        small.train(case, changes.pop("output_dir"), **changes)
