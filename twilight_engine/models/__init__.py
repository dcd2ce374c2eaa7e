"""The decoder models, one file a family."""
