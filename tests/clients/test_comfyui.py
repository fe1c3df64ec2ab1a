"""Our single files and LoRA names in ComfyUI's own code; only where its source is at hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("DELORA_COMFYUI" not in os.environ, reason="DELORA_COMFYUI is the folder of ComfyUI's source"),
]


def test_comfyui_recognises_every_single_file_and_leads_every_name_to_a_layer_of_its_shape() -> None:
    job = subprocess.run([sys.executable, "-m", "tests.clients.comfyui"], capture_output=True, text=True, timeout=1800)
    assert job.returncode == 0, job.stderr
    found = [json.loads(line) for line in job.stdout.splitlines() if line.startswith("{")]
    assert len(found) >= 7
    for trial in (one for one in found if "recognised" in one):
        assert trial["recognised"], trial
        assert trial["missing"] == trial["unexpected"] == trial["misshapen"] == [], trial
        for targets in ("attention+ff", "all-linear"):
            adapted, named, misled = trial[targets]
            assert misled == [] and trial[f"{targets}, original names"] == adapted, trial
            assert named == adapted or trial["model"].startswith(("Lumina", "FLUX.2")), trial
