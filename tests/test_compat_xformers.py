"""xformers 0.0.35 warns on import when its extensions were built for another torch; diffusers 0.42 imports it."""

import subprocess
import sys

PROGRAM = "import sparing.diffusion, sparing.zoo.twins; from diffusers import DiTTransformer2DModel"


def test_importing_diffusers_through_sparing_prints_nothing_about_xformers():
    out = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=300)
    assert "xformers" not in out.stderr.lower()
