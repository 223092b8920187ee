"""Which lambdas at which step, and what an update learns from: one file per paper."""
