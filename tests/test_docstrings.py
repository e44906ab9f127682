"""The examples in docstrings: those that can run give what they say, the others at least call what is there.

One said that nine fields come back, of eight; one left out an argument, one looked a figure up where it is not; and one
module's could not even be read. Nothing had ever run them.
"""

from __future__ import annotations

import ast
import doctest
import inspect
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for room in ("meloformer", "benchmarks")
    for path in sorted((ROOT / room).rglob("*.py"))
    if path.name != "__init__.py"
]


def examples(module: ModuleType) -> list[doctest.DocTest]:
    return [found for found in doctest.DocTestFinder().find(module) if found.examples]


def wrong_calls(source: str, module: ModuleType) -> list[str]:
    """Calls of the module's own functions and classes that do not fit what these take."""
    wrong = []
    for call in ast.walk(ast.parse(source)):
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)):
            continue
        called = getattr(module, call.func.id, None)
        is_open = any(isinstance(a, ast.Starred) for a in call.args) or any(k.arg is None for k in call.keywords)
        if called is None or called.__module__ != module.__name__ or is_open:
            continue
        try:
            inspect.signature(called).bind(*call.args, **{k.arg: k.value for k in call.keywords})
        except TypeError as error:
            wrong.append(f"{ast.unparse(call)}: {error}")
    return wrong


def test_a_wrong_call_is_found():
    module = import_module("meloformer.training.schedule")
    assert wrong_calls("learning_rate(0, 1e-3, 1e-4, 2, max_steps=6)", module) == []
    assert "missing a required argument" in wrong_calls("print(learning_rate(0, 1e-3))", module)[0]


@pytest.mark.parametrize("name", MODULES)
def test_examples_hold(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some write a file
    module, said = import_module(name), []
    runner = doctest.DocTestRunner()
    for found in examples(module):
        skipped = [example.source for example in found.examples if doctest.SKIP in example.options]
        assert not [wrong for source in skipped for wrong in wrong_calls(source, module)], found.name
        runner.run(found, out=said.append)
    assert runner.failures == 0, "".join(said)
