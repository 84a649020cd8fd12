"""The command line of NeuroMF: options in, one library call, a table out."""
