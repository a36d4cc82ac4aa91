"""What `verbatim bench replay` consists of."""
