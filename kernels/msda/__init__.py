"""Multi-scale deformable attention kernels."""
