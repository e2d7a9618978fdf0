"""paint.py: colours that words name are put onto hair and clothes, and onto nothing else."""
from pathlib import Path

import numpy as np
import pytest
import torch

import captions
import frozen
import likeness
import paint
import rodinhd as rh
import running

PALETTE = paint.Palette(*map(torch.tensor, (
    (0.1, 0.1, 0.1), (0.7, 0.5, 0.4), (0.2, 0.2, 0.6)  # hair, skin, clothes
)), falls=False)


@pytest.mark.parametrize('factor', ['hair', 'clothes'])
def test_what_is_painted_for_a_name_has_that_name(factor):
    table = {'hair': paint.HAIR, 'clothes': paint.CLOTHES}[factor]
    name_of = {'hair': captions.hair_name, 'clothes': captions.colour_name}[factor]
    assert list(table) == list(captions.VOCABULARY[factor])
    for name in table:
        assert name_of(paint.colour_of({factor: name}, factor).double().numpy()) == name


def test_shades_keep_the_name():
    for name in ('red', 'blue', 'green', 'grey', 'purple'):
        for shade in ('dark', 'light'):
            facts = {'clothes': name, 'shade': shade}
            colour = paint.colour_of(facts, 'clothes').double().numpy()
            said = captions.colour_name(colour)
            assert said == name or (name, shade, said) in {
                ('red', 'light', 'pink'), ('grey', 'dark', 'grey')}
            light = captions.lightness_and_hue(colour)[0]
            plain = captions.lightness_and_hue(np.array(paint.CLOTHES[name]))[0]
            assert (light < plain) == (shade == 'dark')


def seen_of(*pixels):
    """A Seen of pixels (colour, place)."""
    colours, places = (torch.tensor(x) for x in zip(*pixels))
    nothing = torch.zeros(0)
    return paint.Seen(colours, torch.ones(len(colours)), places, nothing, nothing, nothing, nothing)


def test_hair_and_clothes_are_told_by_place_and_colour():
    black, skin, blue = PALETTE[:3]
    hair, clothes = paint.hair_and_clothes(seen_of(
        (black.tolist(), (0.0, 0.0, 0.9)),     # hair on top,
        (black.tolist(), (0.0, 0.4, 0.4)),     # and behind
        (black.tolist(), (0.1, -0.4, 0.45)),   # an eye
        (skin.tolist(), (0.0, -0.4, 0.2)),     # the chin
        (blue.tolist(), (0.5, 0.0, -0.5)),     # a shoulder
        (black.tolist(), (0.5, 0.0, -0.5)),    # a dark button
        (skin.tolist(), (0.0, -0.2, -0.1)),    # the neck
    ), PALETTE)
    assert hair.tolist() == [1, 1, 0, 0, 0, 0, 0]
    assert clothes[:4].tolist() == [0] * 4 and clothes[4] == 1 and clothes[6] == 0


def test_hair_that_falls_is_told_from_clothes():
    falls = PALETTE._replace(falls=True)
    pixels = seen_of(
        (falls.hair.tolist(), (0.3, -0.3, -0.2)),      # on the chest
        (falls.clothes.tolist(), (0.3, -0.3, -0.25)),
        (falls.hair.tolist(), (0.3, -0.3, -0.9)),      # below where hair reaches
    )
    hair, clothes = paint.hair_and_clothes(pixels, falls)
    assert hair.tolist() == [1, 0, 0] and clothes[0] == 0 and clothes[1] == 1


def test_what_is_left_of_hair_gets_the_colour_of_skin():
    skin = PALETTE.skin
    assert paint.colour_of({'length': 'bald', 'hair': 'red'}, 'hair', skin) is skin
    assert paint.colour_of({'length': 'short'}, 'hair', skin) is None
    seen = seen_of((PALETTE.hair.tolist(), (0.0, 0.0, 0.9)))
    assert paint.parts_of(seen, PALETTE, {'length': 'bald'})['hair'].tolist() == [1]
    assert paint.parts_of(seen, PALETTE, {'clothes': 'red'}).keys() == {'clothes'}


def test_features_give_the_colour(mean):
    """Of guesses those that a decoder sees as it, from all sides, and the density stays."""
    planes, decoder = mean
    usual = planes[:, :, 40, 32].mean(0)
    dirs = torch.tensor([[0.0, 1.0, 0.0], [0.0, -1.0, 0.0]])
    white = torch.tensor(paint.HAIR['white'])
    found = paint.features_for(white, usual, dirs, decoder, torch.Generator().manual_seed(0))
    sigma, rgb = decoder(found.expand(2, -1), dirs)
    assert (rgb - white).abs().max() < 0.2
    assert torch.allclose(sigma, decoder(usual[None], None)[0].expand(2))


@pytest.fixture(scope='module')
def mean():
    """The mean of the avatars that trained the decoder of weights/, and that decoder."""
    decoder = running.load_model('decoder', Path(__file__).parents[1] / 'weights', 'cpu')
    return rh.resize_planes(decoder.start, 64), decoder


def test_an_avatar_gets_the_colour(mean, monkeypatch):
    monkeypatch.setattr(paint, 'ANGLES', [likeness.FRONT])
    monkeypatch.setattr(paint, 'SIDE', 48)
    monkeypatch.setattr(paint, 'STEPS', 40)
    planes, decoder = mean

    def colours(planes):
        field = frozen.freeze(planes, decoder)
        return paint.palette_of(paint.look(field, likeness.FRONT, 64))

    red = paint.recoloured(planes, decoder, {'clothes': 'red', 'sex': 'man'})
    before, after = colours(planes), colours(red)
    named = torch.tensor(paint.CLOTHES['red'])
    assert (after.clothes - named).norm() < 0.3 * (before.clothes - named).norm()
    assert (after.hair - before.hair).norm() < 0.1
    assert (after.skin - before.skin).norm() < 0.1
    density = planes.shape[1] // 4
    assert torch.equal(red[:, -density:], planes[:, -density:])


def test_nothing_is_painted_where_nothing_is_named_or_seen(mean):
    planes, decoder = mean
    assert paint.recoloured(planes, decoder, {'sex': 'man'}) is planes
    nobody = seen_of(*[((1.0, 1.0, 1.0), (0.0, 0.0, 0.0))] * paint.SIDE ** 2)
    assert paint.palette_of(nobody._replace(opacity=torch.zeros(paint.SIDE ** 2))) is None
