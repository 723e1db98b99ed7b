"""Build a token store: plan → work units → workers encode shards → a published store."""
