"""algorithms: see the README of this folder."""
