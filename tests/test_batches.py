"""What a training step sees: the same samples for any number of ranks, processes, micro-batches."""

import pytest
import torch

import batches
import fit
import provenance
import rodinhd as rh
import running
import scenes


@pytest.fixture(scope='module')
def fits(data, tiny, tmp_path_factory):
    """A folder of random planes of two avatars, with their portraits."""
    folder = tmp_path_factory.mktemp('batches')
    torch.manual_seed(0)
    decoder = rh.Decoder(tiny)
    for avatar in scenes.list_avatars(data):
        portrait = provenance.of_portrait(avatar, tiny.portrait)
        planes = torch.rand(3, 8, 32, 32) * 2 - 1
        box = scenes.read_box(avatar)
        path = folder / f'{avatar.name}.pt'
        fit.write_planes(path, planes, box, tiny, decoder, [], {}, portrait=portrait)
    return folder


def are_equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(are_equal(a[name], b[name]) for name in a)
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def test_processes_that_are_spawned_read_the_same(data, tiny, fits):
    """As on macOS, on Windows and in Python 3.14: the data set is pickled."""
    draws = batches.Draws(batches.Planes(fits, data, tiny), 7, patches=2, side=16)
    parts, _ = batches.shares(3, 0, 1, micro=2)
    indices = list(batches.indices(2, 3, 5, 7, 7, parts))
    loader = torch.utils.data.DataLoader(
        draws,
        batch_sampler=indices,
        collate_fn=list,
        num_workers=1,
        multiprocessing_context='spawn',
    )
    assert draws.items.met.tolist() == [True, False]
    spawned = list(loader)
    assert draws.items.met.all()  # whom one process has met, all know
    assert [len(samples) for samples in spawned] == [2, 1, 2, 1]
    for samples, places in zip(spawned, indices, strict=True):
        here = [draws[place] for place in places]
        assert all(are_equal(a, b) for a, b in zip(samples, here, strict=True))
    assert 'patch' in spawned[0][1]
    assert 'patch' not in spawned[1][0]


@pytest.mark.parametrize('world', [1, 2, 3, 5, 7])
@pytest.mark.parametrize('micro', [0, 1, 2])
def test_each_sample_of_a_batch_is_seen_once(world, micro):
    seen = []
    for rank in range(world):
        parts, weight = batches.shares(5, rank, world, micro)
        places = [place for part in parts for place in part]
        assert places  # each rank takes part in each step
        assert max(map(len, parts)) <= (micro or 5)
        if weight:
            assert weight == 1 / 5
            seen += places
    assert sorted(seen) == [0, 1, 2, 3, 4]


def test_what_is_drawn_is_the_samples_own(data, tiny, fits):
    """A sample is the same in any company."""
    draws = batches.Draws(batches.Planes(fits, data, tiny), 7)
    samples = [draws[3, j, j % 2] for j in range(3)]

    def draw(batch, dice):
        return {
            'low': batches.degrade(batch['x_start'], 8, dice),
            'portrait': batches.photo(batch['portrait'], batch['alpha'], dice),
            'noise': dice.normal(3, 8),
        }

    together = batches.drawn(batches.collate(samples), draw, 'cpu')
    alone = batches.drawn(batches.collate(samples[2:]), draw, 'cpu')
    for name, x in together.items():
        assert torch.equal(x[2], alone[name][0])
        assert not torch.equal(x[0], x[2])


def test_what_is_read_can_be_pinned(data, tiny, fits):
    """A tensor some of whose values share memory cannot: CUDA's loaders would fail."""
    draws = batches.Draws(batches.Planes(fits, data, tiny), 7, patches=1, side=16)
    batch = batches.collate([draws[3, j, j % 2] for j in range(2)])
    tensors = [batch['planes'], batch['pixels'], *batch['patch'][0].values()]
    assert all(0 not in x.stride() for x in tensors)


def test_dice():
    """Numbers of all samples are even, each is handed out once, and they are no part of the
    noise."""
    dice = batches.Dice(range(2000))
    numbers = torch.cat([dice.uniform(2, 3).flatten(1), dice.between(-1, 3)[:, None] / 4 + 0.25], 1)
    noise = dice.normal(4)
    for x, mean, variance in ((numbers, 1 / 2, 1 / 12), (noise, 0, 1)):
        assert (x.mean(0) - mean).abs().max() < 5 * (variance / 2000) ** 0.5
        assert (x.var(0) / variance - 1).abs().max() < 0.2
    assert torch.corrcoef(torch.cat([numbers, noise], 1).T).fill_diagonal_(0).abs().max() < 0.12
    assert dice.below(3).bincount().tolist() == pytest.approx([667] * 3, abs=110)
    with pytest.raises(ValueError, match='more than 256'):
        dice.uniform(250)


def test_rays_of_views_are_joined_and_mirrored(data, tiny, fits):
    """Rays know their sample; a mirrored view is that of the mirrored sample alone."""
    draws = batches.Draws(batches.Planes(fits, data, tiny, low=True), 7, patches=2, side=16)
    samples = [draws[3, j, j % 2] for j in (2, 0, 1)]  # the first has no view
    assert ['rays' in sample for sample in samples] == [False, True, True]
    batch = batches.in_floats(batches.collate(samples))
    rays = batch['rays']
    assert rays['owner'].unique().tolist() == [1, 2]
    assert torch.equal(rays['rgb'][rays['owner'] == 2], samples[2]['rays']['rgb'])
    for place in (1, 2):
        assert rays['share'][rays['owner'] == place].sum() == pytest.approx(1, abs=1e-5)

    turned = batches.mirrored(batch, torch.tensor([True, False, True]))
    across = torch.tensor([-1.0, 1.0, 1.0])
    for name in ('rays_o', 'rays_d'):
        first, second = (turned['rays'][name][rays['owner'] == place] for place in (1, 2))
        assert torch.equal(first, samples[1]['rays'][name])
        assert torch.equal(second, samples[2]['rays'][name] * across)
    assert torch.equal(turned['portrait'][1], batch['portrait'][1])
    assert torch.equal(turned['portrait'][0], batch['portrait'][0].flip(-1))


def test_portraits_are_read_from_the_planes_file_while_they_are_the_folders(
    data, tiny, fits, monkeypatch, tmp_path
):
    (tmp_path / 'data').mkdir()
    avatar = scenes.list_avatars(data)[0]
    copy = tmp_path / 'data' / avatar.name
    copy.mkdir()
    for path in avatar.rglob('*'):
        target = copy / path.relative_to(avatar)
        if path.is_dir():
            target.mkdir()
        else:
            target.write_bytes(path.read_bytes())
    items = batches.Planes(fits, tmp_path / 'data', tiny)
    plain = scenes.portrait_of(avatar, tiny.portrait)

    with monkeypatch.context() as patch:
        patch.setattr(scenes, 'pixels_of_portrait', None)  # cannot be called
        assert torch.equal(batches.in_floats(items[0])['portrait'], plain[0])

    # Another portrait in the folder is seen
    other = scenes.list_avatars(data)[1]
    path = scenes.portrait_path(other)
    (copy / f'portrait{path.suffix}').write_bytes(path.read_bytes())
    assert torch.equal(
        batches.in_floats(items[0])['portrait'], scenes.read_portrait(path, tiny.portrait)[0]
    )


def test_portraits_have_one_name_whatever_way_leads_there(data, tiny):
    avatar = scenes.list_avatars(data)[0]
    around = avatar / '..' / avatar.name
    name = provenance.of_portrait(around, tiny.portrait)['name']
    assert name == provenance.of_portrait(avatar, tiny.portrait)['name']


def test_planes_that_are_not_finite_are_noticed():
    x = torch.randn(3, 8, 4, 4).half()
    assert batches.is_finite(x)
    for value in (float('nan'), float('inf'), -float('inf')):
        assert not batches.is_finite(torch.cat([x.flatten(), torch.tensor([value]).half()]))


ODD_HEIGHTS = ['base_attention=8,4,3', 'base_aware=16', 'base_attention=8,4,2,1']


@pytest.mark.parametrize('settings', ODD_HEIGHTS)
def test_a_height_that_there_is_not_is_refused(settings):
    with pytest.raises(rh.Stop, match='base_a'):
        rh.make_config('tiny', [settings])


def test_all_parameters_of_the_base_network_learn_without_one_of_the_maps(tiny):
    """0 says: at no height. Ranks would wait for the gradients of what nobody uses."""
    network = running.build('base', rh.make_config('tiny', ['base_attention=0,4,2']))
    assert network.tokens.used == [1, 2]
