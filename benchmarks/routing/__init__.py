"""Parts of `verbatim bench experts`."""
