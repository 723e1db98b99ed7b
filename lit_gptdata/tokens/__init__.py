"""Turn documents into token ids, and keep them in a store that is named by its content.

documents ──engine (tiktoken or gigatoken)──▶ ids ──▶ shards + manifest.json  =  TokenStore

Nothing here imports torch or lightning, which would cost each worker seconds and 800 MB.
"""
