"""Settings: what is wrong with one ends in one line, and `paper` has nothing that no paper has."""
from dataclasses import fields, replace
from typing import get_origin

import pytest

import rodinhd as rh
import running

OFF = {  # what each setting that is not in the papers is in `paper`
    'augment': 0,
    'mirror': 0,
    'coarse_to_fine': 0,
    'hull_start': 0,
    'weight_empty': 0,
    'silhouette_rays': 0,
    'regulariser_every': 1,
    'cull': 0,
    'planes_final_lr': 1,
    'decoder_final_lr': 1,
    'fog_start': 0,
    'mean_start': 0,
    'fisher_batches': 1,
    'positions': 0,
    'components': 0,
    'aligned': 0,
    'base_aligned': 0,
    'base_views': 0,
    'base_predict': 'noise',
    'identity_start': 0,
    'up_density': 1,
    'clip_grad': 0,
    'final_lr': 1,
    'likeness_steps': 0,
    'vector_steps': 0,
    'up_sample_steps': 0,
}
ZERO_IS_OFF = (
    'base_views', 'components', 'latent_width', 'likeness_steps', 'patches', 'patch_grid_updates',
    'up_sample_steps', 'vae_steps', 'vector_steps',
)
SETTINGS = [field for field in fields(rh.Config) if field.name != 'preset']


def kind_of(field):
    """What values a setting takes: 'choice', int, float or tuple."""
    return 'choice' if get_origin(field.type) else field.type


def names_of(*kinds):
    """The names of the settings of some kinds."""
    return [field.name for field in SETTINGS if kind_of(field) in kinds]


def refusal(*overrides, preset='small'):
    """How make_config says, in one line, that it refuses overrides."""
    with pytest.raises(rh.Stop) as error:
        rh.make_config(preset, overrides)
    message = str(error.value)
    assert '\n' not in message
    return message


# make_config --------------------------------------------------------------------------------------
def test_settings_are_set_by_name_and_type():
    changes = ['rays=99', 'lr_planes=1e-3', 'base_mult=1,2,2,2', 'tokens=none']
    config = rh.make_config('small', changes)
    assert config.rays == 99
    assert config.lr_planes == 1e-3
    assert config.base_mult == (1, 2, 2, 2)
    assert config.tokens == 'none'
    assert config.preset == 'small'
    assert config.channels == 16  # as the preset has it


@pytest.mark.parametrize('preset', rh.PRESETS)
def test_a_preset_can_be_written_out(preset):
    """All of its values, given as text, are the preset again: of any type, and of every field."""
    config = rh.make_config(preset)
    texts = []
    for field in SETTINGS:
        value = getattr(config, field.name)
        if isinstance(value, tuple):
            value = ','.join(map(str, value))
        texts.append(f'{field.name}={value}')
    written_out = rh.make_config('paper', texts)
    assert {**vars(written_out), 'preset': preset} == vars(config)
    for field in SETTINGS:
        assert type(getattr(written_out, field.name)) is type(field.default)


@pytest.mark.parametrize(('override', 'message'), [
    ('rais=9', '--set rais=9: no such setting; there are channels, '),
    ('preset=paper', 'no such setting'),
    ('=9', 'no such setting'),
    ('rays', 'rays takes a positive int'),
    ('rays=', 'takes a positive int'),
    ('rays=many', 'takes a positive int'),
    ('rays=1.5', 'takes a positive int'),
    ('rays=1e3', 'takes a positive int'),
    ('rays=-1', 'takes a positive int'),
    ('inner=0', 'takes a positive int'),
    ('likeness_steps=-1', 'likeness_steps takes a positive int'),
    ('lr_planes=nan', 'takes a positive float'),
    ('lr_planes=inf', 'takes a positive float'),
    ('lr_planes=-1e-3', 'takes a positive float'),
    ('lr_planes=fast', 'takes a positive float'),
    ('base_mult=a', 'takes integers with commas between'),
    ('base_mult=', 'takes integers with commas between'),
    ('base_mult=1,,2', 'takes integers with commas between'),
    ('base_mult=1.5', 'takes integers with commas between'),
    ('roll_out=2', r'roll_out takes (0, 1)'),
    ('roll_out=yes', r'roll_out takes (0, 1)'),
    ('tokens=all', "tokens takes ('multi', 'single', 'none')"),
    ('base_schedule=cosin', "takes ('cosine', 'sigmoid', 'linear')"),
    ('base_predict=', "takes ('noise', 'x_start')"),
    ('resolution=130', 'must divide'),
    ('channels=6', 'must divide by 4'),
    ('base_resolution=48', 'resolution 128 must divide by base_resolution 48'),
    ('portrait=100', 'portrait 100 must divide by 64'),
])
def test_what_is_wrong_ends_in_one_line(override, message):
    assert message in refusal(override)


def test_the_first_of_several_that_is_wrong_is_named():
    assert '--set rais=9:' in refusal('rays=9', 'rais=9', 'inner=0')


@pytest.mark.parametrize('name', names_of(int))
def test_zero_is_refused_where_it_makes_no_sense(name):
    """A number of steps, channels or rays is at least 1; what 0 switches off may be 0."""
    if name in ZERO_IS_OFF:
        assert getattr(rh.make_config('tiny', [f'{name}=0']), name) == 0
    else:
        assert f'{name} takes a positive int' in refusal(f'{name}=0')


@pytest.mark.parametrize('name', names_of(float))
def test_numbers_with_a_point_may_be_zero_and_not_negative(name):
    assert getattr(rh.make_config('tiny', [f'{name}=0']), name) == 0
    assert f'{name} takes a positive float' in refusal(f'{name}=-0.1')


@pytest.mark.parametrize('name', names_of('choice'))
def test_choices_are_their_words_alone(name):
    assert f'{name} takes (' in refusal(f'{name}=')
    assert f'{name} takes (' in refusal(f'{name}=9')


# What the papers do not have ----------------------------------------------------------------------
def test_the_defaults_are_the_paper():
    assert rh.make_config('paper') == rh.Config()
    assert rh.departures(rh.Config()) == []


def test_paper_has_everything_off_that_is_not_in_the_papers():
    assert list(OFF) == rh.NOT_IN_THE_PAPERS
    paper = rh.make_config('paper')
    assert {name: getattr(paper, name) for name in OFF} == OFF


@pytest.mark.parametrize('preset', ['small', 'tiny'])
def test_small_models_report_what_they_do_besides(preset):
    config = rh.make_config(preset)
    expected = [
        f'{name}={getattr(config, name)}' for name in OFF if getattr(config, name) != OFF[name]
    ]
    assert rh.departures(config) == expected
    assert len(expected) == len(OFF)  # all of it
    for item in ('augment=1', 'weight_empty=0.05', 'base_predict=x_start', 'fisher_batches=16'):
        assert item in expected


def test_departures_follow_overrides():
    one = rh.make_config('paper', ['rays=99', 'cull=1', 'final_lr=0.05'])
    assert rh.departures(one) == ['cull=1', 'final_lr=0.05']
    off = [f'{name}={value}' for name, value in OFF.items()]
    assert rh.departures(rh.make_config('tiny', off)) == []


def test_departures_are_printed_in_one_line(capsys):
    running.print_departures(rh.Config())
    assert capsys.readouterr().out == ''
    running.print_departures(rh.make_config('paper', ['cull=1', 'final_lr=0.25']))
    expected = 'not in the papers (docs/details.md): cull=1, final_lr=0.25\n'
    assert capsys.readouterr().out == expected


# Checkpoints --------------------------------------------------------------------------------------
@pytest.mark.parametrize('preset', rh.PRESETS)
def test_a_checkpoint_without_the_new_settings_gets_its_presets(preset):
    """But for a setting that would give its network layers that it does not have."""
    config = rh.make_config(preset, ['rays=99'])
    saved = {name: x for name, x in vars(config).items() if name not in rh.NOT_IN_THE_PAPERS}
    assert running.config_of(saved) == replace(config, base_aligned=0)


def test_a_checkpoint_keeps_the_settings_that_it_has():
    config = rh.make_config('small', ['cull=0', 'components=3'])
    assert running.config_of(vars(config)) == config
    without_preset = {'channels': 8, 'a_setting_of_old': 3}
    assert running.config_of(without_preset) == rh.Config(channels=8)


def test_an_old_checkpoint_is_read(tmp_path, tiny):
    old = {name: x for name, x in vars(tiny).items() if name not in rh.NOT_IN_THE_PAPERS}
    content = {'config': {**old, 'of_old': 1}, 'model': rh.Decoder(tiny).state_dict(), 'step': 0}
    running.write_checkpoint(tmp_path / 'decoder.pt', 'decoder', content)
    assert running.load_model('decoder', tmp_path, 'cpu').config == replace(tiny, base_aligned=0)
