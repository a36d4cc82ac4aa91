"""rewards: see the README of this folder."""
