"""Rodin's latents: facts and sentences, CLIP, and the base network that is given its vectors."""
import dataclasses
import json
import random
import shutil
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import captions
import evaluate
import fit
import provenance
import rodin
import rodinhd as rh
import running
import sample
import scenes
import shortcuts
import train

pytestmark = pytest.mark.usefixtures('brief_descent')

WITH_Z = ['latent_width=8', 'clip_width=8', 'clip_batch=4', 'clip_steps=2']


@pytest.fixture
def config():
    return rh.make_config('tiny', WITH_Z)


# Sentences ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(('text', 'facts'), [
    ('a smiling woman with long red hair in a blue shirt',
     'expression smiling, sex woman, length long, hair red, clothes blue, outfit shirt'),
    ('a black man, bald, in a dark green suit',
     'group black, sex man, length bald, shade dark, clothes green, outfit suit'),
    ('Her hair is blonde. She wears a pink dress.', 'sex woman, hair blonde, clothes pink'),
    ('short grey hair, wearing black', 'length short, hair grey, clothes black'),
    ('a girl with curly hair and closed eyes', 'sex woman, length big, expression eyes closed'),
    ('man with no hair and a beard', 'sex man, length bald, beard full'),
    ('man without beard', 'sex man, beard none'),
    ('dark-skinned woman with light brown hair dressed in purple scrubs',
     'skin dark, sex woman, hair brown, clothes purple, outfit scrubs'),
    ('lady in red', 'sex woman, clothes red'),
    ('fair skin, dark hair', 'skin pale, hair black'),
    ('a white-haired T-shirt', 'hair white, outfit shirt'),
    ('light brown skin, black curls, purple top, female',
     'skin brown, hair black, length big, clothes purple, outfit shirt, sex woman'),
    ('a woman whose hair is long and brown, dressed in pink',
     'sex woman, length long, hair brown, clothes pink'),
    ('silver hair, navy blazer', 'hair grey, clothes blue, shade dark, outfit suit'),
])
def test_what_sentences_say(text, facts):
    understood = captions.understand(text)
    assert captions.describe(understood.facts) == facts
    assert not understood.unknown


@pytest.mark.parametrize(('text', 'unknown'), [
    ('an old man on a horse', ['old', 'horse']),
    ('a short woman', ['short']),  # it is not her hair
    ('a man with a red beard', ['red']),
    ('a man with a blue tie', ['blue']),
    ('long hair and a turquoise frobnicate', ['frobnicate']),  # it is worn
    ('xyzzy', ['xyzzy']),
    ('', []),
])
def test_words_that_say_nothing_are_named(text, unknown):
    assert captions.understand(text).unknown == unknown


def test_a_colour_of_something_unknown_is_not_that_of_hair():
    facts = captions.understand('long black hair and a turquoise frobnicate').facts
    assert facts == {'length': 'long', 'hair': 'black', 'clothes': 'turquoise'}


def test_captions_say_what_they_are_made_of():
    """Any facts, in all phrasings: understand is the inverse of caption."""
    rng = random.Random(0)
    for _ in range(300):
        facts = {}
        for factor, values in captions.VOCABULARY.items():
            if rng.random() < 0.5:
                facts[factor] = rng.choice(list(values))
        if facts.get('length') == 'bald':
            facts.pop('hair', None)
        text = captions.caption(facts, rng)
        assert captions.understand(text) == (facts, []), text


def test_words_are_in_one_place_each():
    """A word that a colour also is would never be read as the colour."""
    assert captions.words_of().keys().isdisjoint({*captions.COLOUR_OF, *captions.SHADE_OF})


# Portraits ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(('code', 'name'), [
    ('000000', 'black'), ('ffffff', 'white'), ('808080', 'grey'), ('c01818', 'red'),
    ('f08020', 'orange'), ('f0e030', 'yellow'), ('208030', 'green'), ('20c0b0', 'turquoise'),
    ('2040c0', 'blue'), ('8030a0', 'purple'), ('f090b0', 'pink'), ('6b4a35', 'brown'),
])
def test_colours_have_names(code, name):
    assert captions.colour_name(captions.of_hex(code)) == name


def drawn_portrait(hair_rows, width):
    """A schematic portrait: brown hair of a width down to a row, a face, blue clothes."""
    rgb = torch.ones(3, 256, 256)
    alpha = torch.zeros(1, 256, 256)

    def paint(rows, columns, code):
        colour = torch.tensor(captions.of_hex(code)).float() * 2 - 1
        rgb[:, rows, columns] = colour[:, None, None]
        alpha[:, rows, columns] = 1

    paint(slice(15, hair_rows), slice(128 - width, 128 + width), '6b4423')
    paint(slice(45, 120), slice(93, 163), 'd8a888')
    paint(slice(120, 150), slice(108, 148), 'd8a888')
    paint(slice(150, 256), slice(30, 226), '2040c0')
    return rgb, alpha


@pytest.mark.parametrize(('rows', 'width', 'length'), [
    (60, 40, 'short'), (160, 48, 'long'), (118, 48, 'chin-length'),
])
def test_what_a_portrait_shows(rows, width, length):
    facts = captions.seen_facts(*drawn_portrait(rows, width))
    assert facts == {
        'length': length, 'hair': 'brown', 'skin': 'pale', 'clothes': 'blue', 'shade': 'dark',
        'beard': 'none',
    }


def test_no_facts_are_seen_where_nothing_is_cut_out():
    rgb, alpha = drawn_portrait(60, 40)
    assert captions.seen_facts(rgb, torch.ones_like(alpha)) == {}


def test_json_says_more_than_the_portrait_and_a_caption_most(tmp_path):
    meta = {'identity': 'White_F_3+White_F_1', 'outfit': 'Busi', 'expression': 'wink',
            'hair': 'bald'}
    (tmp_path / 'transforms_train.json').write_text(json.dumps(meta))
    facts = captions.facts_of(tmp_path, *drawn_portrait(60, 40))
    assert facts['sex'] == 'woman' and facts['group'] == 'white' and facts['outfit'] == 'suit'
    assert facts['expression'] == 'winking' and facts['length'] == 'bald'
    (tmp_path / 'caption.txt').write_text('a laughing person in scrubs')
    facts = captions.facts_of(tmp_path, *drawn_portrait(60, 40))
    assert facts['expression'] == 'laughing' and facts['outfit'] == 'scrubs'
    assert facts['sex'] == 'woman'


def test_people_of_two_sexes_have_none():
    assert captions.people_of('White_F_3+Asian_M_1') == {}
    assert captions.people_of('anybody') == {}


# CLIP ---------------------------------------------------------------------------------------------
def test_contrastive_loss_against_loops(config):
    network = rodin.Clip(config)
    torch.nn.init.normal_(network.facts)
    F = len(captions.FACTS)
    said = torch.zeros(3, F)
    facts = torch.zeros(3, F)
    facts[0, :2] = 1
    facts[1, 1:3] = 1
    facts[2, 1] = 1
    said[:, 1] = 1  # true of all three
    said[0, 0] = 1  # of the first alone
    batch = {
        'image': torch.rand(3, 3, 64, 64), 'other': torch.rand(3, 3, 64, 64),
        'said': said, 'facts': facts,
    }
    z, other, words, scale = network(batch['image'], batch['other'], said)
    logits = scale * words @ z.T / 8
    true = [[1, 0, 0], [1, 1, 1], [1, 1, 1]]
    by_words = 0
    by_images = 0
    for i in range(3):
        for j in range(3):
            if true[i][j]:
                by_words -= (logits[i, j] - logits[i].logsumexp(0)) / sum(true[i]) / 3
                column = sum(row[j] for row in true)
                by_images -= (logits[i, j] - logits[:, j].logsumexp(0)) / column / 3
    pairs = scale * z @ other.T / 8
    picks = torch.arange(3)
    both = torch.nn.functional.cross_entropy(pairs, picks)
    both = both + torch.nn.functional.cross_entropy(pairs.T, picks)
    terms = rodin.clip_loss(network, batch)
    assert torch.allclose(terms['words'], by_words / 2, atol=1e-5)
    assert torch.allclose(terms['images'], by_images / 2, atol=1e-5)
    assert torch.allclose(terms['pairs'], both / 4, atol=1e-5)


def test_vectors_lie_on_one_sphere_and_unseen_facts_are_known_as_such(config):
    network = rodin.Clip(config)
    z = network.encode_images(torch.rand(2, 3, 64, 64) * 2 - 1)
    assert torch.allclose(z.norm(dim=1), torch.tensor(8.0).sqrt().expand(2))
    network.facts.data[captions.NUMBERS['hair', 'red']] = 1
    assert network.knows(('hair', 'red')) and not network.knows(('hair', 'blue'))
    a, b = network.encode_texts(['red hair', 'ginger hair'])
    assert torch.equal(a, b)


def test_whose_hair_has_a_colour_is_not_bald(config, monkeypatch):
    """Of two draws the bald one is nearer to what is asked, but taken where bald is asked alone."""
    torch.manual_seed(0)
    clip = rodin.Clip(config)
    torch.nn.init.normal_(clip.facts)
    clip.log_scale.data.fill_(4)
    rows = torch.stack([captions.as_vector({'length': value}) for value in ('bald', 'short')])
    draws = clip.encode_facts(rows)
    monkeypatch.setattr(rodin, 'draw_latents', lambda *args: draws)
    monkeypatch.setattr(rodin, 'FINALISTS', 2)
    monkeypatch.setattr(rodin, 'fronts_of', lambda models, z, seed: z)
    monkeypatch.setattr(clip, 'encode_images', lambda z: z)
    models = {'clip': clip, 'text': None}
    red = {'hair': 'red'}
    near = draws @ clip.encode_facts(captions.as_vector(red)[None])[0] / 8
    near = near + rodin.odds_of(clip, draws, 'hair')['red']
    assert near[0] > near[1]
    assert torch.equal(rodin.vectors_of(models, red)[0], draws[1])
    assert torch.equal(rodin.vectors_of(models, red | {'length': 'bald'})[0], draws[0])


def test_the_avatar_that_shows_it_is_taken(config, monkeypatch):
    """Not the vector that says it: of two finalists the second one's avatar is what was asked."""
    torch.manual_seed(0)
    clip = rodin.Clip(config)
    torch.nn.init.normal_(clip.facts)
    rows = torch.stack([captions.as_vector({'length': value}) for value in ('bald', 'long')])
    draws = clip.encode_facts(rows)
    monkeypatch.setattr(rodin, 'draw_latents', lambda *args: draws)
    monkeypatch.setattr(rodin, 'FINALISTS', 2)
    monkeypatch.setattr(rodin, 'fronts_of', lambda models, z, seed: z)
    monkeypatch.setattr(clip, 'encode_images', lambda z: z.flip(0))
    models = {'clip': clip, 'text': None}
    found = rodin.vectors_of(models, {'length': 'bald'})[0]
    expected = rodin.how_sure(clip, draws.flip(0), {'length': 'bald'}).argmax()
    assert torch.equal(found, draws[expected])
    assert rodin.how_sure(clip, draws, {'length': 'bald'}).argmax() != expected


def test_hair_that_gets_a_colour_grows_first_on_who_is_bald():
    grown = rodin.with_needed({'length': 'bald'}, {'hair': 'red'})
    assert grown == {'hair': 'red', 'length': 'short'}
    assert rodin.with_needed({'length': 'long'}, {'hair': 'red'}) == {'hair': 'red'}
    assert rodin.with_needed({'length': 'bald'}, {'clothes': 'red'}) == {'clothes': 'red'}


# Edits --------------------------------------------------------------------------------------------
def texel(region, plane, first, second, R=41):
    """The weight of a plane (0: xy, 1: xz, 2: yz) at two coordinates in [-1, 1]."""
    column, row = (round((x + 1) / 2 * (R - 1)) for x in (first, second))
    return region[plane, 0, row, column].item()


def test_edits_are_where_what_they_name_is():
    clothes = rodin.region_of({'clothes': 'red', 'shade': 'dark'}, 41)
    assert texel(clothes, 1, 0, 0.5) == texel(clothes, 2, 0.2, 0.3) == 0  # the face
    assert texel(clothes, 1, 0, -0.5) == texel(clothes, 0, 0.9, 0) == 1  # chest, shoulders
    face = rodin.region_of({'expression': 'sad'}, 41)
    assert texel(face, 1, 0, 0.5) == texel(face, 0, 0, 0) == 1
    assert texel(face, 1, 0, -0.1) == texel(face, 0, 0.9, 0) == texel(face, 1, 0.9, 0.5) == 0
    hair = rodin.region_of({'hair': 'red'}, 41)
    assert texel(hair, 1, 0.3, -0.3) == 1 and texel(hair, 1, 0.3, -0.7) == 0
    both = rodin.region_of({'hair': 'red', 'clothes': 'red'}, 41)
    assert torch.equal(both, torch.maximum(hair, rodin.region_of({'clothes': 'red'}, 41)))
    assert rodin.region_of({'sex': 'man'}, 41).min() == 1


def test_z_moves_by_the_difference_of_two_sentences(config):
    clip = rodin.Clip(config)
    torch.nn.init.normal_(clip.facts)
    z = rodin.on_sphere(torch.randn(1, 8))[0]
    source = rodin.facts_seen(clip, z)
    colour = 'red' if source['clothes'] != 'red' else 'blue'
    target = {**source, 'clothes': colour}
    target.pop('shade')
    delta = clip.encode_facts(captions.as_vector(target)[None])
    delta = delta - clip.encode_facts(captions.as_vector(source)[None])
    moved = z + 1.5 * delta[0]
    expected = moved / moved.norm() * 8 ** 0.5
    assert torch.allclose(rodin.edited(clip, z, {'clothes': colour}, 1.5), expected, atol=1e-5)
    assert torch.allclose(rodin.edited(clip, z, {'clothes': colour}, 0), z, atol=1e-5)


def test_who_becomes_bald_has_no_colour_of_hair():
    assert rodin.with_facts({'hair': 'red'}, {'length': 'bald'}) == {'length': 'bald'}
    assert rodin.with_facts({'shade': 'dark'}, {'clothes': 'red'}) == {'clothes': 'red'}


# The base network ---------------------------------------------------------------------------------
@pytest.fixture
def weights_without_z(tmp_path):
    """runs/base.pt of a network without z."""
    config = rh.make_config('tiny')
    network = shortcuts.base_network(config)
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.05)
    running.write_model(tmp_path / 'base.pt', 'base', config, network.state_dict(), 0)
    return tmp_path


def test_old_weights_begin_a_network_with_z_which_then_changes_nothing(config, weights_without_z):
    old = running.load_model('base', weights_without_z, 'cpu')
    new = running.build('base', config)
    train.initialise(new, 'base', weights_without_z)
    assert set(new.state_dict()) > set(old.state_dict())
    z = torch.randn(2, 8)
    x = torch.randn(2, 3, config.channels, 8, 8)
    t = torch.tensor([10, 900])
    with torch.no_grad():
        expected = old(x, t, rh.nobody(config, 2))
        assert torch.equal(new(x, t, rh.nobody(config, 2)), expected)
        assert torch.equal(new(x, t, rh.nobody(config, 2, z)), expected)
        torch.nn.init.normal_(new.vector.weight)
        assert not torch.allclose(new(x, t, rh.nobody(config, 2, z)), expected)


def test_weights_that_lack_more_than_z_are_refused(config, weights_without_z):
    network = running.build('base', rh.make_config('tiny', ['base_width=16', 'latent_width=8']))
    with pytest.raises(rh.Stop, match='other sizes'):
        train.initialise(network, 'base', weights_without_z)


def test_portrait_and_vector_are_dropped_independently(config):
    portrait = rh.nobody(config, 4, torch.ones(4, 8))
    portrait = portrait._replace(latent=torch.ones_like(portrait.latent))
    keep = torch.tensor([True, True, False, False])
    keep_vector = torch.tensor([True, False, True, False])
    dropped = rh.drop(portrait, keep, keep_vector)
    assert dropped.latent.flatten(1).amax(1).tolist() == [1, 1, 0, 0]
    assert dropped.vector.amax(1).tolist() == [1, 0, 1, 0]
    assert not rh.drop(portrait).vector.any()


def test_the_vector_weighs_components_where_there_is_no_portrait():
    config = rh.make_config('tiny', WITH_Z)
    prior = shortcuts.Prior(config, 8, 2, 8)
    torch.nn.init.normal_(prior.components)
    torch.nn.init.normal_(prior.by_vector[-1].weight)
    seen = rh.nobody(config, 1, torch.ones(1, 8))
    shown = seen._replace(latent=torch.ones_like(seen.latent))
    nothing = torch.zeros(1, 8)
    with torch.no_grad():
        assert torch.equal(prior(shown.latent, shown.vector), prior(shown.latent))
        assert torch.equal(prior(seen.latent, nothing), prior(seen.latent))
        weights = prior.weights(seen.latent) + prior.by_vector(seen.vector)
        expected = prior.mean + torch.tensordot(weights, prior.components, 1)
        assert torch.allclose(prior(seen.latent, seen.vector), expected)


# Whole scripts ------------------------------------------------------------------------------------
TINY = ['--preset', 'tiny', '--device', 'cpu']
Z = ['latent_width=8', 'clip_width=8', 'prior_width=16', 'prior_layers=1', 'prior_timesteps=10']
FEW = ['clip_steps=2', 'prior_steps=2', 'text_steps=2', 'base_steps=2', 'sample_steps=2',
       'clip_batch=4', 'prior_batch=4', 'text_batch=4', 'base_batch=2', 'likeness_steps=2',
       'steps=16', 'grid=8']


def run(script, *options):
    script.main(script.parse([str(option) for option in options]))


@pytest.fixture(scope='module')
def trained(data, tiny, tmp_path_factory):
    """A folder with data/, fits/ and runs/: random networks, of which those that know z were then
    trained for two steps."""
    folder = tmp_path_factory.mktemp('latents')
    for name in ('fits', 'runs', 'old'):
        (folder / name).mkdir()
    torch.manual_seed(0)
    places = {'decoder': 'fits', 'vae': 'runs', 'upsample': 'runs', 'base': 'old'}
    for kind, place in places.items():
        config = rh.make_config('tiny', ['sample_steps=2', 'steps=16', 'grid=8'])
        build, _ = running.MAKERS[kind]
        path = folder / place / f'{kind}.pt'
        running.write_model(path, kind, config, build(config).state_dict(), 0)
    decoder = running.load_model('decoder', folder / 'fits', 'cpu')
    for avatar in scenes.list_avatars(data):
        path = folder / 'fits' / f'{avatar.name}.pt'
        planes = 0.3 * torch.randn(3, 8, 32, 32)
        box = scenes.read_box(avatar)
        source = provenance.of_avatar(avatar)
        fit.write_planes(path, planes, box, tiny, decoder, [20.0], {'fit_steps': 2}, source)
    places = ['--data', data, '--fits', folder / 'fits', '--runs', folder / 'runs']
    for stage in ('clip', 'prior', 'text', 'base'):
        init = ['--init', folder / 'old'] if stage == 'base' else []
        run(train, '--stage', stage, *TINY, *places, *init, '--set', *Z, *FEW)
    return folder


def sample_in(folder, out, *options):
    places = ['--runs', folder / 'runs', '--fits', folder / 'fits', '--out', out]
    run(sample, *places, '--device', 'cpu', '--frames', 2, '--size', 32, *options)


def planes_in(out):
    (path,) = out.glob('*/planes.pt')
    return running.read_checkpoint(path, 'avatars')['planes']


def test_the_base_network_is_of_its_clip(trained, tmp_path):
    models = running.load_models(trained / 'runs', trained / 'fits')
    assert models.keys() == running.MODELS.keys()
    running.load_latents(models, 'prior', 'text')
    assert models['base'].made_with['clip'] == models['clip'].fingerprint
    assert models['text'].made_with['clip'] == models['clip'].fingerprint

    shutil.copytree(trained / 'runs', tmp_path / 'runs')
    other = rodin.Clip(models['clip'].config)
    path = tmp_path / 'runs' / 'clip.pt'
    running.write_model(path, 'clip', other.config, other.state_dict(), 0)
    models = running.load_models(tmp_path / 'runs', trained / 'fits')
    with pytest.raises(rh.Stop, match=r'base\.pt: was made with another clip'):
        running.load_latents(models)


def test_words_become_an_avatar(trained, tmp_path, capsys):
    clip = running.load_clip(trained / 'runs', 'cpu')
    known = [colour for colour in captions.COLOURS if clip.knows(('clothes', colour))]
    options = ['--prompt', f'an old asdf with {known[0]} clothes']
    sample_in(trained, tmp_path / 'a', *options)
    printed = capsys.readouterr().out
    assert 'by the latents of Rodin' in printed
    assert 'not understood: old, asdf' in printed
    sample_in(trained, tmp_path / 'b', *options)
    assert torch.equal(planes_in(tmp_path / 'a'), planes_in(tmp_path / 'b'))
    sample_in(trained, tmp_path / 'c', *options, '--seed', 1)
    assert not torch.equal(planes_in(tmp_path / 'a'), planes_in(tmp_path / 'c'))


@pytest.mark.parametrize(('options', 'message'), [
    (['--prompt', 'xyzzy plugh'], 'none of these words is known'),
    (['--prompt', ''], '--prompt: is empty'),
    (['--prompt', 'red hair ' * 2000], '--prompt: 18000 letters'),
    (['--prompt', 'red hair', '--edit', 'blue hair'], '--edit goes with one --portrait'),
    (['--unconditional', '--edit', 'blue hair'], '--edit goes with one --portrait'),
    (['--unconditional', '--strength', '-1'], '--strength -1'),
])
def test_words_that_cannot_be_used_end_in_one_line(trained, tmp_path, options, message):
    with pytest.raises(rh.Stop, match=message) as error:
        sample_in(trained, tmp_path, *options)
    assert '\n' not in str(error.value)


def test_nobody_is_drawn_from_the_prior(trained, tmp_path):
    """Two avatars of nobody have different vectors, which the networks that see them show."""
    sample_in(trained, tmp_path, '--unconditional', '--count', 2)
    models = running.load_models(trained / 'runs', trained / 'fits')
    running.load_latents(models, 'prior')
    z = rodin.draw_latents(models['prior'], 2)
    assert torch.allclose(z[1:], rodin.draw_latents(models['prior'], 1, seed=1), atol=1e-4)
    some = rh.nobody(models['base'].config, 2, z)
    expected = rh.generate(models, some).planes
    assert torch.allclose(planes_in(tmp_path).float(), expected, atol=2e-3)


def test_edits_change_an_avatar_by_their_strength(trained, data, tmp_path):
    portrait = scenes.portrait_path(scenes.list_avatars(data)[0])
    clip = running.load_clip(trained / 'runs', 'cpu')
    known = [colour for colour in captions.COLOURS if clip.knows(('clothes', colour))]
    options = ['--portrait', portrait, '--edit', f'{known[0]} clothes', f'in {known[-1]}']
    sample_in(trained, tmp_path / 'a', *options)
    (strip,) = (tmp_path / 'a').glob('*/edits.png')
    with Image.open(strip) as image:
        assert image.size == (5 * 32, 2 * 32)
    planes = planes_in(tmp_path / 'a')
    assert len(planes) == 3
    sample_in(trained, tmp_path / 'b', *options, '--strength', 0)
    still = planes_in(tmp_path / 'b')
    assert torch.equal(still[0], planes[0])
    assert torch.equal(still[1], still[0]) and torch.equal(still[2], still[0])


def test_models_without_words_say_so(trained, tmp_path):
    models = running.load_models(trained / 'runs', trained / 'fits')
    shutil.copytree(trained / 'runs', tmp_path / 'runs')
    shutil.copy(trained / 'old' / 'base.pt', tmp_path / 'runs' / 'base.pt')
    models = running.load_models(tmp_path / 'runs', trained / 'fits')
    assert not running.has_latents(models, 'text')
    with pytest.raises(rh.Stop, match='takes no vectors'):
        running.load_latents(models, 'text')


def test_a_base_network_that_sees_vectors_alone_is_given_them(trained, tmp_path):
    """As `rodin` has it: with condition_drop=1 a portrait is its vector."""
    shutil.copytree(trained / 'runs', tmp_path / 'runs')
    old = running.load_model('base', tmp_path / 'runs', 'cpu')
    config = dataclasses.replace(old.config, condition_drop=1.0)
    weights = old.state_dict()
    weights['vector.weight'] = torch.randn_like(weights['vector.weight'])
    running.write_model(tmp_path / 'runs' / 'base.pt', 'base', config, weights, 0)
    models = running.load_models(tmp_path / 'runs', trained / 'fits')
    clip = running.load_clip(tmp_path / 'runs', 'cpu')
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    made = rh.generate(models, images)
    expected = rh.generate(models, rh.nobody(config, 2, clip.encode_images(images)))
    assert torch.equal(made.low, expected.low)
    assert not torch.allclose(made.low[0], made.low[1], atol=0.01)


def test_evaluation_of_vectors(trained, data, tmp_path):
    places = ['--data', data, '--fits', trained / 'fits', '--runs', trained / 'runs']
    places += ['--out', tmp_path, '--device', 'cpu', '--views', 1]
    run(evaluate, *places, '--rows', 'latent', '--guidance', 1, 3, '--count', 1)
    measured = json.loads((tmp_path / 'evaluate.json').read_text())
    assert list(measured['mean']) == ['latent, s=1, 2 steps', 'latent, s=3, 2 steps']
    run(evaluate, *places, '--unconditional', 2, '--name', 'prior')
    run(evaluate, *places, '--unconditional', 2, '--null', '--name', 'null')
    prior, null = (json.loads((tmp_path / f'{x}.json').read_text()) for x in ('prior', 'null'))
    assert prior['training_to_training'] == null['training_to_training']
    with pytest.raises(rh.Stop, match='--evaluate has no use for --null'):
        run(evaluate, *places, '--null')


# Published CLIP -----------------------------------------------------------------------------------
@pytest.fixture
def published(tmp_path):
    """A folder with a small random CLIP of transformers, of the published one's classes."""
    transformers = pytest.importorskip('transformers')
    letters = [chr(i) for i in range(33, 127)]
    words = [*letters, *(f'{x}</w>' for x in letters), '<|startoftext|>', '<|endoftext|>']
    (tmp_path / 'vocab.json').write_text(json.dumps({x: i for i, x in enumerate(words)}))
    (tmp_path / 'merges.txt').write_text('#version: 0.2\n')
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = transformers.CLIPConfig(
        text_config=dict(
            sizes, vocab_size=len(words), max_position_embeddings=77, eos_token_id=len(words) - 1
        ),
        vision_config=dict(sizes, image_size=32, patch_size=16),
        projection_dim=24,
    )
    tokenizer = transformers.CLIPTokenizer(
        str(tmp_path / 'vocab.json'), str(tmp_path / 'merges.txt')
    )
    transformers.CLIPModel(config).save_pretrained(tmp_path / 'published')
    tokenizer.save_pretrained(tmp_path / 'published')
    return tmp_path / 'published'


def test_published_clip_has_the_same_methods(published, tmp_path):
    run(train, '--stage', 'clip', '--clip', published, '--runs', tmp_path / 'runs')
    clip = running.load_clip(tmp_path / 'runs', 'cpu')
    assert clip.config.latent_width == 24
    z = clip.encode_images(torch.rand(2, 3, 64, 64) * 2 - 1)
    words = clip.encode_texts(['a man', 'a man with a very long red beard ' * 30])
    rows = torch.stack([captions.as_vector({'sex': 'man', 'hair': 'red'})] * 2)
    for x in (z, words, clip.encode_facts(rows)):
        assert x.shape == (2, 24)
        assert torch.allclose(x.norm(dim=1), torch.tensor(24.0).sqrt().expand(2))


def test_published_clip_against_the_model_itself(published):
    """The same numbers as CLIPModel gives, up to the length that we set."""
    clip = rodin.load_published(published)
    images = torch.rand(2, 3, 32, 32)
    mean = torch.tensor(clip.MEAN)[:, None, None]
    pixels = (images - mean) / torch.tensor(clip.STD)[:, None, None]
    tokens = clip.tokenizer(['red hair', 'a man'], padding=True, return_tensors='pt')
    with torch.no_grad():
        out = clip.model(pixel_values=pixels, **tokens)
        z = clip.encode_images(images * 2 - 1)
        words = clip.encode_texts(['red hair', 'a man'])
    for ours, theirs in ((z, out.image_embeds), (words, out.text_embeds)):
        assert torch.allclose(ours, theirs * 24 ** 0.5, atol=1e-4)


def test_what_is_no_published_clip_is_refused(published, tmp_path):
    with pytest.raises(rh.Stop, match='no CLIP of transformers'):
        rodin.load_published(tmp_path / 'nothing')
    from safetensors.torch import load_file, save_file
    weights = load_file(published / 'model.safetensors')
    weights.pop('visual_projection.weight')
    save_file(weights, published / 'model.safetensors', metadata={'format': 'pt'})
    with pytest.raises(rh.Stop, match=r'missing_keys.*visual_projection'):
        rodin.load_published(published)


def test_training_on_takes_vectors_where_the_shipped_network_does(tmp_path):
    """With --init; --set has the last word."""
    config = rh.make_config('tiny', ['latent_width=16', 'latent_drop=0.5'])
    network = running.build('base', config)
    running.write_model(tmp_path / 'base.pt', 'base', config, network.state_dict(), 0)
    command = ['--stage', 'base', '--preset', 'tiny', '--init', str(tmp_path)]

    def settings(*more):
        args = train.parse([*command, *more])
        return rh.make_config(args.preset, [*train.of_init(args), *args.set])

    assert settings().latent_width == 16
    assert settings().latent_drop == 0.5
    assert settings('--set', 'latent_width=0').latent_width == 0
    assert train.of_init(train.parse(['--stage', 'upsample', '--init', str(tmp_path)])) == []


def test_a_sentence_that_says_nothing_is_refused():
    clip = SimpleNamespace(knows=lambda fact: False)
    for sentence in ('', 'xyz', 'a man'):  # of a fact that training has not seen
        with pytest.raises(rh.Stop, match='give a photograph, or words'):
            rodin.planes_of({'clip': clip}, sentence)
