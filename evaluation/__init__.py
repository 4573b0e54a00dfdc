"""What eval.py is made of: models, prompts, GenEval, report."""
