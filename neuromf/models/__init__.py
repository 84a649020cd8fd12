"""Networks and autoencoders."""
