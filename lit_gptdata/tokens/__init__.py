"""Text to integers: documents → a store of flat token shards, addressed by its content.

documents ──engine (tiktoken | gigatoken)──▶ ids ──▶ shard, shard, … + manifest.json  =  TokenStore

Neither torch nor lightning is imported here: they cost seconds and 800 MB in every worker.
"""
