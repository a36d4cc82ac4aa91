"""Sandboxes: one isolated runtime per rollout, and the rewards that run in it."""
