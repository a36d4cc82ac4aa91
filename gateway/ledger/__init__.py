"""The durable store of sessions, turns, routing rows, finishes and leases (see this folder's README)."""
