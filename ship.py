"""Packs trained models for weights/, in a little more than 8 bits a value.

    python ship.py runs/base.pt runs/upsample.pt --out weights

Where they are read (running.load_model) they are unpacked. A model that others were trained with,
the VAE for example, has to stay as it is: they name its fingerprint.
"""
import argparse
from pathlib import Path

import endings  # noqa: F401  # isort: skip  # before PyTorch, whose import takes seconds

import rodinhd as rh
import running


def pack(path, out):
    """Packs the model of <kind>.pt into out/<kind>.pt -> the largest error of a value, relative to
    the largest value of its tensor."""
    kind = path.stem
    if kind not in running.MODELS:
        rh.stop(f'{path}: is not named as a model is: {", ".join(running.MODELS)}')
    model = running.load_model(kind, path.parent, 'cpu')
    content = running.read_checkpoint(path, kind)
    if 'steps' in content:
        rh.stop(f'{path}: is packed already')
    weights, steps = running.packed(content['model'])
    running.write_checkpoint(out / path.name, kind, {**content, 'model': weights, 'steps': steps})

    again = running.load_model(kind, out, 'cpu').state_dict()
    return max(
        float((again[name] - x).abs().max() / x.abs().max().clamp(min=1e-12))
        for name, x in model.state_dict().items()
        if x.numel()
    )


def main(args):
    for path in args.models:
        if (args.out / path.name).resolve() == path.resolve():
            rh.stop(f'{path}: would be written over itself; give another --out')
        error = pack(path, args.out)
        size = (args.out / path.name).stat().st_size / 2 ** 20
        print(f'{args.out / path.name}: {size:.1f} MiB, errors up to {100 * error:.2f} %')


def parse(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument('models', type=Path, nargs='+', help='files as train.py writes them')
    p.add_argument('--out', type=Path, default=Path('weights'))
    return p.parse_args(argv)


if __name__ == '__main__':
    main(parse())
