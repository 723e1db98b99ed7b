"""What `train.py`, sweeps and LightningCLI need around a training run."""
