"""Runs that are hit by a fault at a random moment."""
