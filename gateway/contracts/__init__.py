"""Words and shapes that gateway, engines, sandbox and trainer share; standard library and numpy only."""
