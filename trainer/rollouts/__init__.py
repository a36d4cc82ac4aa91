"""rollouts: see the README of this folder."""
