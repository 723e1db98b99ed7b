"""Text input: bytes → documents.

"sample" | URL | path | glob | list  →  Corpus  →  Document, Document, …  →  chunks of UTF-8

>>> from lit_gptdata.text.corpus import open_corpus
>>> for document in open_corpus("sample"): print(document.source)
"""
