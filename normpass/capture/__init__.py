"""A module's forward as graphs: TorchDynamo, and what it gets wrong."""
