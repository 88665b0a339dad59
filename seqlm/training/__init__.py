"""From a corpus to a run: batches, the trainer, the loop, and several processes."""
