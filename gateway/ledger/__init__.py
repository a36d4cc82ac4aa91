"""ledger: see the README of this folder."""
