"""Copies of a model that share its tensors, and runs that leave no trace on it."""
