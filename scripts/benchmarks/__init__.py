"""What bench_kernels, bench_peer and gpu_check are made of."""
