"""What a training run needs next to the model: budget, throughput, ranks, summary, sweeps, CLI."""


def __getattr__(name: str) -> object:
    if name == "metrics_csv":  # named in config.yaml of older runs
        from lit_gptdata.training import loggers

        return loggers
    raise AttributeError(name)
