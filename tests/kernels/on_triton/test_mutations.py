"""The lists of breaks are up to date; that each is noticed takes an hour: ``scripts/long.sh mutations``."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "mutations"))
from listing import ROOT, Mutation, ops_with_mutations, read_mutations

OPS = sorted(path.parent.name for path in (ROOT / "kernels").glob("*/triton_kernel.py"))


@pytest.mark.parametrize("op", OPS)
def test_each_kernel_has_breaks(op: str) -> None:
    assert op in ops_with_mutations()
    assert len(read_mutations(op)) >= 3


@pytest.mark.parametrize("op", ops_with_mutations())
def test_breaks_are_of_text_that_is_there_once_and_name_a_test(op: str) -> None:
    def wrong(mutation: Mutation) -> bool:
        return mutation.count() != 1 or mutation.old == mutation.new or not mutation.node_exists()

    assert [f"{m} (there {m.count()} times; {m.node})" for m in read_mutations(op) if wrong(m)] == []
