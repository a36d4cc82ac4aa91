"""weights: see the README of this folder."""
