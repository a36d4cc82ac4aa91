"""What Verbatim is judged by: runs that print their seeds and leave their figures in `results/`."""
