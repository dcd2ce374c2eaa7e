"""The `twilight` command; nothing below imports it."""
