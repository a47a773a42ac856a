"""What a detector costs, before it is built: parameters, arithmetic, memory, and the batch that fits a card."""
