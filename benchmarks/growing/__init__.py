"""Parts of `verbatim bench growth`: measured costs, arithmetic, simulation."""
