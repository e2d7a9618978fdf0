"""Packs trained models for weights/, in a little more than 8 bits a value.

    python ship.py runs/base.pt runs/upsample.pt --out weights
    python ship.py runs/base.pt --after first 0.4 --out weights

The second command is for a model that was trained on from first/base.pt, with other avatars: it
takes weights 0.4 of the way from those to these, which knows both kinds of avatars better than
either (WiSE-FT, Wortsman et al. 2022). Layers that the first one lacks stay as they are.

Where they are read (running.load_model) they are unpacked. A model that others were trained with,
the VAE for example, has to stay as it is: they name its fingerprint.
"""
import argparse
from pathlib import Path

import endings  # noqa: F401  # isort: skip  # before PyTorch, whose import takes seconds

import torch

import rodinhd as rh
import running


def between(first, state, share):
    """Weights `share` of the way from those of a model `first` to a state, where both have them."""
    others = first.state_dict()
    found = dict(state)
    for name, x in state.items():
        if name in others and others[name].shape != x.shape:
            rh.stop(f'{first.path}: {name} has another size; give the model that was trained on')
        if name in others:
            found[name] = torch.lerp(others[name], x, share)
    return found


def pack(path, out, after=None):
    """Packs the model of <kind>.pt into out/<kind>.pt -> the largest error of a value, relative to
    the largest value of its tensor. after: a folder and a share, see `between`."""
    kind = path.stem
    if kind not in running.MODELS:
        rh.stop(f'{path}: is not named as a model is: {", ".join(running.MODELS)}')
    state = running.load_model(kind, path.parent, 'cpu').state_dict()
    content = running.read_checkpoint(path, kind)
    if 'steps' in content:
        rh.stop(f'{path}: is packed already')
    if after:
        folder, share = after
        state = between(running.load_model(kind, folder, 'cpu'), state, share)

    halves = {name: x.half() for name, x in state.items()}
    weights, steps = running.packed(halves)
    running.write_checkpoint(out / path.name, kind, {**content, 'model': weights, 'steps': steps})
    again = running.load_model(kind, out, 'cpu').state_dict()
    return max(
        float((again[name] - x).abs().max() / x.abs().max().clamp(min=1e-12))
        for name, x in state.items()
        if x.numel()
    )


def main(args):
    for path in args.models:
        if (args.out / path.name).resolve() == path.resolve():
            rh.stop(f'{path}: would be written over itself; give another --out')
        error = pack(path, args.out, args.after)
        size = (args.out / path.name).stat().st_size / 2 ** 20
        print(f'{args.out / path.name}: {size:.1f} MiB, errors up to {100 * error:.2f} %')


def parse(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument('models', type=Path, nargs='+', help='files as train.py writes them')
    p.add_argument('--out', type=Path, default=Path('weights'))
    p.add_argument('--after', nargs=2, metavar=('FOLDER', 'SHARE'),
                   help='the model that training began with, and how far to go from it, 0..1')
    args = p.parse_args(argv)
    if args.after:
        folder, share = args.after
        try:
            args.after = Path(folder), float(share)
        except ValueError:
            p.error(f'--after: {share} is no number')
        if not 0 <= args.after[1] <= 1:
            p.error(f'--after: {share} is not in 0..1')
    return args


if __name__ == '__main__':
    main(parse())
