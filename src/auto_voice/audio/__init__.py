"""Recordings in and out, and the one definition of each signal that the models see.

:mod:`auto_voice.audio.io` reads and writes; every other module holds one subject. Importing the
package itself loads neither a decoder nor a detector.
"""
