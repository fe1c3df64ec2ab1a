"""Rebuilds the pocket base model from nothing: draws the world, trains every model in turn, assembles, measures.

    python samples/pocket/build.py --work WORK

WORK (about 1.5 GB) keeps what is finished, so an interrupted build goes on where it stopped.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
# script, and the file or folder in WORK by which it is known to be done
STAGES = (
    ("scenes.py", "scenes.npy"),
    ("autoencoder.py", "vae"),
    ("clip.py", "text_encoder"),
    ("vit.py", "vit"),
    ("denoiser.py", None),  # takes up its own checkpoint, and ends at once if that is finished
    ("assemble.py", None),
)


def build(work: Path) -> None:
    """Run the stages that are not done."""
    work.mkdir(parents=True, exist_ok=True)
    for script, product in STAGES:
        if product is None or not (work / product).exists():
            subprocess.run([sys.executable, HERE / script, "--work", work], check=True)
    for script in ("subjects.py", "bars.py"):
        subprocess.run([sys.executable, HERE / script], check=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    build(parser.parse_args().work)
