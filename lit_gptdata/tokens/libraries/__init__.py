"""The libraries behind a `Tokenizer`: each adapter is a `Reference`. Nothing else knows a library."""
