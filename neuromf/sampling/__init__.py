"""Noise keyed by (seed, index), and the solvers that turn it into samples."""
