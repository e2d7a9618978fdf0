"""What every command needs to run: ranks, files, checkpoints, models, moving averages.

A process group always exists (of size 1 without torchrun), so no loop asks whether there is one.
Files are whole or not there (atomic), have one writer (claim), hold no NaN (rodinhd.Finite), and
never run code when they are read (weights_only).
"""
import atexit
import contextlib
import functools
import json
import os
import sys
import zlib
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import rodinhd as rh
import shortcuts


# Ranks --------------------------------------------------------------------------------------------
def one_line(kind, error, trace):
    """sys.excepthook of all scripts: a full disk, a folder in place of a file and Ctrl-C are said
    in one line."""
    if not issubclass(kind, (OSError, KeyboardInterrupt)):
        sys.__excepthook__(kind, error, trace)
    elif str(error):
        print(f'error: {error}', file=sys.stderr)
    else:
        print('interrupted; the same command goes on after the last file written', file=sys.stderr)


def start(device=None, seed=0):
    """Starts the process group and seeds PyTorch by seed and rank -> rank, world, device."""
    if device is None:
        device = 'cuda' if torch.cuda.is_available() else 'cpu'
    if device != 'cpu' and not (device.startswith('cuda') and torch.cuda.is_available()):
        rh.stop(f'--device {device}: give cpu, or cuda where PyTorch sees a GPU')
    if not dist.is_initialized():
        start_group('gloo' if device == 'cpu' else 'nccl')
    rank = dist.get_rank()
    world = dist.get_world_size()
    sys.excepthook = one_line  # in place of torch.distributed's

    if device.startswith('cuda'):
        if 'LOCAL_RANK' in os.environ:
            device = f'cuda:{os.environ["LOCAL_RANK"]}'
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    torch.manual_seed(seed * 1000 + rank)
    return rank, world, torch.device(device)


def start_group(backend):
    """The process group of torchrun, or one of a single rank. It is patient: shards are uneven."""
    if 'RANK' in os.environ:
        store, rank, world = next(dist.rendezvous('env://'))
    else:
        store = dist.HashStore()
        rank = 0
        world = 1
    # after a restart, torchrun's store still has what dead ranks wrote
    store = dist.PrefixStore(os.environ.get('TORCHELASTIC_RESTART_COUNT', '0'), store)
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=world, timeout=timedelta(days=7)
    )
    atexit.register(dist.destroy_process_group)


def average_gradients(parameters, active=True):
    """Averages gradients over the ranks that are active.

    A rank that has nothing to do gives zeros, and waits for no one.
    """
    parameters = list(parameters)
    if dist.get_world_size() == 1:
        return
    parts = []
    for p in parameters:
        counts = p.grad is not None and active
        parts.append((p.grad if counts else torch.zeros_like(p)).reshape(-1))
    parts.append(torch.tensor([float(active)], device=parameters[0].device))
    flat = torch.cat(parts)

    dist.all_reduce(flat)
    flat /= flat[-1].clamp(min=1).item()
    sizes = [p.numel() for p in parameters]
    for p, gradient in zip(parameters, flat[:-1].split(sizes), strict=True):
        p.grad = gradient.view_as(p).clone()


# Files --------------------------------------------------------------------------------------------
@contextlib.contextmanager
def atomic(path):
    """A temporary path beside `path` (same suffix) to write to.

    It becomes `path` if all goes well; else the old file stays as it is.
    """
    path = Path(path)
    temporary = path.with_name(f'.{os.getpid()}.tmp.{path.name}')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
        rh.stop(f'{path}: cannot be written ({str(error).splitlines()[0][:100]})')
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_json(path, content, **how):
    """Writes plain types as JSON with an indent of 1. how: of json.dumps."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, **how) + '\n')


@contextlib.contextmanager
def claim(path):
    """Whether this process may write `path`: False while another one may.

    It locks a byte of <folder>/.lock until the process ends. Windows has no fcntl, so no claims.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    mine = True
    with open(path.parent / '.lock', 'a') as lock:
        try:
            import fcntl
            byte = zlib.crc32(path.name.encode())
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
        except ImportError:
            pass
        except OSError:
            mine = False
        yield mine


# Checkpoints --------------------------------------------------------------------------------------
def write_checkpoint(path, kind, content):
    """Writes a dict of plain types and tensors.

    read_checkpoint checks its kind: 'decoder', 'planes', 'vae' ...
    """
    with atomic(path) as temporary:
        torch.save({'kind': kind, **content}, temporary)


def read_checkpoint(path, kind, made_by=''):
    """Reads what write_checkpoint wrote.

    Tensors are memory-mapped, so what is not used is not read.
    """
    try:
        content = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
    except FileNotFoundError:
        advice = f'; make it with {made_by}' if made_by else ''
        rh.stop(f'{path}: there is no such file{advice}')
    except Exception as error:  # torch.load raises many types on damaged files
        rh.stop(f'{path}: not a readable checkpoint, or damaged ({type(error).__name__}); '
                'delete it and make it again')
    found = content.get('kind', 'unknown') if isinstance(content, dict) else 'unknown'
    if found != kind:
        rh.stop(f'{path}: is a checkpoint of kind {found!r}, expected {kind!r}')
    return content


def differing(settings, saved):
    """Names of the settings that have other values in what was saved.

    Settings that are newer than that are left out.
    """
    return [name for name in settings if name in saved and settings[name] != saved[name]]


# Models -------------------------------------------------------------------------------------------
MODELS = {  # kind: what makes it of a Config, and which command trains it
    'decoder': (rh.Decoder, 'python fit.py --decoder'),
    'vae': (rh.portrait_encoder, 'python train.py --stage vae'),
    'base': (shortcuts.base_network, 'python train.py --stage base'),
    'upsample': (shortcuts.upsample_network, 'python train.py --stage upsample'),
}


def write_model(path, kind, config, state, step):
    """A model for inference: its Config, and its weights in fp16 (those of the decoder, which are
    few, in fp32)."""
    dtype = torch.float32 if kind == 'decoder' else torch.float16
    weights = {name: x.to('cpu', dtype) for name, x in state.items()}
    write_checkpoint(path, kind, {'config': vars(config), 'model': weights, 'step': step})


def config_of(saved):
    """The Config that a checkpoint carries; settings that are newer than it are its preset's."""
    values = {**rh.PRESETS.get(saved.get('preset'), {}), **saved}
    return rh.Config(**{name: values[name] for name in values if name in rh.SETTINGS})


def load_model(kind, folder, device):
    """The model of a kind from folder/<kind>.pt, in fp32 and frozen, with its Config as .config."""
    build, made_by = MODELS[kind]
    path = Path(folder) / f'{kind}.pt'
    content = read_checkpoint(path, kind, made_by)
    try:
        config = config_of(content['config'])
        model = build(config)
        model.load_state_dict(content['model'])
        finite = all(x.isfinite().all() for x in model.state_dict().values())
        assert finite, 'it holds NaN or infinite values'
    except (KeyError, TypeError, RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0][:80]
        rh.stop(f'{path}: does not fit this program ({reason}); make it again with {made_by}')
    model.config = config
    return model.requires_grad_(False).eval().to(device)


def load_models(runs='runs', fits='fits', device='cpu'):
    """All four models: those of `runs`, with the decoder of `fits`, if a diffusion model was
    trained there, else those that ship, of weights/."""
    shipped = Path(__file__).parent / 'weights'
    trained = any((Path(runs) / f'{kind}.pt').exists() for kind in ('base', 'upsample'))
    models = {}
    for kind in MODELS:
        folder = shipped
        if trained:
            folder = fits if kind == 'decoder' else runs
        models[kind] = load_model(kind, folder, device)

    # Planes are shared by all but the VAE, portraits by all but the decoder
    upsample = models['upsample'].config
    shared = {'decoder': ('channels', 'resolution'), 'vae': rh.ENCODER_SETTINGS}
    shared['base'] = shared['decoder'] + shared['vae']
    for kind, names in shared.items():
        other = models[kind].config
        for name in names:
            if getattr(other, name) != getattr(upsample, name):
                rh.stop(f'the models in {runs} and {fits} are of different presets: {name} is '
                        f'{getattr(other, name)} in {kind}.pt, {getattr(upsample, name)} in '
                        'upsample.pt; train all stages with the same one')
    return models


def load_vae(path, config):
    """A portrait encoder with published weights (.safetensors, .bin, .pt): of an AutoencoderKL,
    where it is a VAE."""
    try:
        if str(path).endswith('.safetensors'):
            from safetensors.torch import load_file as load
        else:
            load = functools.partial(torch.load, map_location='cpu', weights_only=True)
        vae = rh.portrait_encoder(config)
        vae.load_state_dict(renamed(load(path)))
        return vae
    except ImportError:
        rh.stop(f'{path} needs the safetensors package: pip install safetensors')
    except Exception as error:  # missing, damaged or of another model: many types
        reason = ' '.join(str(error).split())[:160]
        rh.stop(f'{path}: not weights of this VAE ({type(error).__name__}: {reason})')


def renamed(state):
    """Weights of an AutoencoderKL by its names of today: until 2023 the attention's were others,
    and its layers were 1 x 1 convolutions."""
    names = {'query': 'to_q', 'key': 'to_k', 'value': 'to_v', 'proj_attn': 'to_out.0'}
    found = {}
    for name, x in state.items():
        for old, new in names.items():
            name = name.replace(f'.{old}.', f'.{new}.')
        if '.attentions.' in name and x.ndim == 4:
            x = x[..., 0, 0]
        found[name] = x
    return found


class EMA:
    """Exponential moving average of a module's parameters in fp32.

    It warms up: the decay is min(decay, (1 + n) / (10 + n)) at the n-th update.
    """
    def __init__(self, module, decay):
        self.decay = decay
        self.updates = 0
        self.shadow = {n: p.detach().float().clone() for n, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module):
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, p in module.named_parameters():
            self.shadow[name].lerp_(p.float(), 1 - decay)


def print_departures(config):
    """One line: what a config does that no paper does."""
    changed = rh.departures(config)
    if changed:
        print(f'not in the papers (docs/details.md): {", ".join(changed)}')
