"""routes: see the README of this folder."""
