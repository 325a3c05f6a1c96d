"""Which parts of a graph can run sub-batch by sub-batch, and what that saves."""
