"""Where the text comes from: bytes → documents.

"sample" | URL | path | glob | list  →  Corpus  →  Document, Document, …  →  chunks of str

>>> from lit_gptdata.text.corpus import open_corpus
>>> for document in open_corpus("sample"): print(document.source)
"""
