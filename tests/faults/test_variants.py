"""The table of broken variants is of the code as it stands."""

import ast
from pathlib import Path

import pytest

from tests.faults.variants import VARIANTS, Variant, broken


@pytest.mark.parametrize("variant", [one for group in VARIANTS.values() for one in group], ids=lambda one: one.test)
def test_a_variant_can_be_made_and_names_a_test(variant: Variant) -> None:
    ast.parse(broken(variant))
    file, _, name = variant.test.partition("::")
    assert f"def {name.partition('[')[0]}(" in (Path(__file__).parent / file).read_text()


@pytest.mark.parametrize("group", VARIANTS)
def test_every_group_has_three(group: str) -> None:
    assert len(VARIANTS[group]) >= 3
