"""The command line `lit-gptdata`."""
