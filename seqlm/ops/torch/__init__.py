"""The recurrences as PyTorch operations on any device, with gradients written by hand.

Inside this folder `import torch` means PyTorch, because imports here are absolute.
"""
