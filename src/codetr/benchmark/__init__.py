"""What a training step costs: `codetr benchmark step`."""
