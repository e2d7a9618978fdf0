"""A plugin of pytest that lists the slowest tests, by CPU-seconds, which a busy machine leaves as
they are: PYTHONPATH=tests python -m pytest -n 2 --dist loadfile -p slowest

What a test spends is its process's time and that of the processes that it has waited for, those of
forks.py among them, with the fixtures that it is the first to ask for. SLOWEST=FILE keeps all in a
JSON file, too; what that holds of other tests stays. Of such a file, results/slowest.json,

    python tests/slowest.py results/slowest.json

prints the table that docs/speed.md shows.
"""
import json
import os
import platform
import subprocess
import sys
from collections import defaultdict
from multiprocessing import forkserver
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHOWN = 20
KEY = 'CPU-seconds'


def spent():
    """CPU-seconds of this process, and of those that it has waited for."""
    times = os.times()
    own = times.user + times.system + times.children_user + times.children_system
    return own + spent_by_forks()


def spent_by_forks():
    """CPU-seconds of the server of forks, and of those that have ended."""
    stat = Path(f'/proc/{forkserver._forkserver._forkserver_pid}/stat')
    if not stat.exists():  # none was needed yet
        return 0.0
    fields = stat.read_text().rpartition(')')[2].split()
    ticks = sum(map(int, fields[11:15]))  # user, system, and both of its children
    return ticks / os.sysconf('SC_CLK_TCK')


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item):
    item.began = spent()
    return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item):
    try:
        return (yield)
    finally:  # reports of this last phase take it to the process that prints
        item.user_properties.append((KEY, spent() - item.began))


def found_in(reports):
    """CPU-seconds of tests by their names, of pytest's reports by outcome."""
    found = {}
    for outcome in reports.values():
        for report in outcome:
            for name, value in getattr(report, 'user_properties', ()):
                if name == KEY:
                    found[report.nodeid] = round(value, 2)
    return found


def row_of(name, seconds):
    """A test as a row of a table in Markdown."""
    return f'| {seconds:.1f} | `{name.removeprefix("tests/")}` |'


def commit_of():
    """The commit that is measured, in short."""
    ask = ['git', 'rev-parse', '--short', 'HEAD']
    return subprocess.run(ask, capture_output=True, text=True, cwd=ROOT).stdout.strip()


def keep(path, found):
    """Adds tests to the JSON file of a path."""
    content = json.loads(path.read_text()) if path.exists() else {'tests': {}}
    tests = {**content['tests'], **found}
    files = defaultdict(float)
    for name, value in tests.items():
        files[name.partition('::')[0]] += value
    content = {
        'command': 'PYTHONPATH=tests python -m pytest -p slowest',
        'commit': commit_of(),
        'machine': f'{platform.machine()}, {os.cpu_count()} cores, Python {sys.version.split()[0]}',
        'sum': round(sum(tests.values()), 1),
        'files': {name: round(files[name], 1) for name in sorted(files, key=files.get)[::-1]},
        'tests': {name: tests[name] for name in sorted(tests, key=tests.get)[::-1]},
    }
    path.write_text(json.dumps(content, indent=1) + '\n')


def pytest_terminal_summary(terminalreporter):
    found = found_in(terminalreporter.stats)
    terminalreporter.section(f'slowest of {sum(found.values()):.0f} CPU-seconds')
    terminalreporter.write_line(table_of(found))
    if 'SLOWEST' in os.environ:
        keep(Path(os.environ['SLOWEST']), found)


def table_of(tests):
    """The slowest of tests, {name: CPU-seconds}, as a table in Markdown."""
    slowest = sorted(tests, key=tests.get)[:-SHOWN - 1:-1]
    rows = [row_of(name, tests[name]) for name in slowest]
    return '\n'.join(['| CPU-seconds | test |', '|---|---|', *rows])


if __name__ == '__main__':
    print(table_of(json.loads(Path(sys.argv[1]).read_text())['tests']))
