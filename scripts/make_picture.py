#!/usr/bin/env python3
"""Draw the README's picture: spectrograms of a source, a reference and the conversion.

python scripts/make_picture.py [OUT.png]
"""

from __future__ import annotations

import sys
from pathlib import Path

from auto_voice import VoiceConversionPipeline
from auto_voice.audio.picture import draw_spectrograms
from auto_voice.cli.convert import REFERENCE, SOURCE

SECONDS = 6.0


def main(path: Path) -> None:
    pipeline = VoiceConversionPipeline()
    source, reference = (pipeline.registry.load(name) for name in (SOURCE, REFERENCE))
    result = pipeline.convert(source, reference)
    panels = {
        f"source: {SOURCE}": source,
        f"reference: {REFERENCE}": reference,
        "result: the source's words and timing in the reference's voice": result.audio,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    print(draw_spectrograms(panels, path, seconds=SECONDS))


if __name__ == "__main__":
    here = Path(__file__).resolve().parents[1]
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else here / "docs" / "images" / "spectrograms.png")
