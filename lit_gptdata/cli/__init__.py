"""The command `lit-gptdata`.

command line  →  main.py        COMMANDS: name → function; errors → messages
                 data.py        prepare, info, verify, publish
                 show.py        show
                 report.py      report
                 overrides.py   Hydra overrides → GPTDataModule

For a new command, write one file and add one entry to COMMANDS. Import large packages such as torch
inside functions, so that `lit-gptdata --help` stays fast.
"""
