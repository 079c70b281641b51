"""Training of kernels: each layer alone, all together, what each head costs, and budget tables."""
