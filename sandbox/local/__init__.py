"""local: see the README of this folder."""
