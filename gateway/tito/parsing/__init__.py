"""Sampled tokens to a message: one file per family of markup."""
