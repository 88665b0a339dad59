"""What a model says next: the probabilities, and whole texts."""
