"""The paper's claims as small controlled experiments on the tiny models."""
