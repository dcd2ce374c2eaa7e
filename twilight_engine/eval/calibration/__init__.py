"""Choose settings for a model from its own texts: the least link bytes within a tolerance."""
