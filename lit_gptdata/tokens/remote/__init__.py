"""Token stores at a URL: publish one, and read one through a local cache."""
