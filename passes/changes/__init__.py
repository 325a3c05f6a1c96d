"""Changes of the model's function, which are asked for by name."""
