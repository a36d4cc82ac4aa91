"""embedded: see the README of this folder."""
