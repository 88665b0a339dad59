"""How well a model predicts a text: as one figure, for each symbol, and by what its state keeps."""
