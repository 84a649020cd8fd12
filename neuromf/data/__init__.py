"""Volumes, latents, splits, and the embedded phantoms."""
