"""The corpus "sample": Python's language reference, which every CPython contains."""

import functools
import hashlib
import platform
from collections.abc import Iterator

from lit_gptdata.text.document import Document


class SampleCorpus:
    """The topics of `pydoc_data.topics`, in alphabetical order: about 450 KB, by version of Python."""

    @functools.cached_property
    def topics(self) -> dict[str, str]:
        """Topic name → text."""
        from pydoc_data.topics import topics

        return dict(sorted(topics.items()))

    def __iter__(self) -> Iterator[Document]:
        for name, text in self.topics.items():
            yield Document(source=f"sample:{name}", chunks=[text.encode()])

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over names and texts."""
        content = "".join(f"{name}\0{text}\0" for name, text in self.topics.items())
        return hashlib.sha256(content.encode()).hexdigest()

    def __repr__(self) -> str:
        return f"SampleCorpus(language reference of Python {platform.python_version()})"
