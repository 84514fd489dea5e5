"""The lower bounds of pyproject.toml, which `make test-oldest` installs."""

from __future__ import annotations

import pytest

from programs import script

oldest = script("oldest")


def test_every_dependency_and_the_tools_asked_for_are_pinned_to_their_lower_bound() -> None:
    project = {
        "project": {
            "dependencies": ["click>=8.1"],
            "optional-dependencies": {"fleet": ["dask[array]>=2025.1,<2027"]},
        },
        "dependency-groups": {"dev": ["pytest>=8", "pytest-benchmark>=5"]},
    }
    assert [*oldest.oldest(project, {"pytest"})] == ["click==8.1", "dask[array]==2025.1", "pytest==8"]


@pytest.mark.parametrize("requirement", ["click", "click<9", "click==8.1.*", "click~=8.1"])
def test_a_requirement_without_a_lower_bound_is_refused(requirement: str) -> None:
    with pytest.raises(ValueError, match="no lower bound"):
        oldest.pinned(requirement)
