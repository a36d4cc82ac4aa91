"""data: see the README of this folder."""
