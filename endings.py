"""How a program ends: in one line, by an error as by Ctrl-C and SIGTERM; at once with --help.

It imports the standard library alone, and scripts import it before PyTorch, which takes seconds. So
it also says how long PyTorch's threads wait for one another.
"""
import ast
import contextlib
import os
import signal
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parent

# Threads of OpenMP (GNU's, on Linux) turn around a loop while they wait, by default for so long
# that where another program has one of two cores, sample.py takes 172 s, not 16. With so many turns
# before they sleep it is 30 s, and 17 where the cores are free.
os.environ.setdefault('GOMP_SPINCOUNT', '3000')


# --help -------------------------------------------------------------------------------------------
# The function `parse` of a script needs the standard library, and constants of other files. So
# --help runs it alone, and neither the rest of the script nor PyTorch.
def constants_of(tree):
    """The constants of a file's syntax tree {name: value}; of a table the keys."""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            value = node.value
            if isinstance(value, ast.Dict):
                value = ast.List(value.keys)
            with contextlib.suppress(ValueError):  # it is no constant
                found[node.targets[0].id] = ast.literal_eval(value)
    return found


def parsed(path):
    return ast.parse(path.read_text(encoding='utf-8'))


def parse_alone(path, doc):
    """The function `parse` of a script, with the names that it needs, but for what imports
    PyTorch; None where it has none."""
    tree = parsed(path)
    names = {'__doc__': doc, '__file__': str(path), **constants_of(tree)}
    kept = []
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            first = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
            beside = ROOT / f'{first}.py'
            if beside.exists():
                name = node.names[0].asname or first
                names[name] = SimpleNamespace(**constants_of(parsed(beside)))
            elif first.split('.')[0] in sys.stdlib_module_names:
                kept.append(node)
        elif isinstance(node, ast.FunctionDef) and node.name == 'parse':
            kept.append(node)
    exec(compile(ast.Module(kept, []), str(path), 'exec'), names)
    return names.get('parse')


def answer_help():
    """Answers --help of the script that runs, and ends it."""
    script = sys.modules['__main__']
    path = Path(getattr(script, '__file__', None) or '')
    if {'-h', '--help'} & set(sys.argv[1:]) and ROOT in path.resolve().parents:
        parse = parse_alone(path, script.__doc__)
        if parse:
            with contextlib.suppress(NameError, AttributeError):  # then the script answers itself
                parse()


# Several ranks would each warn of how running.parallel averages gradients
if os.environ.get('WORLD_SIZE', '1') != '1':
    os.environ.setdefault('TORCH_CPP_LOG_LEVEL', 'ERROR')


# Errors and signals -------------------------------------------------------------------------------
def is_stop(kind):
    """Whether an exception is rodinhd.Stop, which imports PyTorch."""
    method = sys.modules.get('rodinhd')
    return method is not None and issubclass(kind, method.Stop)


def one_line(kind, error, trace):
    """sys.excepthook of all scripts: rodinhd.Stop, a full disk, a folder in place of a file, too
    little memory and Ctrl-C are said in one line."""
    if is_stop(kind):  # from a process of a DataLoader it comes with its trace: the last line is it
        last = str(error).splitlines()[-1].removeprefix('rodinhd.Stop: ')
        print(f'error: {last}', file=sys.stderr)
    elif not issubclass(kind, (OSError, MemoryError, KeyboardInterrupt)):
        sys.__excepthook__(kind, error, trace)
    elif issubclass(kind, MemoryError):
        print('error: out of memory', file=sys.stderr)
    elif issubclass(kind, OSError):
        print(f'error: {error}', file=sys.stderr)
    elif str(error):  # what a script says of itself
        print(f'interrupted; {error}', file=sys.stderr)
    else:
        print('interrupted; the same command goes on after the last file written', file=sys.stderr)


def interrupt(number, frame):
    """Makes SIGTERM end a program as Ctrl-C does: what it has half written is removed."""
    raise KeyboardInterrupt


def install():
    """One of several ranks waits for others where Python cannot interrupt it, so it has to die at
    once; the next run removes what it has half written."""
    sys.excepthook = one_line
    alone = os.environ.get('WORLD_SIZE', '1') == '1'
    if alone and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, interrupt)


install()
answer_help()
