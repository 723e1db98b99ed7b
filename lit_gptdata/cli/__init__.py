"""The command `lit-gptdata`: main.py has the table COMMANDS, and overrides.py opens the data.

For a new command, write one file and add one entry to COMMANDS. Import large packages such as torch
inside functions, so that `lit-gptdata --help` stays fast.
"""

import os

# torch reads this when it first allocates memory. Large tensors then use pages of 2 MB instead of 4 KB,
# which saves a third of the CPU time of a training step with large logits. It matters on Linux only.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
