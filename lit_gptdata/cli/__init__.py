"""The command `lit-gptdata`: main.py has the table COMMANDS, and overrides.py opens the data.

For a new command, write one file and add one entry to COMMANDS. Import large packages such as torch
inside functions, so that `lit-gptdata --help` stays fast.
"""
