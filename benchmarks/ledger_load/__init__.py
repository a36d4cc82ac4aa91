"""Loads and yardsticks of `verbatim bench ledger`."""
