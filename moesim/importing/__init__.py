"""A training step of anyone's software brought in: recorded without a GPU, kept as a file, priced by kernel models."""
