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


# Ranges of code points, both ends included, that gigatoken and a library treat differently: letters,
# digits and combining marks that are new in Unicode 17, which gigatoken 0.10.0 knows. tiktoken 0.9 to
# 0.14 and tokenizers 0.23 have Unicode 16. Then marks and compositions since Unicode 9, which the NFC of
# tokenizers leaves as they are. A text with such a character goes to the library, so that all split
# patterns can share a table.
CLASSES_DIFFER = (
    (0x07FD, 0x07FD), (0x088F, 0x088F), (0x0897, 0x089F), (0x08CA, 0x08D3), (0x09FE, 0x09FE),
    (0x0C3C, 0x0C3C), (0x0C5C, 0x0C5C), (0x0CDC, 0x0CDC), (0x0D3B, 0x0D3C), (0x0EBA, 0x0EBA),
    (0x1715, 0x1715), (0x1ABF, 0x1ADD), (0x1AE0, 0x1AEB), (0x1DF6, 0x1DFA), (0xA7CE, 0xA7CF),
    (0xA7D2, 0xA7D2), (0xA7D4, 0xA7D4), (0xA7F1, 0xA7F1), (0xA82C, 0xA82C), (0x105D2, 0x105D2),
    (0x105DA, 0x105DA), (0x10940, 0x10959), (0x10D24, 0x10D27), (0x10D69, 0x10D6D),
    (0x10EAB, 0x10EAC), (0x10EC5, 0x10EC7), (0x10EFA, 0x10EFB), (0x10EFD, 0x10EFF),
    (0x10F46, 0x10F50), (0x10F82, 0x10F85), (0x11070, 0x11070), (0x1133B, 0x1133B),
    (0x11382, 0x11382), (0x11384, 0x11384), (0x1138B, 0x1138B), (0x11390, 0x11390),
    (0x113C2, 0x113C2), (0x113CE, 0x113D0), (0x1145E, 0x1145E), (0x11839, 0x1183A),
    (0x11935, 0x11935), (0x1193D, 0x1193E), (0x11943, 0x11943), (0x119E0, 0x119E0),
    (0x11A34, 0x11A34), (0x11A47, 0x11A47), (0x11A99, 0x11A99), (0x11B60, 0x11B67),
    (0x11D42, 0x11D42), (0x11D44, 0x11D45), (0x11D97, 0x11D97), (0x11DB0, 0x11DDB),
    (0x11DE0, 0x11DE9), (0x11F41, 0x11F42), (0x1611E, 0x1611E), (0x16121, 0x16122),
    (0x16129, 0x16129), (0x1612F, 0x1612F), (0x16D63, 0x16D63), (0x16D67, 0x16D67),
    (0x16D69, 0x16D69), (0x16EA0, 0x16EB8), (0x16EBB, 0x16ED3), (0x16FF0, 0x16FF6),
    (0x187F8, 0x187FF), (0x18D09, 0x18D1E), (0x18D80, 0x18DF2), (0x1E08F, 0x1E08F),
    (0x1E130, 0x1E136), (0x1E2AE, 0x1E2AE), (0x1E2EC, 0x1E2EF), (0x1E4EC, 0x1E4EF),
    (0x1E5EE, 0x1E5EF), (0x1E6C0, 0x1E6DE), (0x1E6E0, 0x1E6F5), (0x1E6FE, 0x1E6FF),
    (0x2B73A, 0x2B73F), (0x2CEA2, 0x2CEAD), (0x323B0, 0x33479),
)  # fmt: skip

# Punctuation and symbols that are new in Unicode 17. Only the pattern of DeepSeek depends on them.
SYMBOLS_DIFFER = (
    (0x20C1, 0x20C1), (0x2B96, 0x2B96), (0xFBC3, 0xFBD2), (0xFD90, 0xFD91), (0xFDC8, 0xFDCE),
    (0x10ED0, 0x10ED8), (0x1CCFA, 0x1CCFC), (0x1CEBA, 0x1CED0), (0x1CEE0, 0x1CEF0),
    (0x1F6D8, 0x1F6D8), (0x1F777, 0x1F77A), (0x1F8D0, 0x1F8D8), (0x1FA54, 0x1FA57),
    (0x1FA8A, 0x1FA8A), (0x1FA8E, 0x1FA8E), (0x1FAC8, 0x1FAC8), (0x1FACD, 0x1FACD),
    (0x1FAEA, 0x1FAEA), (0x1FAEF, 0x1FAEF), (0x1FBFA, 0x1FBFA),
)  # fmt: skip


class Scheme(NamedTuple):
    """How gigatoken knows a split pattern."""

    name: str
    """For a file of ranks."""
    regex: str
    """In a tokenizer.json."""
    differ: tuple[tuple[int, int], ...] = CLASSES_DIFFER
    """Code points that send a text to the library."""


_GPT2 = Scheme("gpt2", r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
SCHEMES = {
    R50K_PATTERN: _GPT2,
    GPT2_PATTERN: _GPT2,
    CL100K_PATTERN: Scheme("gpt4", CL100K_PATTERN + "+"),
    LLAMA3_PATTERN: Scheme("olmo3", LLAMA3_PATTERN),
    QWEN2_PATTERN: Scheme("qwen2", QWEN2_PATTERN),
    O200K_PATTERN: Scheme("o200k", O200K_PATTERN),
    DEEPSEEK_PATTERN: Scheme("deepseek_v3", DEEPSEEK_PATTERN, CLASSES_DIFFER + SYMBOLS_DIFFER),
    SENTENCEPIECE_RULE: Scheme("sentencepiece", "", ()),
}
"""`split_pattern` of a reference → the scheme whose ids are the same."""
