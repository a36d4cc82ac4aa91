"""Sampled tokens to a message: see the README of the folder above."""

from gateway.tito.parsing.choice import choose_parsing
from gateway.tito.parsing.reply import ReplyParser, ReplyParsing

__all__ = ["ReplyParser", "ReplyParsing", "choose_parsing"]
