"""The policy pi_theta: load, score, sample, save."""
