"""For which tokenizers gigatoken gives the ids of the reference: the result of benchmarks/agreement.py.

Run it again for another version or split pattern, and commit what it prints.
"""

from __future__ import annotations

from typing import NamedTuple

from lit_gptdata.tokens.chunks import (
    CL100K_PATTERN,
    DEEPSEEK_PATTERN,
    GPT2_PATTERN,
    LLAMA3_PATTERN,
    O200K_PATTERN,
    QWEN2_PATTERN,
    R50K_PATTERN,
    SENTENCEPIECE_RULE,
)

VERSIONS = {
    "gigatoken": ("0.10.0",),
    "tiktoken": ("0.11", "0.12", "0.13", "0.14"),
    "tokenizers": ("0.22", "0.23"),
    "sentencepiece": ("0.2",),
}
"""The versions that were compared, or what they start with. Others may know other Unicode characters."""


class Scheme(NamedTuple):
    """How gigatoken knows a split pattern."""

    name: str
    """For a file of ranks."""
    regex: str
    """In a tokenizer.json."""


_GPT2 = Scheme("gpt2", r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
SCHEMES = {
    R50K_PATTERN: _GPT2,
    GPT2_PATTERN: _GPT2,
    CL100K_PATTERN: Scheme("gpt4", CL100K_PATTERN + "+"),
    LLAMA3_PATTERN: Scheme("olmo3", LLAMA3_PATTERN),
    QWEN2_PATTERN: Scheme("qwen2", QWEN2_PATTERN),
    O200K_PATTERN: Scheme("o200k", O200K_PATTERN),
    DEEPSEEK_PATTERN: Scheme("deepseek_v3", DEEPSEEK_PATTERN),
    SENTENCEPIECE_RULE: Scheme("sentencepiece", ""),
}
"""`split_pattern` of a reference → the scheme whose ids are the same, except in `CLASSES_DIFFER`."""

# Ranges of code points, both ends included, that gigatoken and a reference treat differently. gigatoken
# 0.10.0 knows Unicode 17. tiktoken 0.9 to 0.14 and tokenizers 0.22 and 0.23 know Unicode 16 and treat
# new letters and digits as marks.
CLASSES_DIFFER = (
    (0x088F, 0x088F), (0x0C5C, 0x0C5C), (0x0CDC, 0x0CDC), (0xA7CE, 0xA7CF), (0xA7D2, 0xA7D2),
    (0xA7D4, 0xA7D4), (0xA7F1, 0xA7F1), (0x10940, 0x10959), (0x10EC5, 0x10EC7), (0x11DB0, 0x11DDB),
    (0x11DE0, 0x11DE9), (0x16EA0, 0x16EB8), (0x16EBB, 0x16ED3), (0x16FF2, 0x16FF6),
    (0x187F8, 0x187FF), (0x18D09, 0x18D1E), (0x18D80, 0x18DF2), (0x1E6C0, 0x1E6DE),
    (0x1E6E0, 0x1E6E2), (0x1E6E4, 0x1E6E5), (0x1E6E7, 0x1E6ED), (0x1E6F0, 0x1E6F4),
    (0x1E6FE, 0x1E6FF), (0x2B73A, 0x2B73F), (0x2CEA2, 0x2CEAD), (0x323B0, 0x33479),
)  # fmt: skip
