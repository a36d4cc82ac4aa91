"""backends: see the README of this folder."""
