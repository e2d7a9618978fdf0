"""README.md, docs/ and the code say the same: commands, tables, layout."""
import itertools
import json
import re
import shlex
import shutil
import subprocess

import bench
import pytest
import slowest
from conftest import ROOT

import avatars
import evaluate
import fit
import render_blender
import rodinhd as rh
import sample
import ship
import train
import words
from papers import figures, tables

README = ROOT / 'README.md'
RESULTS = ROOT / 'docs' / 'results.md'
PAGES = [README, *sorted((ROOT / 'docs').glob('*.md'))]
PARSERS = {
    'avatars.py': avatars.parse,
    'fit.py': fit.parse,
    'train.py': train.parse,
    'render_blender.py': render_blender.parse,
    'sample.py': sample.parse,
    'evaluate.py': evaluate.parse,
    'ship.py': ship.parse,
    'papers.tables': tables.parse,
    'papers.figures': figures.parse,
    'tests/bench.py': bench.parse,
}


# Commands -----------------------------------------------------------------------------------------
def shell_lines(page):
    """The lines of a page's shell blocks."""
    blocks = re.findall(r'^```(\w*)\n(.*?)^```', page.read_text(), re.M | re.S)
    return [line for kind, text in blocks if kind == 'sh' for line in text.splitlines() if line]


def commands_of(page):
    """The commands of a page, each a list of words, with variables filled in."""
    commands = []
    variables = {}
    for line in shell_lines(page):
        line_words = shlex.split(line, comments=True)
        for is_and, group in itertools.groupby(line_words, lambda word: word == '&&'):
            group = list(group)
            if is_and or not group:
                continue
            if re.match(r'\w+=', group[0]):
                name, _, value = group[0].partition('=')
                variables[f'${name}'] = value.split()
                continue
            commands.append([w for word in group for w in variables.get(word, [word])])
    return commands


def required_packages(alone=False):
    """Names of the packages that the requirements name; alone: without what these depend on."""
    if alone:
        return set((ROOT / 'tests' / 'requirements-alone.txt').read_text().split())
    text = (ROOT / 'requirements.txt').read_text()
    text += (ROOT / 'tests' / 'requirements.txt').read_text()
    return set(text.split())


def check_script(name, options):
    """Parses the options of one of the project's commands, and the settings among them."""
    args = PARSERS[name](options)
    settings = getattr(args, 'set', None)
    if settings and getattr(args, 'stage', None) == 'lora':
        words.make_settings(args.sd, settings)
    elif settings:
        rh.make_config(args.preset, settings)


def check_command(command):
    """Asserts that a command of a page is one that works."""
    program, *arguments = command
    if program == 'pip':
        assert arguments[0] == 'install'
        files = [b for a, b in itertools.pairwise(arguments) if a == '-r']
        names = {a for a in arguments[1:] if not a.startswith('-') and a not in files}
        assert all((ROOT / file).is_file() for file in files)
        assert names <= required_packages(alone='--no-deps' in arguments)
    elif arguments[:2] == ['-m', 'pytest']:
        assert ' '.join(command) in (ROOT / '.ci' / 'run').read_text()
    elif program in ('python', 'torchrun'):
        script = next(word for word in arguments if word in PARSERS)
        check_script(script, arguments[arguments.index(script) + 1:])
    else:
        assert program in ('mkdir', 'cp')


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_commands_parse(page, capsys):
    """Every command of a page names a script and options that exist, or is one of the shell's."""
    for command in commands_of(page):
        try:
            check_command(command)
        except (SystemExit, rh.Stop, StopIteration, AssertionError) as error:
            line = ' '.join(command)
            pytest.fail(f'{page.name}: {line}: {error} {capsys.readouterr().err}')


def test_there_are_commands():
    lines = shell_lines(README)
    scripts = [line for line in lines if re.match(r'(python|torchrun)\b', line)]
    assert len(scripts) >= 8
    every = [' '.join(command) for page in PAGES for command in commands_of(page)]
    for name in set(PARSERS) - {'tests/bench.py'}:
        assert any(f' {name} ' in f'{command} ' for command in every), name


def test_the_readmes_shell_lines_run(tmp_path):
    """Those that only make folders and copy, where a fresh clone is."""
    (tmp_path / 'weights').symlink_to(ROOT / 'weights')
    lines = [line for line in shell_lines(README) if re.match(r'(mkdir|cp)\b', line)]
    assert lines
    for line in lines:
        subprocess.run(line, shell=True, cwd=tmp_path, check=True)
    assert (tmp_path / 'fits/decoder.pt').stat().st_size > 10_000
    assert (tmp_path / 'runs/vae.pt').stat().st_size > 10_000


# Tables -------------------------------------------------------------------------------------------
def test_tables_are_those_of_the_results(tmp_path, monkeypatch):
    """Each stands between its marks, and to put them there again changes nothing."""
    page = RESULTS.read_text()
    shown = dict(re.findall(r'<!-- table (\w+) -->\n(.*?)\n<!-- end -->', page, re.S))
    results = {}
    for path in (ROOT / 'results').glob('table_*.json'):
        results[path.stem.removeprefix('table_')] = json.loads(path.read_text())
    assert shown.keys() == results.keys() <= tables.TABLES.keys()  # others were not run
    for name, content in results.items():
        hint = f'table {name}: run python -m papers.tables docs'
        assert shown[name] == tables.as_markdown(content), hint

    copy = shutil.copy(RESULTS, tmp_path / 'results.md')
    monkeypatch.setattr(tables, 'PAGE', tmp_path / 'results.md')
    tables.main(tables.parse(['docs']))
    assert copy.read_text() == page


def test_the_slowest_tests_are_those_that_were_measured():
    tests = json.loads((ROOT / 'results/slowest.json').read_text())['tests']
    assert slowest.table_of(tests) in (ROOT / 'docs/speed.md').read_text()


def test_a_table_that_changed_is_put_into_the_docs(tmp_path, monkeypatch):
    page = tmp_path / 'results.md'
    page.write_text('before\n<!-- table 6 -->\nold\n<!-- end -->\nafter\n')
    shutil.copy(ROOT / 'results' / 'table_6.json', tmp_path)
    monkeypatch.setattr(tables, 'PAGE', page)
    tables.main(tables.parse(['docs', '--out', str(tmp_path)]))
    table = tables.as_markdown(json.loads((tmp_path / 'table_6.json').read_text()))
    assert page.read_text() == f'before\n<!-- table 6 -->\n{table}\n<!-- end -->\nafter\n'


@pytest.mark.parametrize('page', [README, RESULTS], ids=lambda page: page.name)
def test_the_main_table_is_that_of_the_results(page):
    """Its rows are those of results/portraits.json between the first and the last, which are of
    results/evaluate.json, an earlier measurement that knew fewer metrics."""
    found = json.loads((ROOT / 'results' / 'portraits.json').read_text())
    earlier = json.loads((ROOT / 'results' / 'evaluate.json').read_text())['mean']
    digits = {
        'PSNR': 2,
        'PSNR at 45-135': 1,
        'SSIM': 3,
        'ST-LPIPS': 3,
        'CSIM (dlib)': 3,
        'IoU': 3,
        'front': 1,
    }
    means = {'fitted': earlier['fitted'], **found['mean'], 'mean': earlier['mean']}
    expected = []
    for name, scores in means.items():
        row = [
            f'{scores[metric]:.{n}f}' if metric in scores else '-' for metric, n in digits.items()
        ]
        if name in found['mean']:
            row[0] += f' ± {found["standard_error"][name]["PSNR"]:.2f}'
        expected.append(row)

    columns = 'PSNR | from 45-135° | SSIM | ST-LPIPS | CSIM (dlib) | outlines (IoU) | front'
    head = f'| | {columns} |'
    _, _, below = page.read_text().partition(f'{head}\n')
    rows = below.partition('\n\n')[0].splitlines()[1:]
    assert [[cell.strip() for cell in row.split('|')[2:-1]] for row in rows] == expected


# Layout -------------------------------------------------------------------------------------------
COMMANDS = ('avatars', 'evaluate', 'fit', 'papers', 'sample', 'train')
SOURCES = sorted([*ROOT.glob('*.py'), *ROOT.glob('papers/*.py')])


def imports_of(path):
    """Names of the modules that a file imports, anywhere in it."""
    lines = re.findall(r'^\s*(?:import|from) (.*)', path.read_text(), re.M)
    names = [line.split(' import ')[0] for line in lines]
    return {name.split()[0].split('.')[0] for line in names for name in line.split(', ')}


def test_chapters_are_in_order():
    lines = (ROOT / 'rodinhd.py').read_text().splitlines()
    matches = [re.match(r'# (\d+) .*---$', line) for line in lines]
    assert [int(match[1]) for match in matches if match] == list(range(1, 11))


def test_the_method_stands_alone():
    modules = {path.stem for path in ROOT.glob('*.py')} | {'papers'}
    assert not imports_of(ROOT / 'rodinhd.py') & modules
    assert imports_of(ROOT / 'shortcuts.py') & modules == {'rodinhd'}


@pytest.mark.parametrize('path', SOURCES, ids=lambda path: path.name)
def test_a_command_is_its_file_and_its_helpers(path):
    """No file imports a command."""
    assert not imports_of(path) & set(COMMANDS)


def test_requirements():
    needed = set((ROOT / 'requirements.txt').read_text().split())
    assert needed == {'torch', 'numpy', 'pillow', 'tqdm', 'lpips', 'scipy'}
