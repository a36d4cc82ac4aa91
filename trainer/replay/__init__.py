"""replay: see the README of this folder."""
