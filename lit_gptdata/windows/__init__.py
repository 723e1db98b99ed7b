"""From token ids to training batches.

tokens ──split──▶ train, val and test ranges ──dataset──▶ windows ──order──▶ loader ──▶ (inputs, targets)

A window has `max_length` ids as inputs, and the ids one token later as targets:

tokens     0 1 2 3 4 5 6 7 8 9          max_length=4, stride=3
window 0   0 1 2 3                      targets 1 2 3 4
window 1         3 4 5 6                targets 4 5 6 7
"""
