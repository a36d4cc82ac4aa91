"""One gateway process takes over from another: no connection refused, no request failed (see README.md)."""
