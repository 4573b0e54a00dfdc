"""The evaluation's parts: GenEval, and the report."""
