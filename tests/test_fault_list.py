"""The list of faults in tests/README.md."""

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
LISTED = re.findall(r"`([\w/]+\.py)(?:::(\w+))?`", (TESTS / "README.md").read_text())


@pytest.mark.parametrize(("file", "test"), LISTED)
def test_a_listed_test_is_there(file: str, test: str) -> None:
    assert (TESTS / file).is_file()
    assert not test or f"\ndef {test}(" in (TESTS / file).read_text()
