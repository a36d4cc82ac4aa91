"""What `verbatim bench gateway` and `verbatim bench scale` consist of."""
