"""The papers' tables that compare with Rodin: rows ask for commands that exist, and are measured
where evaluate.py writes. No command runs: tests/test_scripts.py runs some."""
import json

import pytest

import evaluate
import fit
import rodinhd as rh
import train
from papers import tables

PARSERS = {'fit.py': fit.parse, 'train.py': train.parse, 'evaluate.py': evaluate.parse}
OF_RODIN = [name for name in tables.TABLES if name.startswith('rodin')]
MEASURED = {'PSNR': 20.0, 'SSIM': 0.7, 'VAE': 0.1, 'FD-VAE': 9.0, 'sample_to_sample': 21.0}


@pytest.fixture
def called(monkeypatch):
    """Parses the commands in place of running them, and writes what evaluate.py would.

    Returns the list of all, as (script, options).
    """
    commands = []

    def call(args, script, *options):
        parsed = PARSERS[script]([str(option) for option in options])
        commands.append((script, parsed))
        if script == 'train.py':
            rh.make_config(parsed.preset, parsed.set)
        if script == 'evaluate.py':
            evaluate.check_useful(parsed, mode_of(parsed))
            parsed.out.mkdir(parents=True, exist_ok=True)
            path = parsed.out / f'{parsed.name}.json'
            path.write_text(json.dumps(result_of(parsed)))

    monkeypatch.setattr(tables, 'call', call)
    return commands


def mode_of(parsed):
    if parsed.consistency:
        return 'consistency'
    return 'unconditional' if parsed.unconditional else 'evaluate'


def result_of(parsed):
    """What evaluate.py writes in each of its modes."""
    if parsed.unconditional:
        return MEASURED
    rows = list(parsed.rows or ('planes', 'surface'))
    if parsed.refiner:
        rows += ['refined'] if parsed.consistency else [f'{row}, refined' for row in rows]
    return {'mean': dict.fromkeys(rows, MEASURED)}


@pytest.mark.parametrize('name', OF_RODIN)
def test_every_table_of_rodin_runs(tmp_path, monkeypatch, called, name):
    monkeypatch.chdir(tmp_path)
    tables.main(tables.parse(['run', name, '--preset', 'tiny', '--out', 'shown']))
    content = json.loads((tmp_path / f'shown/table_{name}.json').read_text())
    table = tables.TABLES[name]
    assert content['rows'].keys() == table.rows.keys()
    for row in content['rows'].values():
        assert all(values == [round(MEASURED[c], 4)] for c, values in row['ours'].items())

    # What rows share is trained once
    stages = {(stage, *settings) for row in table.rows.values()
              for stage, settings in row.settings.items()}
    assert sum(script == 'train.py' for script, _ in called) == len(stages)


def test_rodins_rows_are_of_a_vector_alone(tmp_path, monkeypatch, called):
    monkeypatch.chdir(tmp_path)
    tables.main(tables.parse(['run', 'rodin4', '--preset', 'tiny', '--out', 'shown']))
    base = next(parsed for script, parsed in called if script == 'train.py')
    config = rh.make_config(base.preset, base.set)
    assert (config.latent_width, config.condition_drop, config.tokens) == (96, 1, 'none')
    assert config.base_schedule == 'linear'
    asked = [parsed for script, parsed in called if script == 'evaluate.py']
    assert [parsed.guidance for parsed in asked] == [[1.0], [1.2], [1.5], [3.0], [6.0]]
    assert all(parsed.rows == ['latent'] for parsed in asked)
