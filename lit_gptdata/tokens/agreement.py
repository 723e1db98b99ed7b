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


def _ranges(text: str) -> tuple[tuple[int, int], ...]:
    """Ranges of code points in hex, both ends included: "07FD 0897-089F"  ->  (first, last), …"""
    pairs = [word.partition("-") for word in text.split()]
    return tuple((int(first, 16), int(last or first, 16)) for first, _, last in pairs)


# Characters that gigatoken and a library treat differently: letters, digits and combining marks that are
# new in Unicode 17, which gigatoken 0.10.0 knows. tiktoken 0.9 to 0.14 and tokenizers 0.23 have Unicode
# 16. Then marks and compositions since Unicode 9, which the NFC of tokenizers leaves as they are. A text
# with such a character goes to the library, so that all split patterns can share a table.
CLASSES_DIFFER = _ranges("""
    07FD 088F 0897-089F 08CA-08D3 09FE 0C3C 0C5C 0CDC 0D3B-0D3C 0EBA 1715 1ABF-1ADD 1AE0-1AEB
    1DF6-1DFA A7CE-A7CF A7D2 A7D4 A7F1 A82C 105D2 105DA 10940-10959 10D24-10D27 10D69-10D6D
    10EAB-10EAC 10EC5-10EC7 10EFA-10EFB 10EFD-10EFF 10F46-10F50 10F82-10F85 11070 1133B 11382 11384
    1138B 11390 113C2 113CE-113D0 1145E 11839-1183A 11935 1193D-1193E 11943 119E0 11A34 11A47 11A99
    11B60-11B67 11D42 11D44-11D45 11D97 11DB0-11DDB 11DE0-11DE9 11F41-11F42 1611E 16121-16122 16129
    1612F 16D63 16D67 16D69 16EA0-16EB8 16EBB-16ED3 16FF0-16FF6 187F8-187FF 18D09-18D1E 18D80-18DF2
    1E08F 1E130-1E136 1E2AE 1E2EC-1E2EF 1E4EC-1E4EF 1E5EE-1E5EF 1E6C0-1E6DE 1E6E0-1E6F5 1E6FE-1E6FF
    2B73A-2B73F 2CEA2-2CEAD 323B0-33479
""")

# Punctuation and symbols that are new in Unicode 17. Only the pattern of DeepSeek depends on them.
SYMBOLS_DIFFER = _ranges("""
    20C1 2B96 FBC3-FBD2 FD90-FD91 FDC8-FDCE 10ED0-10ED8 1CCFA-1CCFC 1CEBA-1CED0 1CEE0-1CEF0 1F6D8
    1F777-1F77A 1F8D0-1F8D8 1FA54-1FA57 1FA8A 1FA8E 1FAC8 1FACD 1FAEA 1FAEF 1FBFA
""")


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
"""`rule` of a `Reference` → the scheme whose ids are the same."""
