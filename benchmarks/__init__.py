"""What codetr costs and what it reaches, measured: `python -m benchmarks` lists the benchmarks."""
