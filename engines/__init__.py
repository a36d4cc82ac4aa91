"""Inference engines: clients of real ones, the embedded torch engine, and the transport of weights to them."""
