"""Every op as PyTorch operations that autograd differentiates: slow, and the truth in tests."""
