"""parsing: see the README of this folder."""
