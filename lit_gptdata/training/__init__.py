"""What a training run needs next to the model: budget, throughput, ranks, summary, sweeps, CLI."""
