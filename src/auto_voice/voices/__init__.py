"""Voices: made from recordings, judged, kept, blended and compared."""
