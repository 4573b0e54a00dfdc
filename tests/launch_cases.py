"""What launch.py runs on several processes."""

import small


def train(case: str, changes: dict) -> None:
    """A small run of a trainer, as its script would do it."""
    from runtime import cli

    with cli.one_line_errors():
        small.train(case, changes.pop("output_dir"), **changes)
