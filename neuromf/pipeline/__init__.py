"""One file per verb: what a command does, callable from Python."""
