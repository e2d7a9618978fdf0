"""Nothing is lost: whole files, one writer, exact resumes, the same mathematics on any number of ranks, no NaN."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import batches
import fit
import rodinhd as rh
import train

ROOT = Path(__file__).parent.parent


def start(program, *args, ranks=0, **how):
    """A Python program (text) or script (a path) as a process of its own, under torchrun where ranks > 0."""
    torchrun = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={ranks}', *how.pop('torchrun', ())] if ranks else []
    return subprocess.Popen([sys.executable, *torchrun, *([program] if str(program).endswith('.py') else ['-c', program]), *map(str, args)],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL,
                            env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}, **how)


def test_a_write_that_fails_half_way_leaves_the_old_file(tmp_path):
    """Files may not grow over 100 kB: as on a full disk, the write begins and fails."""
    program = '''
import resource, sys, torch, rodinhd as rh
rh.start('cpu')
rh.write_checkpoint('a.pt', 'x', {'n': 1})
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
if sys.argv[1] == 'checkpoint':
    rh.write_checkpoint('a.pt', 'x', {'n': torch.zeros(10 ** 6)})
with rh.atomic('a.pt') as temporary:
    temporary.write_bytes(bytes(10 ** 6))
'''
    for kind in ('checkpoint', 'bytes'):
        process = start(program, kind, cwd=tmp_path)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 1 and err.startswith('error: a.pt: cannot be written') and err.count('\n') == 1, err
        assert rh.read_checkpoint(tmp_path / 'a.pt', 'x')['n'] == 1
        assert {p.name for p in tmp_path.iterdir()} == {'a.pt'}


def test_a_folder_that_is_a_file_ends_in_one_line(tmp_path):
    (tmp_path / 'fits').write_text('')
    process = start(ROOT / 'fit.py', '--decoder', '--preset', 'tiny', cwd=tmp_path)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and err.startswith('error: ') and err.count('\n') == 1 and 'fits' in err, err


def test_a_claim_ends_with_its_process(tmp_path):
    program = 'import rodinhd as rh, sys, time\nwith rh.claim(sys.argv[1]) as mine:\n    print(mine, flush=True); time.sleep(60)'
    holder = start(program, tmp_path / 'a.pt')
    assert holder.stdout.readline() == 'True\n'
    with rh.claim(tmp_path / 'a.pt') as mine:
        assert not mine
    with rh.claim(tmp_path / 'b.pt') as mine:
        assert mine
    holder.kill()
    holder.communicate()
    with rh.claim(tmp_path / 'a.pt') as mine:
        assert mine


def test_steps_that_are_not_finite_are_skipped_then_stop():
    finite = rh.Finite('stage', most=3)
    good, bad = torch.ones(2), torch.tensor([1.0, float('nan')])
    assert [finite(x) for x in (good, bad, bad, good, bad)] == [True, False, False, True, False] and finite.skipped == 3
    assert not finite(good, torch.tensor(float('inf')))
    with pytest.raises(SystemExit, match='stage: loss or gradient not finite 3 times in a row'):
        finite(bad)


def test_fitting_skips_a_loss_that_is_not_finite(data, tiny, monkeypatch):
    folder = rh.list_avatars(data)[0]
    views, decoder, calls = rh.load_views(folder, 'train', rh.read_box(folder)), rh.Decoder(tiny), []

    def poisoned(planes, original=rh.total_variation):
        calls.append(1)
        return original(planes) * (float('nan') if len(calls) == 2 else 1)
    monkeypatch.setattr(rh, 'total_variation', poisoned)
    start_planes = fit.new_planes(decoder, torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(decoder.parameters(), lr=1e-3)
    planes, _, memory = rh.fit_avatar(views, start_planes, decoder, tiny, steps=20, decoder_optimizer=optimizer)
    assert len(calls) == 3 and planes.isfinite().all()
    assert all(p.isfinite().all() for p in decoder.parameters()) and all(f.isfinite().all() for f in memory['fisher'].values())


@pytest.fixture(scope='module')
def trained(data, tiny, tmp_path_factory):
    """A folder with data/, fits/ (random planes) and runs/vae.pt, so that base and upsample can be trained."""
    folder = tmp_path_factory.mktemp('robust')
    (folder / 'data').symlink_to(data)
    torch.manual_seed(0)
    decoder = rh.Decoder(tiny)
    rh.write_model(folder / 'fits/decoder.pt', 'decoder', tiny, decoder.state_dict(), 0)
    rh.write_model(folder / 'runs/vae.pt', 'vae', tiny, rh.VAE(tiny).state_dict(), 0)
    for path in rh.list_avatars(data):
        planes = 0.3 * torch.randn(3, 8, 32, 32)
        fit.write_planes(folder / 'fits' / f'{path.name}.pt', planes, rh.read_box(path), tiny, decoder, [], {})
    return folder


def training(folder, runs, stage, *settings, **more):
    (folder / runs).mkdir(exist_ok=True)
    (folder / runs / 'vae.pt').write_bytes((folder / 'runs/vae.pt').read_bytes())
    return ['--stage', stage, '--preset', 'tiny', '--data', folder / 'data', '--fits', folder / 'fits', '--runs', folder / runs,
            '--log-every', 1, *(x for k, v in more.items() for x in (f'--{k.replace("_", "-")}', v)), '--set', *settings]


def test_two_ranks_do_the_mathematics_of_one(trained):
    """20 steps of a batch of 4: weights of two ranks with 2 samples each against those of one rank. Of the base network: in the others
    some gradients are zero but for rounding (a bias before a normalisation by channel), and Adam makes steps of such."""
    settings = 'base_steps=20', 'base_batch=4'
    train.main(train.parse(list(map(str, training(trained, 'one', 'base', *settings)))))
    process = start(ROOT / 'train.py', *training(trained, 'two', 'base', *settings), ranks=2)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err[-2000:]
    states = [rh.read_checkpoint(trained / r / 'base-state.pt', 'base-state')['model'] for r in ('one', 'two')]
    one, two = (torch.cat([x.flatten() for x in state.values()]) for state in states)
    assert (one - two).norm() < 1e-5 * one.norm() and not torch.equal(one, two)


def test_training_begins_with_weights_that_are_there(trained):
    def run(runs, *settings, **more):
        train.main(train.parse(list(map(str, training(trained, runs, 'vae', 'vae_batch=2', *settings, **more)))))
        return rh.load_model('vae', trained / runs, 'cpu').state_dict()
    first = run('first', 'vae_steps=3', 'vae_lr=1e-2')
    after = run('after', 'vae_steps=1', 'vae_lr=1e-6', init=trained / 'first')
    anew = run('anew', 'vae_steps=1', 'vae_lr=1e-6')
    far = max((anew[k] - first[k]).abs().max() for k in first)
    assert max((after[k] - first[k]).abs().max() for k in first) < 1e-4 < far
    with pytest.raises(SystemExit, match=r'settings \(init\)'):
        run('after', 'vae_steps=1', 'vae_lr=1e-6')
    with pytest.raises(SystemExit, match=r'vae\.pt: has other sizes than asked for; use --preset tiny'):
        run('sizes', 'vae_steps=1', 'vae_latent=8', init=trained / 'first')
    with pytest.raises(SystemExit):
        train.parse(['--stage', 'lora', '--init', 'weights'])


@pytest.mark.parametrize('stage', ['vae', 'base', 'upsample'])
def test_gradients_of_two_halves_are_those_of_the_whole(trained, stage):
    """The mean of the gradients of two ranks' halves, which hold the same samples, is that of the whole batch."""
    args, gradients = train.parse(list(map(str, training(trained, 'halves', stage, 'patches=3')))), []
    for world in (1, 2):
        torch.manual_seed(0)
        prepare = train.prepare_vae if stage == 'vae' else train.prepare_diffusion
        data, network, loss, _ = prepare(args, rh.make_config('tiny', args.set), 'cpu', world)
        learning = [p for p in network.parameters() if p.requires_grad]
        for p in learning:
            torch.nn.init.normal_(p, std=0.2)                           # no branch starts at zero, gradients outweigh rounding
        for rank in range(world):
            index = next(batches.indices(2, 4, 3, 4, 0, rank, world))
            batch = batches.collate([data[i] for i in index])
            if stage == 'vae':                                          # an absolute error changes its sign with a rounding: in doubles
                network, batch = network.double(), {k: v.double() for k, v in batch.items()}
            (sum(loss(network, batch).values()) / world).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in learning]))
    whole, halves = gradients
    assert (whole - halves).norm() < 1e-6 * whole.norm()


def test_training_skips_a_batch_that_is_not_finite(trained, monkeypatch):
    def poisoned(rgb, alpha, original=batches.photo, calls=[]):  # noqa: B006
        calls.append(1)
        return original(rgb, alpha) * (float('nan') if len(calls) == 5 else 1)
    monkeypatch.setattr(batches, 'photo', poisoned)
    train.main(train.parse(list(map(str, training(trained, 'nan', 'vae', 'vae_steps=6', 'vae_batch=2')))))
    lines = [json.loads(line) for line in (trained / 'nan/vae.jsonl').read_text().splitlines()]
    assert [line.get('skipped', 0) for line in lines] == [0, 0, 1, 1, 1, 1]
    state = rh.read_checkpoint(trained / 'nan/vae-state.pt', 'vae-state')
    assert all(x.isfinite().all() for part in ('model', 'ema') for x in state[part].values())


@pytest.mark.parametrize('restarts', [0, 3])
def test_a_rank_that_dies(trained, restarts):
    """The job ends within a minute; with restarts it goes on from the checkpoint, to the end."""
    runs = f'dies{restarts}'
    process = start(ROOT / 'train.py', *training(trained, runs, 'vae', 'vae_steps=60', 'vae_batch=2', save_every=2), ranks=2,
                    torchrun=[f'--max-restarts={restarts}', '--monitor-interval=0.1'])
    state = trained / runs / 'vae-state.pt'
    deadline = time.monotonic() + 120
    while not state.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    children = subprocess.run(['pgrep', '-P', str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    killed = time.monotonic()
    try:
        _, err = process.communicate(timeout=60)
    finally:
        process.terminate()                                             # torchrun ends its ranks
    if restarts:
        assert process.returncode == 0, err[-2000:]
        assert rh.read_checkpoint(state, 'vae-state')['step'] == 60
    else:
        assert process.returncode != 0 and time.monotonic() - killed < 60
    steps = [json.loads(line)['step'] for line in (trained / runs / 'vae.jsonl').read_text().splitlines()]
    assert steps == list(range(len(steps))) if not restarts else steps == list(range(60))


def test_two_fits_on_one_folder_share_the_avatars(trained, tmp_path):
    rh.write_model(tmp_path / 'fits/decoder.pt', 'decoder', rh.make_config('tiny'), rh.Decoder(rh.make_config('tiny')).state_dict(), 0)
    args = ['--preset', 'tiny', '--data', trained / 'data', '--fits', tmp_path / 'fits', '--set', 'fit_steps=30']
    both = [start(ROOT / 'fit.py', *args) for _ in range(2)]
    for process in both:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err[-2000:]
    fits = [rh.read_checkpoint(tmp_path / f'fits/avatar_000{i}.pt', 'planes') for i in (0, 1)]
    assert all(f['planes'].isfinite().all() for f in fits)
    with pytest.raises(SystemExit, match=r'fitted with other settings \(fit_steps\)'):
        fit.main(fit.parse([*map(str, args[:-1]), 'fit_steps=31']))
