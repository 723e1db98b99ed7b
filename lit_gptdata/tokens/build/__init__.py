"""How a token store is built: plan → work units → encoded shards → a published store."""
