"""House rules: how the code is written, and who imports whom. Files are parsed, nothing is run."""
import ast
import functools
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = ['avatars', 'fit', 'train', 'sample', 'evaluate']
ALIKE = (ast.Call, ast.Attribute, ast.Subscript, ast.Name)


def is_ours(path):
    """Whether a file is of the project, and not of an environment that somebody made in it."""
    parts = path.relative_to(ROOT).parts
    if 'site-packages' in parts or 'node_modules' in parts:
        return False
    return not any(part.startswith('.') for part in parts)


FILES = sorted(path for path in ROOT.rglob('*.py') if is_ours(path))


@functools.cache
def parsed(path):
    return ast.parse(path.read_text(encoding='utf-8'))


def places(rule):
    """Where a rule is broken, as file:line. rule(node) tells whether a node breaks it."""
    found = []
    for path in FILES:
        for node in ast.walk(parsed(path)):
            if rule(node):
                found.append(f'{path.relative_to(ROOT)}:{node.lineno}')
    return found


def listed(found):
    """Places, one a line: pytest would cut a list short."""
    return '\n'.join(found)


def imports(path):
    """The names of all modules that a file imports, anywhere in it; of packages their own."""
    names = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split('.')[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names.add((node.module or '').split('.')[0])
    return names


def holds(node, kind):
    return any(isinstance(inner, kind) for inner in ast.walk(node))


# How it is written --------------------------------------------------------------------------------
def test_the_files_are_found():
    names = {str(path.relative_to(ROOT)) for path in FILES}
    assert {'rodinhd.py', 'tests/conftest.py', *(f'{name}.py' for name in SCRIPTS)} <= names


def test_no_line_is_wider_than_100_columns():
    wide = []
    for path in FILES:
        for number, line in enumerate(path.read_text(encoding='utf-8').splitlines(), 1):
            if len(line) > 100:
                wide.append(f'{path.relative_to(ROOT)}:{number}')
    assert not wide, listed(wide)


def test_no_walrus_stands_in_the_arguments_of_a_call():
    def rule(node):
        if not isinstance(node, ast.Call):
            return False
        return any(holds(argument, ast.NamedExpr) for argument in (*node.args, *node.keywords))

    found = places(rule)
    assert not found, listed(found)


def test_no_expression_stands_for_a_statement():
    """Neither `x or f()` nor `f() if x else g()` on a line of its own."""
    def rule(node):
        return isinstance(node, ast.Expr) and isinstance(node.value, (ast.BoolOp, ast.IfExp))

    found = places(rule)
    assert not found, listed(found)


def test_three_values_that_are_assigned_at_once_are_alike():
    """`q, k, v = f(x), g(x), h(x)`, but not `names, i, found = f(x), 0, []`."""
    def rule(node):
        if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Tuple):
            return False
        if not any(isinstance(target, (ast.Tuple, ast.List)) for target in node.targets):
            return False
        kinds = {type(value) for value in node.value.elts}
        alike = len(kinds) == 1 and kinds <= set(ALIKE)
        return len(node.value.elts) >= 3 and not alike

    found = places(rule)
    assert not found, listed(found)


@pytest.mark.parametrize('path', sorted(ROOT.glob('*.py')), ids=lambda path: path.name)
def test_a_file_opens_with_what_it_is_for(path):
    assert ast.get_docstring(parsed(path))


# Who imports whom ---------------------------------------------------------------------------------
def test_the_method_imports_nothing_of_the_project():
    """PyTorch and NumPy alone, besides the standard library."""
    others = imports(ROOT / 'rodinhd.py') - set(sys.stdlib_module_names)
    assert others <= {'torch', 'numpy'}


@pytest.mark.parametrize('name', SCRIPTS)
def test_scripts_do_not_import_one_another(name):
    assert imports(ROOT / f'{name}.py').isdisjoint(SCRIPTS)


# The README ---------------------------------------------------------------------------------------
def is_table_or_image(line):
    return line.lstrip().startswith(('|', '![', '[![', '<img'))


def test_the_readme_is_short():
    text = (ROOT / 'README.md').read_text(encoding='utf-8')
    lines = text.splitlines()
    wide = [i for i, line in enumerate(lines, 1) if len(line) > 160 and not is_table_or_image(line)]
    assert len(text.encode()) <= 16384
    assert len(lines) <= 260
    assert not wide, f'README.md is too wide in lines {wide}'
