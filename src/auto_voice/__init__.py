"""Clone a voice from a few seconds of speech and re-speak any recording in it."""

__version__ = "0.1.0"
