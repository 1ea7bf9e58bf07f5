"""The names in a registry, for whoever must not import it."""

import ast
import importlib.util
from pathlib import Path


def names_in(module: str, registry: str) -> list[str]:
    """The keys of a dict that a module defines, read from its source: to import it may take a second, for JAX."""
    found = importlib.util.find_spec(module)
    assert found is not None and found.origin is not None, module
    for node in ast.parse(Path(found.origin).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == registry:
            assert isinstance(node.value, ast.Dict), registry
            return [ast.literal_eval(key) for key in node.value.keys if key is not None]
    raise AssertionError(f"{module} has no {registry}")
