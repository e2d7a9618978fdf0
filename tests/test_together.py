"""Many avatars that are fitted at once: the same field, rays and losses as each has alone."""
import shutil

import pytest
import torch

import fit
import rodinhd as rh
import running
import scenes
import together


@pytest.fixture(scope='module')
def views(data):
    """Both avatars' training views."""
    return [
        scenes.load_views(folder, 'train', scenes.read_box(folder))
        for folder in scenes.list_avatars(data)
    ]


def test_fields_of_many_are_those_of_each(tiny):
    decoder = rh.Decoder(tiny)
    planes = torch.randn(3, 3, tiny.channels, 9, 9, requires_grad=True)
    points = 2.1 * torch.rand(50, 3) - 1.05
    dirs = torch.nn.functional.normalize(torch.randn(50, 3), dim=-1)
    owner = torch.randint(3, (50,))
    fields = together.Fields(planes, decoder)
    ours = torch.cat([x.view(50, -1) for x in fields(points, owner, dirs)], dim=1)

    theirs = torch.empty_like(ours)
    for b in range(3):
        mine = owner == b
        found = rh.PlaneField(planes[b], decoder)(points[mine], dirs[mine])
        theirs[mine] = torch.cat([x.view(len(x), -1) for x in found], dim=1)
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    assert torch.allclose(fields(points, owner)[0], ours[:, 0], rtol=1e-4)

    (gradient,) = torch.autograd.grad(ours.square().sum(), planes, retain_graph=True)
    (other,) = torch.autograd.grad(theirs.square().sum(), planes)
    assert torch.allclose(gradient, other, rtol=1e-3, atol=1e-4)


def test_rays_are_of_their_owners_views(views, tiny):
    """Projected into the view that it is of, a ray has the colour of that pixel."""
    prepared = [rh.prepare(x, tiny, 'cpu', decoder_learns=False) for x in views]
    rays = together.RaysOfMany([x.rays for x in prepared], 'cpu')
    owner, rays_o, rays_d, colours = rays.draw(40, torch.Generator().manual_seed(0))
    assert owner.tolist() == [0] * 40 + [1] * 40
    for b, x in enumerate(views):
        mine = owner == b
        view = torch.cdist(rays_o[mine], x.c2w[:, :3, 3]).argmin(1)
        local = torch.einsum('ni,nij->nj', rays_d[mine], x.c2w[view, :3, :3])
        fx, fy, cx, cy = x.intrinsics[view].T
        column = (cx - fx * local[:, 0] / local[:, 2]).long()
        row = (cy + fy * local[:, 1] / local[:, 2]).long()
        assert torch.equal(colours[mine], rh.on_white(x.images[view, row, column]))


def test_a_march_of_many_finds_what_each_finds(tiny):
    decoder = rh.Decoder(tiny)
    planes = torch.randn(2, 3, tiny.channels, 16, 16)
    hull = torch.rand(tiny.grid, tiny.grid, tiny.grid) < 0.5
    cells = together.Cells([hull, None], tiny, 'cpu')
    size = 6
    rays_o, rays_d = rh.view_rays(rh.orbit_pose(30, 10), rh.intrinsics_of(34.0, size), size, size)
    offset = torch.rand(2 * size ** 2)
    owner = torch.arange(2).repeat_interleave(size ** 2)
    both = rays_o.repeat(2, 1), rays_d.repeat(2, 1)
    ours = together.march(
        together.Fields(planes, decoder), cells, owner, *both, tiny.steps, offset
    )
    for b, of_avatar in enumerate([hull, None]):
        grid = rh.OccupancyGrid(tiny.grid, tiny.steps, hull=of_avatar)
        if of_avatar is None:
            grid.occupied[:] = grid.near_occupied[:] = True
        field = rh.PlaneField(planes[b], decoder)
        theirs = rh.march(rays_o, rays_d, tiny.steps, grid, offset[owner == b], field)
        mine = owner[ours.ray_index] == b
        assert torch.equal(ours.ray_index[mine] - b * size ** 2, theirs.ray_index)
        assert torch.allclose(ours.points[mine], theirs.points, atol=1e-5)


def test_a_group_is_as_good_as_each_alone_and_one_that_is_damaged_is_named(
    data, tiny, tmp_path, capfd
):
    """The command: two avatars and a damaged one together, against each alone."""
    many = shutil.copytree(data, tmp_path / 'data')
    damaged = shutil.copytree(scenes.list_avatars(many)[0], many / 'zz')
    next((damaged / 'train').iterdir()).write_bytes(b'no image')
    scores = {}
    for name, count in (('alone', 1), ('together', 3)):
        folder = tmp_path / name
        torch.manual_seed(0)
        decoder = rh.Decoder(tiny)
        running.write_model(folder / 'decoder.pt', 'decoder', tiny, decoder.state_dict(), 0)
        args = ['--preset', 'tiny', '--data', many, '--fits', folder, '--together', count]
        with pytest.raises(rh.Stop, match='zz'):
            fit.main(fit.parse([str(x) for x in [*args, '--set', 'fit_steps=40', 'rays=128']]))
        assert 'zz is left out' in capfd.readouterr().err
        paths = [folder / f'{avatar.name}.pt' for avatar in scenes.list_avatars(data)]
        found = [running.read_checkpoint(path, 'planes')['psnr'] for path in paths]
        scores[name] = sum(sum(x) / len(x) for x in found) / len(found)
    assert scores['together'] > scores['alone'] - 1.0


@pytest.mark.parametrize('more', [['--decoder'], ['--seconds', '3']])
def test_together_is_of_the_second_stage_and_of_steps(more, tmp_path):
    args = fit.parse(['--preset', 'tiny', '--data', str(tmp_path), '--together', '2', *more])
    with pytest.raises(rh.Stop, match='--together'):
        fit.main(args)
