"""Errors, paths, signals, processes, and the hub: what everything else stands on."""
