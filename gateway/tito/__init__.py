"""tito: see the README of this folder."""
