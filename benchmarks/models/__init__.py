"""Models without weights, made at run time: tokenizers of several kinds, templates and markup of many families."""
