"""The model: token ids → EmbeddingStem → transformer blocks → logits. It knows nothing about data."""
