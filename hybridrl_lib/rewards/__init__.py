"""What the final answer of a text is, and whether it is correct."""
