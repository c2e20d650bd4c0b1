"""Each hazard of hazards.txt has a test, each marker a hazard, each mutant a place."""

import ast
import functools
import re
from pathlib import Path

import pytest

import mutants

TESTS = Path(__file__).resolve().parent
# Hazards of what there is not, with the reason.
NOT_YET = {}


@functools.lru_cache(maxsize=None)
def rows():
    """What goes wrong, from the table."""
    lines = (TESTS / "hazards.txt").read_text().splitlines()
    return [re.split(r"\s+\|\s+", line)[0] for line in lines if line and line[0] != "#"]


@functools.lru_cache(maxsize=None)
def functions():
    """{file::test: its function}, without importing them."""
    return {f"{path.name}::{node.name}": node for path in sorted(TESTS.glob("test_*.py"))
            for node in ast.parse(path.read_text()).body
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def is_marker(node):
    name = getattr(node, "func", None)
    return "hazard" in (getattr(name, "id", ""), getattr(name, "attr", ""))


@functools.lru_cache(maxsize=None)
def markers():
    """{what a marker says: the test that has it}."""
    return {mark.args[0].value: name for name, test in functions().items()
            for mark in test.decorator_list if is_marker(mark)}


def test_table_has_no_row_twice():
    assert len(set(rows())) == len(rows()) > 100


@pytest.mark.parametrize("row", rows())
def test_hazard_has_a_test(row):
    found = [test for text, test in markers().items() if row in text]
    assert bool(found) != (row in NOT_YET), found or f"no test has hazard({row!r})"


def test_marker_names_a_hazard():
    strange = {text: test for text, test in markers().items()
               if not any(row in text for row in rows())}
    assert not strange


# Mutants

def test_mutants_fit_the_sources():
    """Each change has its place, once: who changes that place finds another for it."""
    wrong = {one.name: mutants.misfits(one) for one in mutants.MUTANTS if mutants.misfits(one)}
    assert not wrong


def test_mutants_name_tests_that_there_are():
    named = {test for one in mutants.MUTANTS for test in one.tests}
    assert named <= functions().keys(), sorted(named - functions().keys())
    assert all(one.tests for one in mutants.MUTANTS)


def test_mutants_have_names_of_their_own():
    names = [one.name for one in mutants.MUTANTS]
    assert len(set(names)) == len(names)


def test_each_hazard_has_a_mutant():
    """And each mutant is of a hazard."""
    assert {one.hazard for one in mutants.MUTANTS} == set(rows()) - NOT_YET.keys()
