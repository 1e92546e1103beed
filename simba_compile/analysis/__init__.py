"""What pruning does to a model's quality, and what goes on inside it: the evidence behind the method."""
