"""sparing: efficient twins of dense models."""

__version__ = "0.1.0"
