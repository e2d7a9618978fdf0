"""Any number of ranks, of micro-batches and of machines trains the same weights.

    python tests/ranks.py --out results/ranks.json         some minutes on one core

The base network of `tiny` takes 20 steps of a batch of 12, of two avatars with random planes: 1 to
5 ranks, with 1, 2 and 3 samples at a time, and two launchers of 2 ranks that find each other as two
machines do. Each run's weights are compared with those of one rank that has all 12 samples at once:
the norm of the difference, as a share of the weights' norm. The optimizer is not forgiving: Adam
makes a step of any gradient's sign.
"""
import argparse
import contextlib
import io
import json
import socket
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import forks  # noqa: E402
import torch  # noqa: E402

import avatars  # noqa: E402
import fit  # noqa: E402
import provenance  # noqa: E402
import rodinhd as rh  # noqa: E402
import running  # noqa: E402
import scenes  # noqa: E402

STEPS = 20
BATCH = 12


def prepare(folder):
    """Makes data, random planes, a decoder and a VAE in a folder."""
    tiny = rh.make_config('tiny')
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()):
        one = ['--preset', 'tiny', '--count', '2', '--data', str(folder / 'data')]
        avatars.main(avatars.parse(one))
    decoder = rh.Decoder(tiny)
    running.write_model(folder / 'fits/decoder.pt', 'decoder', tiny, decoder.state_dict(), 0)
    running.write_model(folder / 'vae.pt', 'vae', tiny, rh.VAE(tiny).state_dict(), 0)
    for avatar in scenes.list_avatars(folder / 'data'):
        planes = torch.rand(3, tiny.channels, tiny.resolution, tiny.resolution) * 2 - 1
        portrait = provenance.of_portrait(avatar, tiny.portrait)
        path = folder / f'fits/{avatar.name}.pt'
        fit.write_planes(
            path, planes, scenes.read_box(avatar), tiny, decoder, [], {}, portrait=portrait
        )


def free_port():
    with socket.socket() as found:
        found.bind(('localhost', 0))
        return found.getsockname()[1]


def weights(folder, ranks, micro, machines=1):
    """The weights after training with so many ranks on each of so many machines."""
    runs = folder / f'{machines}x{ranks}-{micro}'
    runs.mkdir()
    (runs / 'vae.pt').symlink_to(folder / 'vae.pt')
    options = ['--stage', 'base', '--preset', 'tiny', '--data', folder / 'data', '--runs', runs]
    options += ['--fits', folder / 'fits', '--micro-batch', micro, '--device', 'cpu', '--set']
    options += [f'base_steps={STEPS}', f'base_batch={BATCH}', 'sample_steps=1']
    options = [str(option) for option in options]
    how = (0, machines, f'localhost:{free_port()}')
    launchers = [
        forks.start(forks.torchrun, ranks, 'train', options, *how) for _ in range(machines)
    ]
    for launcher in launchers:
        launcher.join()
        if launcher.exitcode:
            rh.stop(f'{machines} x {ranks} ranks failed')
    state = running.read_checkpoint(runs / 'base-state.pt', 'base-state')
    return torch.cat([x.flatten().double() for x in state['model'].values()])


def main(args):
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        prepare(folder)
        one = weights(folder, 1, 0)
        cases = [(1, ranks, micro) for ranks in args.ranks for micro in args.micro]
        for machines, ranks, micro in [*cases, (2, 2, 2)]:
            found = weights(folder, ranks, micro, machines)
            rows.append({
                'machines': machines,
                'ranks': machines * ranks,
                'micro_batch': micro,
                'difference': float((found - one).norm() / one.norm()),
                'largest': float((found - one).abs().max()),
            })
            print(json.dumps(rows[-1]), flush=True)
            running.write_json(args.out, {
                **running.origin(),
                'seed': 0,
                'steps': STEPS,
                'batch': BATCH,
                'rows': rows,
            })


def parse(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument('--ranks', type=int, nargs='+', default=[1, 2, 3, 4, 5])
    p.add_argument('--micro', type=int, nargs='+', default=[1, 2, 3])
    p.add_argument('--out', type=Path, default=Path('results/ranks.json'))
    return p.parse_args(argv)


if __name__ == '__main__':
    main(parse())
