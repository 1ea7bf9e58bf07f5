"""Pages that are written from the code say what the code says."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_page_of_settings_is_up_to_date() -> None:
    written = subprocess.run(
        [sys.executable, "docs/config_page.py"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert written == (ROOT / "docs" / "config.md").read_text(), "python docs/config_page.py > docs/config.md"
