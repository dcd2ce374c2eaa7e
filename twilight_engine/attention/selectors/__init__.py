"""Which tokens a decode step may look at: the selector interface and its implementations."""
