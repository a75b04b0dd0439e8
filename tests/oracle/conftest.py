import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def fixtures_dir(pytestconfig: pytest.Config) -> Path:
    """The conformance fixtures: $MINDALLE_FIXTURES, else `shared/fixtures` beside the repository."""
    named = os.environ.get("MINDALLE_FIXTURES")
    folder = Path(named) if named else pytestconfig.rootpath.parent / "shared" / "fixtures"
    if not folder.is_dir():
        if named and os.environ.get("CI") == "true":
            pytest.fail(f"MINDALLE_FIXTURES names {folder}, which is not a directory")
        pytest.skip(f"no conformance fixtures in {folder}: set MINDALLE_FIXTURES to their folder")
    return folder
