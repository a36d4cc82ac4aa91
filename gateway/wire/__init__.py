"""wire: see the README of this folder."""
