"""Training: generated data, packing of conversations, and the run that makes the nano checkpoint."""
