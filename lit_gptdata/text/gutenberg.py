"""Remove Project Gutenberg's license header and footer from a book."""

import re

# The lines before and after every book's text, such as "*** START OF THE PROJECT GUTENBERG EBOOK …".
_START = re.compile(r"^\*\*\* ?START OF (?:THE|THIS) PROJECT GUTENBERG.*$", re.MULTILINE)
_END = re.compile(r"^\*\*\* ?END OF (?:THE|THIS) PROJECT GUTENBERG.*$", re.MULTILINE)


def strip_gutenberg(text: str, source: object) -> str:
    """The book between Gutenberg's two marker lines, without blank lines around it.

    Raises ValueError if `text` lacks one of the markers.
    """
    start = _START.search(text)
    end = _END.search(text, start.end()) if start else None
    if start is None or end is None:
        missing = f"*** {'END' if start else 'START'} OF THE PROJECT GUTENBERG"
        raise ValueError(f"{source} has no line '{missing} …': set strip_gutenberg=false")
    return text[start.end() : end.start()].strip("\n") + "\n"
