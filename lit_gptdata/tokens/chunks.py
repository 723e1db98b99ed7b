"""Cut a text into chunks without changing its tokens.

    text -> chunks of about 64 KiB -> ids        the joined ids of the chunks are the ids of the text

Text is UTF-8 bytes here, because gigatoken takes bytes. A conversion through str would cost up to a
quarter of its speed on text that is not ASCII.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from lit_gptdata.tokens.libraries.reference import Reference

Ids = np.ndarray
Ranges = tuple[tuple[int, int], ...]

SAFE_CHUNK_BYTES = 1 << 16
"""Least size of a chunk. 128 KiB, 256 KiB and 1 MiB are not faster (measured). This size leaves room for
the tables of gigatoken in the CPU cache, and malloc reuses blocks below 128 KiB."""

MAX_UNCUT_BYTES = 1 << 24
"""Longest run of text without a cut. tiktoken 0.14.0 and gigatoken 0.10.0 need about 140 bytes of memory
for each byte of a single word, so a run of this length takes 2.3 GB and half a minute."""

# Which cuts are safe. A tokenizer first splits the text with a pattern, from left to right. Then it
# encodes each match independently of the others. A cut between the neighboring characters x|y keeps all
# matches if
#   (a) x is not whitespace,
#   (b) no alternative of the pattern can consume y directly after x, and
#   (c) the cut is not inside a special string.
# Proof. No alternative looks behind, so a match depends only on the text from its start. The right side
# therefore has the same matches as before. On the left side, (b) ends every match at x, whether y or the
# end of the text follows. Only two tests look ahead without consuming text: `$` and `(?!\S)`. Both come
# after a whitespace run, and by (a) such a run ends before x. So the left side alone has the same
# matches, and the last one ends at the cut. Special strings are found before the pattern is applied, and
# by (c) they are the same.
#
# The cuts below, written as x|y, and why (b) holds for them:
#   solid|space         An alternative consumes whitespace first in a match (` ?`, `[^\r\n\p{L}\p{N}]?`)
#                       or after whitespace. But cl100k and o200k also consume line ends after
#                       punctuation (`[^\s\p{L}\p{N}]+[\r\n/]*`). So the space must not be a line end ...
#   letter,digit|line end   ... unless x is a letter or a digit.
#   letter,digit|mark   No alternative consumes a mark after a letter or digit. The exception is the
#                       apostrophe in `(?i:'s|'t|...)?` of o200k, which is not among these marks.
#   digit|letter, letter|digit   A match with letters after its first character consumes no digits.
# A character class is used only where all Unicode versions agree on it. These cuts are not safe: after a
# newline ("a\n\nb"), after a space ("a b"), before a letter that follows a mark (cl100k, o200k: "(b").
_SOLID = rb"""(?:
    (?<= [!-~] )                                 # ASCII without controls and space
  | (?<= [\xc3-\xdf] [\x80-\xbf] )               # U+00C0-07FF: Latin, Greek, Cyrillic, Hebrew, Arabic
  | (?<= [\xe0\xe4-\xef] [\x80-\xbf]{2} )        # U+0800-0FFF Indic, Thai; U+4000-FFFF CJK, Hangul
  | (?<= \xe1 [\x80-\x99\x9b-\xbf] [\x80-\xbf] ) # U+1000-1FFF, but U+1680 is a space
  | (?<= [\xf0-\xf4] [\x80-\xbf]{3} )            # U+10000-: emoji, more CJK
)"""
_COMMON = rb"""
    (?<= [0-9A-Za-z] ) [,.;:!?]
  | (?<= [0-9] ) [A-Za-z]
  | (?<= [A-Za-z] ) [0-9]
  | (?<= [\xe5-\xe8\xeb\xec] [\x80-\xbf]{2}      # U+5000-8FFF CJK, U+B000-CFFF Hangul: letters
       | \xe3\x81 [\x81-\xbf] )                  # U+3041-307F Hiragana: letters
    (?: \xe3\x80 [\x81\x82]                      # ideographic comma and full stop
      | \xef\xbc [\x81\x8c\x9a\x9b\x9f] )        # fullwidth ! , : ; ?
"""
_R50K_CUT = re.compile(_SOLID + rb"[\t-\r ] |" + _COMMON, re.VERBOSE)
_SPACE = _SOLID + rb"[\t\v\f ] | (?<= [0-9A-Za-z] ) [\r\n]"
_SPACE_CUT = re.compile(_SPACE, re.VERBOSE)
_CL100K_CUT = re.compile(_SPACE + rb"|" + _COMMON, re.VERBOSE)
_SENTENCEPIECE_CUT = re.compile(_SOLID + rb"(?: [ ] (?= [^ ] ) | \n )", re.VERBOSE)


VERSIONS = {
    "gigatoken": ("0.10.0",),
    "tiktoken": ("0.11", "0.12", "0.13", "0.14"),
    "tokenizers": ("0.22", "0.23"),
    "sentencepiece": ("0.2",),
}
"""The versions that were compared, or what they start with. Others may know other Unicode characters.
For another version or split pattern, run benchmarks/agreement.py and commit what it prints."""


def _ranges(text: str) -> Ranges:
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


@dataclass(frozen=True)
class CutRule:
    """Where a text may be cut for one split pattern, and how gigatoken knows the pattern."""

    cut: re.Pattern[bytes]
    """Each match starts at a safe cut."""
    scheme: str = ""
    """gigatoken's name, for a file of ranks."""
    regex: str = ""
    """In a tokenizer.json for gigatoken."""
    differ: Ranges = CLASSES_DIFFER
    """Code points that send a text to the library."""
    adds_space: bool = False
    """Whether the library puts a space before each text, and `encode_chunk` leaves it out."""

    def first_cut(self, buffer: bytes | bytearray, start: int) -> int:
        """The first cut at or after `start` (never 0), or -1 if the buffer has none.

            rule.first_cut(b"one two three", 4)  ->  7

        The buffer may start and end anywhere in a UTF-8 text, even inside a character. Newlines need no
        translation: a cut never divides a character or a CR LF.
        """
        found = self.cut.search(buffer, start)
        return found.start() if found else -1


# tiktoken_ext/openai_public.py, versions 0.9 to 0.14.
R50K_PATTERN = (  # gpt2, r50k_base, p50k_base, p50k_edit
    r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
)
GPT2_PATTERN = (  # the same matches, as OpenAI's GPT-2 release wrote it
    r"""'s|'t|'re|'ve|'m|'ll|'d| ?[\p{L}]+| ?[\p{N}]+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
)
CL100K_PATTERN = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"""
    r"""| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"""
)
O200K_PATTERN = (  # o200k_base, o200k_harmony
    r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"""
    r"""|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"""
    r"""|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
LLAMA3_PATTERN = (
    r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"""
    r"""| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
QWEN2_PATTERN = LLAMA3_PATTERN.replace("{1,3}", "")  # Qwen 1 to 3
DEEPSEEK_PATTERN = "\0".join((  # versions 2 to 4: three patterns, one after another
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^{line}\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"""| ?[\p{P}\p{S}]+[{line}]*|\s*[{line}]+|\s+(?!\S)|\s+""".replace("{line}", "\r\n"),
))  # fmt: skip
SENTENCEPIECE_RULE = json.dumps({  # Llama 1 and 2, Mistral 1: BPE that leaves a text as it is
    "add_dummy_prefix": True, "byte_fallback": True, "charsmap": hashlib.sha256().hexdigest(),
    "escape_whitespaces": True, "model_type": 2, "remove_extra_whitespaces": False,
    "treat_whitespace_as_suffix": False,
})  # fmt: skip
_R50K = CutRule(
    _R50K_CUT, "gpt2", r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
)
RULES = {
    R50K_PATTERN: _R50K,
    GPT2_PATTERN: _R50K,
    CL100K_PATTERN: CutRule(_CL100K_CUT, "gpt4", CL100K_PATTERN + "+"),
    LLAMA3_PATTERN: CutRule(_CL100K_CUT, "olmo3", LLAMA3_PATTERN),
    QWEN2_PATTERN: CutRule(_CL100K_CUT, "qwen2", QWEN2_PATTERN),
    O200K_PATTERN: CutRule(_CL100K_CUT, "o200k", O200K_PATTERN),
    DEEPSEEK_PATTERN: CutRule(
        _CL100K_CUT, "deepseek_v3", DEEPSEEK_PATTERN, CLASSES_DIFFER + SYMBOLS_DIFFER
    ),
    SENTENCEPIECE_RULE: CutRule(_SENTENCEPIECE_CUT, differ=(), adds_space=True),
}
"""`rule` of a `Reference` → its cuts, and gigatoken's scheme with the same ids."""


def cut_rule(reference: Reference) -> CutRule | None:
    """Where a text may be cut; None for an unknown rule, or if a special string has cuts."""
    rule = RULES.get(reference.rule)
    if rule is None:
        return None
    if rule.adds_space:
        pieces = reference.token_bytes()
        crosses = (b" " in p.lstrip(b" ") or (len(p) > 1 and b"\n" in p) for p in pieces)
        return rule if b" " in pieces and not any(crosses) else None
    for each in (rule, replace(rule, cut=_SPACE_CUT)):
        if all(each.first_cut(string.encode(), 1) < 0 for string in reference.whole_strings):
            return each
    return None


def encode_chunk(
    encode: Callable[[bytes], Ids], chunk: bytes, continues: bool, rule: CutRule | None
) -> Ids:
    """The ids of a chunk; `encode` takes whole texts. `continues`: it is not the first of its text."""
    if not continues or rule is None or not rule.adds_space:
        return encode(chunk)
    # a cut is before a space, which the library adds again, or a line end, which joins no piece
    return encode(chunk[1:]) if chunk[:1] == b" " else encode(chunk)[1:]


def safe_chunks(
    text: Iterable[bytes], rule: CutRule | None, size: int = SAFE_CHUNK_BYTES
) -> Iterator[bytes]:
    """Cut one text, given as blocks of any length, into chunks that may be tokenized separately.

        list(safe_chunks([b"one t", b"wo three"], rule, size=3))  ->  [b"one", b" two", b" three"]

    A chunk ends at the first cut at or after `size` bytes, so the chunks do not depend on the blocks.
    Without a rule the whole text is one chunk. With a rule, memory holds one block and one chunk. Raises
    ValueError if no cut follows within `MAX_UNCUT_BYTES`.
    """
    if rule is None:
        if joined := b"".join(text):
            yield joined
        return
    buffer = bytearray()
    buffer_start = 0  # position of the buffer in the text
    searched = 0  # the buffer has no cut between `size` and this position
    for block in text:
        buffer += block
        while len(buffer) > size:
            cut = rule.first_cut(buffer, max(size, searched))
            if (cut if cut >= 0 else len(buffer)) > size + MAX_UNCUT_BYTES:
                sample = buffer[size : size + 40].decode("utf-8", "replace")
                raise ValueError(
                    f"the text cannot be cut in the {MAX_UNCUT_BYTES:,} bytes after byte "
                    f"{buffer_start + size:,}, which start with {sample!r}. A run of letters, digits, "
                    "marks or spaces needs 140 bytes of memory per byte. Insert spaces or line ends"
                )
            if cut < 0:
                searched = len(buffer) - 2  # a cut there may need the next block
                break
            with memoryview(buffer) as view:  # bytes(buffer[:cut]) would copy twice
                chunk = bytes(view[:cut])
            yield chunk
            del buffer[:cut]
            buffer_start += cut
            searched = 0
    if buffer:
        yield bytes(buffer)
