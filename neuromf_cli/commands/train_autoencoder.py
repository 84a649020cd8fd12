"""`neuromf train-autoencoder`."""
