"""The parts of `neuromf ablate`: plan file, cells, stages, local launcher, folder, collected tables."""
