"""What `neuromf report` collects: a page of a run, of a generated set, of an ablation, of a toy."""
