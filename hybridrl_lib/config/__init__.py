"""Every setting of a run: its default, bounds, and source; presets."""
