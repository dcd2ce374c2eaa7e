"""The KV tiers: host pages, device index, windows and hot rows."""
