"""Rodin's latents: facts and sentences, CLIP, and the base network that is given its vectors."""
import json
import random

import pytest
import torch

import captions
import rodin
import rodinhd as rh
import running
import shortcuts
import train

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
    ('xyzzy', ['xyzzy']),
    ('', []),
])
def test_words_that_say_nothing_are_named(text, unknown):
    assert captions.understand(text).unknown == unknown


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
        'length': length, 'hair': 'brown', 'skin': 'pale', 'clothes': 'blue', 'shade': 'dark'
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
    network = running.build('base', rh.make_config('tiny', ['base_mult=1,1', 'latent_width=8']))
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
