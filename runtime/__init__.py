"""What a run needs that is not in the paper. Knows nothing of GRPO."""
