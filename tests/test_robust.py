"""Nothing is lost: whole files, one writer, exact resumes, the same mathematics on any number of
ranks, no NaN."""
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import forks
import pytest
import torch

import batches
import fit
import rodinhd as rh
import running
import scenes
import train

ROOT = Path(__file__).parent.parent


def start(program, *args, cwd=None):
    """Starts a script (a path) or a program (its text) in a process that imports all anew."""
    command = [sys.executable]
    if not isinstance(program, Path):
        command.append('-c')
    return subprocess.Popen(
        [str(item) for item in (*command, program, *args)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)},
    )


# Seconds in which any process here ends, on a machine that does twenty other things; who takes
# longer hangs
LONG = 1200


def assert_ended_in_one_line(process, beginning, part=''):
    """Waits for a process: it must fail, and say so in one line."""
    _, err = process.communicate(timeout=LONG)
    assert process.returncode == 1, err
    assert err.startswith(beginning), err
    assert part in err, err
    assert err.count('\n') == 1, err


def assert_succeeds(process):
    """Waits for a fork, which must succeed."""
    process.join(LONG)
    assert process.exitcode == 0


# Files --------------------------------------------------------------------------------------------
@pytest.mark.parametrize('kind', ['checkpoint', 'bytes'])
def test_a_write_that_fails_half_way_leaves_the_old_file(tmp_path, kind):
    """Files may not grow over 100 kB: as on a full disk, the write begins and fails."""
    running.write_checkpoint(tmp_path / 'a.pt', 'x', {'n': 1})
    message = forks.refusal(forks.fill_the_disk, tmp_path / 'a.pt', kind)
    assert message.startswith(f'{tmp_path}/a.pt: cannot be written')
    assert '\n' not in message
    assert running.read_checkpoint(tmp_path / 'a.pt', 'x')['n'] == 1
    assert [path.name for path in tmp_path.iterdir()] == ['a.pt']


def test_a_folder_that_is_a_file_ends_in_one_line(tmp_path):
    (tmp_path / 'fits').write_text('')
    process = start(ROOT / 'fit.py', '--decoder', '--preset', 'tiny', cwd=tmp_path)
    assert_ended_in_one_line(process, 'error: ', 'fits')


IN_A_PROCESS = '''
import torch
import endings
import rodinhd as rh

class Damaged(torch.utils.data.Dataset):
    def __len__(self):
        return 1
    def __getitem__(self, i):
        rh.stop('a.png: not a readable image')

next(iter(torch.utils.data.DataLoader(Damaged(), num_workers=1)))
'''


def test_what_a_process_of_a_loader_refuses_is_one_line(tmp_path):
    process = start(IN_A_PROCESS, cwd=tmp_path)
    assert_ended_in_one_line(process, 'error: a.png: not a readable image')


def test_functions_raise_an_exception_that_callers_can_catch():
    with pytest.raises(Exception, match='no such setting'):
        rh.make_config('tiny', ['nothing=1'])


def test_a_claim_ends_with_its_process(tmp_path):
    holder = forks.hold(tmp_path / 'a.pt')
    with running.claim(tmp_path / 'a.pt') as mine:
        assert not mine
    with running.claim(tmp_path / 'b.pt') as mine:
        assert mine
    holder.kill()
    holder.join()
    with running.claim(tmp_path / 'a.pt') as mine:
        assert mine


# Steps that are not finite ------------------------------------------------------------------------
def test_steps_that_are_not_finite_are_skipped_then_stop():
    finite = rh.Finite('stage', most=3)
    good = torch.ones(2)
    bad = torch.tensor([1.0, float('nan')])
    taken = [finite(x) for x in (good, bad, bad, good, bad)]
    assert taken == [True, False, False, True, False]
    assert finite.skipped == 3
    assert not finite(good, torch.tensor(float('inf')))
    with pytest.raises(rh.Stop, match='stage: loss or gradient not finite 3 times in a row'):
        finite(bad)


def test_fitting_skips_a_loss_that_is_not_finite(data, tiny, monkeypatch):
    calls = []
    original = rh.total_variation

    def poisoned(planes):
        calls.append(1)
        return original(planes) * (float('nan') if len(calls) == 2 else 1)

    monkeypatch.setattr(rh, 'total_variation', poisoned)
    folder = scenes.list_avatars(data)[0]
    decoder = rh.Decoder(tiny)
    optimizer = torch.optim.Adam(decoder.parameters(), lr=1e-3)
    visit = rh.fit_avatar(
        scenes.load_views(folder, 'train', scenes.read_box(folder)),
        rh.new_planes(decoder, tiny, torch.Generator().manual_seed(0)),
        decoder,
        tiny,
        rh.by_steps(20),
        joint=rh.Joint(optimizer, None, lambda: None),
    )
    assert len(calls) == 3  # at steps 0, 8 and 16
    assert visit.planes.isfinite().all()
    assert all(p.isfinite().all() for p in decoder.parameters())
    assert all(x.isfinite().all() for x in visit.memory['fisher'].values())


# Training -----------------------------------------------------------------------------------------
BRIEF = ('steps=16', 'grid=8', 'sample_steps=2')  # pictures of few samples a ray, in two steps


@pytest.fixture(scope='module')
def trained(data, tiny, tmp_path_factory):
    """A folder with data/, fits/ (random planes) and runs/vae.pt: base and upsample can be trained
    in it."""
    folder = tmp_path_factory.mktemp('robust')
    (folder / 'data').symlink_to(data)
    torch.manual_seed(0)
    decoder = rh.Decoder(tiny)
    fits = folder / 'fits'
    running.write_model(fits / 'decoder.pt', 'decoder', tiny, decoder.state_dict(), 0)
    running.write_model(folder / 'runs/vae.pt', 'vae', tiny, rh.VAE(tiny).state_dict(), 0)
    for avatar in scenes.list_avatars(data):
        path = fits / f'{avatar.name}.pt'
        planes = 0.3 * torch.randn(3, 8, 32, 32)
        fit.write_planes(path, planes, scenes.read_box(avatar), tiny, decoder, [], {})
    return folder


def training(folder, runs, stage, *settings, options=()):
    """The command line of train.py for a stage, with a folder `runs` of its own."""
    (folder / runs).mkdir(exist_ok=True)
    (folder / runs / 'vae.pt').write_bytes((folder / 'runs/vae.pt').read_bytes())
    folders = ['--data', folder / 'data', '--fits', folder / 'fits', '--runs', folder / runs]
    command = ['--stage', stage, '--preset', 'tiny', *folders, '--log-every', 1, *options]
    return [str(item) for item in (*command, '--set', *BRIEF, *settings)]


def logged(path):
    """The lines of a log, as dicts."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_three_ranks_do_the_mathematics_of_one(trained):
    """8 steps of a batch of 4: weights of three ranks with 2, 1 and 1 samples, one at a time,
    against those of one rank.

    Of the base network: in the others some gradients are zero but for rounding (a bias before a
    normalisation by channel), and Adam makes steps of such.
    """
    settings = ('base_steps=8', 'base_batch=4')
    train.main(train.parse(training(trained, 'one', 'base', *settings)))
    one_at_a_time = ['--micro-batch', 1, '--patience', LONG / 60]
    three_ranks = training(trained, 'three', 'base', *settings, options=one_at_a_time)
    assert_succeeds(forks.start(forks.torchrun, 3, 'train', three_ranks))

    weights = []
    for runs in ('one', 'three'):
        state = running.read_checkpoint(trained / runs / 'base-state.pt', 'base-state')
        weights.append(torch.cat([x.flatten() for x in state['model'].values()]))
    one, three = weights
    assert (one - three).norm() < 1e-5 * one.norm()
    assert not torch.equal(one, three)
    losses = [logged(trained / runs / 'base.jsonl')[0]['mse'] for runs in ('one', 'three')]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)  # of the whole batch


def test_training_begins_with_weights_that_are_there(trained):
    def run(runs, *settings, options=()):
        settings = ('vae_batch=2', *settings)
        train.main(train.parse(training(trained, runs, 'vae', *settings, options=options)))
        return running.load_model('vae', trained / runs, 'cpu').state_dict()

    def distance(a, b):
        return max((a[name] - b[name]).abs().max() for name in a)

    from_first = ['--init', trained / 'first']
    first = run('first', 'vae_steps=3', 'vae_lr=1e-2')
    after = run('after', 'vae_steps=1', 'vae_lr=1e-6', options=from_first)
    anew = run('anew', 'vae_steps=1', 'vae_lr=1e-6')
    assert distance(after, first) < 1e-4 < distance(anew, first)

    with pytest.raises(rh.Stop, match=r'settings \(init\)'):
        run('after', 'vae_steps=1', 'vae_lr=1e-6')
    message = r'vae\.pt: has other sizes than asked for; use --preset tiny'
    with pytest.raises(rh.Stop, match=message):
        run('sizes', 'vae_steps=1', 'vae_latent=8', options=from_first)
    with pytest.raises(SystemExit):
        train.parse(['--stage', 'lora', '--init', 'weights'])


@pytest.mark.parametrize('stage', ['vae', 'base', 'upsample'])
def test_gradients_of_two_halves_are_those_of_the_whole(trained, stage):
    """The mean of the gradients of two ranks' halves, which hold the same samples, is that of the
    whole batch."""
    args = train.parse(training(trained, 'halves', stage, 'patches=3'))
    config = rh.make_config('tiny', args.set)
    prepare = train.prepare_vae if stage == 'vae' else train.prepare_diffusion
    gradients = []
    for world in (1, 2):
        torch.manual_seed(0)
        data, draw, network, loss, _ = prepare(args, config, 'cpu')
        learning = [p for p in network.parameters() if p.requires_grad]
        for p in learning:  # no branch starts at zero, and gradients outweigh rounding
            torch.nn.init.normal_(p, std=0.2)

        for rank in range(world):
            parts, _ = batches.shares(4, rank, world)
            indices = next(batches.indices(2, 4, 3, 4, 0, parts))
            samples = batches.collate([data[i] for i in indices])
            batch = batches.drawn(samples, draw, 'cpu')
            if stage == 'vae':  # an absolute error changes its sign with a rounding: in doubles
                network = network.double()
                batch = {name: x.double() for name, x in batch.items()}
            mean = sum(loss(network, batch).values()) / world
            mean.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in learning]))
    whole, halves = gradients
    assert (whole - halves).norm() < 1e-6 * whole.norm()


def test_training_skips_a_batch_that_is_not_finite(trained, monkeypatch):
    """Of the batches of six steps, the third is poisoned."""
    calls = []
    original = batches.photo

    def poisoned(*batch):
        calls.append(1)
        return original(*batch) * (float('nan') if len(calls) == 3 else 1)

    monkeypatch.setattr(batches, 'photo', poisoned)
    train.main(train.parse(training(trained, 'nan', 'vae', 'vae_steps=6', 'vae_batch=2')))
    skipped = [line.get('skipped', 0) for line in logged(trained / 'nan/vae.jsonl')]
    assert skipped == [0, 0, 1, 1, 1, 1]
    state = running.read_checkpoint(trained / 'nan/vae-state.pt', 'vae-state')
    for part in ('model', 'ema'):
        assert all(x.isfinite().all() for x in state[part].values())


@pytest.mark.parametrize('restarts', [0, 3])
def test_a_rank_that_dies(trained, restarts):
    """The job ends long before a rank would lose its patience (240 s); with restarts it goes on
    from the checkpoint, to the end."""
    runs = f'dies{restarts}'
    settings = ('vae_steps=30', 'vae_batch=2')
    options = training(trained, runs, 'vae', *settings, options=['--save-every', 2])
    process = forks.start(forks.torchrun, 2, 'train', options, restarts)

    # Kill one of the ranks after the first checkpoint
    state = trained / runs / 'vae-state.pt'
    deadline = time.monotonic() + LONG
    while not state.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    pgrep = ['pgrep', '-P', str(process.pid)]
    children = subprocess.run(pgrep, capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    killed = time.monotonic()
    try:
        process.join(LONG)
        assert process.exitcode is not None
    finally:
        process.terminate()  # torchrun ends its ranks

    steps = [line['step'] for line in logged(trained / runs / 'vae.jsonl')]
    if restarts:
        assert process.exitcode == 0
        assert running.read_checkpoint(state, 'vae-state')['step'] == 30
        assert steps == list(range(30))
    else:
        assert process.exitcode != 0
        assert time.monotonic() - killed < 180
        assert steps == list(range(len(steps)))


def test_a_rank_that_hangs(trained):
    """The other loses its patience, here after six seconds, which ends the job."""
    options = ['--save-every', 1, '--patience', 0.1]
    settings = ('vae_steps=9', 'vae_batch=2')
    hanging = training(trained, 'hangs', 'vae', *settings, options=options)
    process = forks.start(forks.torchrun, 2, 'hanging', hanging)
    try:
        process.join(LONG)
        assert process.exitcode not in (None, 0)
    finally:
        process.terminate()


def test_two_fits_on_one_folder_share_the_avatars(trained, tmp_path, tiny):
    decoder = rh.Decoder(tiny).state_dict()
    running.write_model(tmp_path / 'fits/decoder.pt', 'decoder', tiny, decoder, 0)
    folders = ['--data', str(trained / 'data'), '--fits', str(tmp_path / 'fits')]
    command = ['--preset', 'tiny', *folders, '--set', *BRIEF]
    both = [forks.start(forks.run, 'fit', [*command, 'fit_steps=30']) for _ in range(2)]
    for process in both:
        assert_succeeds(process)
    for name in ('avatar_0000', 'avatar_0001'):
        saved = running.read_checkpoint(tmp_path / f'fits/{name}.pt', 'planes')
        assert saved['planes'].isfinite().all()
    with pytest.raises(rh.Stop, match=r'fitted with other settings \(fit_steps\)'):
        fit.main(fit.parse([*command, 'fit_steps=31']))


@pytest.mark.parametrize('own', [None, '7'])
def test_threads_do_not_wait_in_a_loop_for_long(own, monkeypatch):
    """Scripts say so before PyTorch is imported; what somebody has set stays."""
    if own is None:
        monkeypatch.delenv('GOMP_SPINCOUNT', raising=False)
    else:
        monkeypatch.setenv('GOMP_SPINCOUNT', own)
    runpy.run_path(str(ROOT / 'endings.py'))
    assert os.environ['GOMP_SPINCOUNT'] == (own or '3000')
