"""The objective, the loop, and what watches it."""
