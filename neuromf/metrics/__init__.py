"""Distances, similarities, spectra and statistics of volumes and features."""
