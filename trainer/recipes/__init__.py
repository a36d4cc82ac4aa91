"""recipes: see the README of this folder."""
