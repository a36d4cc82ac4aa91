"""sessions: see the README of this folder."""
