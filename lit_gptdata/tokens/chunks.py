"""Where a text may be cut without changing its tokens.

    text -> pieces of about 64 KiB -> ids        the ids of the pieces, joined, are the text's ids

    rule = cut_rule(encoding._pat_str, encoding.special_tokens_set)
    list(pieces([b"To be, or no", b"t to be"], rule, size=4))
        ->  [b"To be", b", or", b" not", b" to be"]

Text is UTF-8 bytes here: gigatoken takes bytes, and a way through str costs it up to a quarter of
its speed on text that is not ASCII.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

# Bytes. Larger pieces are not faster (64 KiB, 128 KiB, 256 KiB and 1 MiB measured); this size leaves a
# core's cache to gigatoken's tables, and malloc keeps blocks below 128 KiB instead of unmapping them.
PIECE_SIZE = 1 << 16

# Bytes. One word costs tiktoken and gigatoken about 140 bytes of memory a byte (tiktoken 0.14.0,
# gigatoken 0.10.0), so a run of this length without any cut takes 2.3 GB and half a minute.
MAX_UNCUT = 1 << 24

# A tokenizer first splits the text with a pattern, left to right; each match becomes tokens of its own.
# A cut between two neighbouring characters x|y leaves the matches as they are if
#   (a) x is not whitespace,
#   (b) no alternative of the pattern has a place where it takes y directly after x, and
#   (c) the cut is not inside a special string.
# Proof. No alternative looks behind, so a match depends only on the text from its start on; what
# begins at the cut is the right part's own business. Left of the cut, (b) stops every attempt at x,
# whether y or the end of the text comes next. What is left are the two tests that look ahead without
# taking anything, `$` and `(?!\S)`: they stand behind a whitespace run, and by (a) such a run ends
# before x, inside the left part. So the left part alone has the same matches, the last one ends at
# the cut, and by (c) special strings, which are found before the pattern is applied, are the same.
#
# The cuts below by the pair x|y, with what (b) rests on:
#   solid|space         whitespace is taken first in a match (` ?`, `[^\r\n\p{L}\p{N}]?`) or after
#                       whitespace; but cl100k and o200k take line ends after punctuation
#                       (`[^\s\p{L}\p{N}]+[\r\n/]*`), so for them the space is not a line end ...
#   letter,digit|line end   ... unless x is a letter or a digit
#   letter,digit|mark   no alternative takes a mark after a letter or digit, except o200k the
#                       apostrophe of `(?i:'s|'t|...)?`, which is not among these marks
#   digit|letter, letter|digit   a match that takes letters after its first character takes no digits
# A class is used only where all Unicode versions agree on it. "After a newline", "after a space" and
# (cl100k, o200k) "before a letter that follows a mark" are not safe: "a\n\nb", "a b", "(b".
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
_CL100K_CUT = re.compile(_SOLID + rb"[\t\v\f ] | (?<= [0-9A-Za-z] ) [\r\n] |" + _COMMON, re.VERBOSE)

# Whitespace as Rust's `\s` has it (Unicode's White_Space); Python's `\s` adds \x1c to \x1f.
_LINE_ENDS = "\r\n"
_SPACES = "\t\v\f \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"

# Characters. tiktoken's regex engine gives up at 1,000,000 whitespace characters before a solid one.
LONG_RUN = 400_000


@dataclass(frozen=True)
class CutRule:
    """Where texts may be cut for one split pattern."""

    cut: re.Pattern[bytes]
    """Matches begin at the cuts."""

    whole_run: re.Pattern[str]
    """Matches are whitespace runs of `LONG_RUN` characters or more that the split pattern takes in one
    match. A text that ends where a special token begins counts as ended."""

    def first_cut(self, buffer: bytes | bytearray, start: int) -> int:
        """The first cut at or after `start` (never 0), -1 if the buffer holds none.

            rule.first_cut(b"one two three", 4)  ->  7

        The buffer may begin and end anywhere in a UTF-8 text, also inside a character, and newlines
        need not be translated: no cut divides a character or CR from LF.
        """
        found = self.cut.search(buffer, start)
        return found.start() if found else -1


def _run(chars: str, at_the_end: bool, length: int = LONG_RUN) -> re.Pattern[str]:
    """Runs of at least `length` characters `chars`, without the last one if something solid follows.

    That last one belongs to what follows (` ?\\p{L}+`) or is a match of its own; `\\s+(?!\\S)` takes
    the others. `at_the_end`: also those that end the text, whole.
    """
    solid = f"[^{_LINE_ENDS}{_SPACES}]"
    run = f"(?<![{chars}])[{chars}]{{{length},}}"  # tried only where a run begins: linear time
    return re.compile(f"{run}(?=[{chars}]{solid})" + (rf"|{run}\Z" if at_the_end else ""))


# r50k: no match ends inside a whitespace run but before its last character, so runs stand alone.
# cl100k and o200k: `\s*[\r\n]` takes a run through its last line end, so what stands alone is the
# rest; and at the end of the text cl100k's `\s++$` takes all of it at once.
_R50K = CutRule(_R50K_CUT, _run(_LINE_ENDS + _SPACES, at_the_end=True))
_CL100K = CutRule(_CL100K_CUT, _run(_SPACES, at_the_end=False))
_O200K = CutRule(_CL100K_CUT, _run(_SPACES, at_the_end=True))

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
_RULES = {
    R50K_PATTERN: _R50K,
    GPT2_PATTERN: _R50K,
    CL100K_PATTERN: _CL100K,
    O200K_PATTERN: _O200K,
}


def cut_rule(pat_str: str, special_tokens: Iterable[str] = ()) -> CutRule | None:
    """The rule proved for a split pattern; None: texts must stay whole.

    None for a pattern that is not one of OpenAI's, and for special strings that a cut could divide.
    """
    rule = _RULES.get(pat_str)
    if rule and any(rule.first_cut(special.encode(), 1) >= 0 for special in special_tokens):
        return None
    return rule


def pieces(
    chunks: Iterable[bytes],
    rule: CutRule | None,
    size: int = PIECE_SIZE,
    max_uncut: int = MAX_UNCUT,
) -> Iterator[bytes]:
    """One text, given in chunks of any size, as pieces that may be tokenized one by one.

        list(pieces([b"one t", b"wo three"], rule, size=3))  ->  [b"one", b" two", b" three"]

    A piece ends at the first cut at or after `size` bytes, so the pieces depend on the text and on
    `size` alone, not on the chunks. Without a rule the text is one piece. Memory: a chunk and a piece.

    Raises ValueError if no cut comes within `max_uncut` bytes after that.
    """
    if rule is None:
        text = b"".join(chunks)
        if text:
            yield text
        return
    buffer = bytearray()
    given = 0  # bytes of the text that went out in pieces
    searched = 0  # the buffer holds no cut from `size` to here
    for chunk in chunks:
        buffer += chunk
        while len(buffer) > size:
            cut = rule.first_cut(buffer, max(size, searched))
            if (cut if cut >= 0 else len(buffer)) > size + max_uncut:
                raise ValueError(_uncut(buffer, given, size, max_uncut))
            if cut < 0:
                searched = len(buffer) - 2  # what follows a cut is up to 3 bytes long
                break
            with memoryview(buffer) as view:  # one copy; buffer[:cut] would be another
                piece = bytes(view[:cut])
            yield piece
            del buffer[:cut]
            given += cut
            searched = 0
    if buffer:
        yield bytes(buffer)


def _uncut(buffer: bytearray, given: int, size: int, max_uncut: int) -> str:
    sample = buffer[size : size + 40].decode("utf-8", "replace")
    return (
        f"no place to cut the text in the {max_uncut:,} bytes (max_uncut) from byte {given + size:,} "
        f"on; it reads {sample!r}. One run of letters, digits, marks or spaces needs about 140 bytes "
        "of memory a byte to be tokenized. Put spaces or line ends into it, or raise max_uncut"
    )
