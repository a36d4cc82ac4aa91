"""The parts of `verbatim bench chaos`: who takes part, who kills whom, and who counts what is left."""
