"""What a training step costs, and how fast inference is: `codetr benchmark step`, `codetr benchmark latency`."""
