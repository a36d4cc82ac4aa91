"""The trainer: feed in, replay-consistent policy updates out."""
