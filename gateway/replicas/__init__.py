"""replicas: see the README of this folder."""
