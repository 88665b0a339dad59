"""Every op as PyTorch operations that autograd differentiates: slow; tests compare with them."""
