"""Remove Project Gutenberg's license header and footer from books."""

import itertools
import re

# The lines before and after every book's text, such as "*** START OF THE PROJECT GUTENBERG EBOOK … ***".
# A long title continues in the next lines, up to asterisks that end a line, not over an empty line.
_MARKER = re.compile(
    r"^\ufeff?[ \t]*\*{3}[ \t]*(START|END) OF (?:THE|THIS) PROJECT GUTENBERG\b"
    r"(?:.*\*{3}|(?:[^\n]|\n(?![ \t\r]*(?:\n|\*{3}[ \t]*[^\s*]))){0,400}?\*{3}(?=[ \t\r]*$))?.*$",
    re.MULTILINE | re.IGNORECASE,
)


def strip_gutenberg(text: str, source: object, required: bool = True) -> str:
    """The books between Gutenberg's marker lines. Without any: the text, or ValueError if `required`."""
    markers = list(_MARKER.finditer(text))
    if not markers and not required:
        return text
    kinds = [marker[1].upper() for marker in markers]
    for kind, expected in itertools.zip_longest(kinds, ["START", "END"] * max(1, -(-len(kinds) // 2))):
        if kind != expected:
            missing = f"'*** {expected} OF THE PROJECT GUTENBERG …'"
            missing += f" before the next {kind}" if kind else ""
            raise ValueError(f"{source} has no line {missing}: set strip_gutenberg=false")
    pairs = zip(markers[::2], markers[1::2], strict=True)
    return "\n".join(text[start.end() : end.start()].strip("\r\n") + "\n" for start, end in pairs)
