"""The method: a layer's decode pipeline, its selectors and its dense fallback."""
