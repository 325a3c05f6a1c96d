"""What was done to a model, as tables, text and pictures."""
