"""A typed client of ``autovoice serve``.

from auto_voice.client import Client
with Client("http://127.0.0.1:8000") as client:
    made = client.convert("talk.wav", references=["friend.wav"])
    made.save("talk_as_friend.wav")
"""

from auto_voice.client.client import (
    Client,
    Conversion,
    ItemStatus,
    JobStatus,
    LiveConversion,
    ModelInfo,
    VoiceInfo,
)

__all__ = [
    "Client",
    "Conversion",
    "ItemStatus",
    "JobStatus",
    "LiveConversion",
    "ModelInfo",
    "VoiceInfo",
]
