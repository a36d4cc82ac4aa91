"""Parts of `verbatim bench updates`: see the README of `benchmarks`."""
