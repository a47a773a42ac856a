"""What the kernels for the CPU share: Numba's compiler with its cache, vectors, threads."""
