"""Algorithm 1: the loop, the judge, evaluation, checkpoints."""
