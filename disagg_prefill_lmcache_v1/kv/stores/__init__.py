"""Where KV chunks go: one client a store."""
