"""Code that a forged checkpoint names: it leaves a word that it was run."""

import os
from pathlib import Path

if "CHAOS_CANARY" in os.environ:
    Path(os.environ["CHAOS_CANARY"]).write_text(__name__)
