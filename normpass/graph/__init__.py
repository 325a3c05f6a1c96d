"""torch.fx graphs: nodes, the operators that are known by name, concatenations."""
