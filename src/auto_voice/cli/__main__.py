"""``python -m auto_voice.cli``."""

from __future__ import annotations

import sys

from auto_voice.cli.main import main

sys.exit(main())
