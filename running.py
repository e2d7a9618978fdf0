"""What every command needs to run: ranks, files, checkpoints, models, moving averages.

A process group always exists (of size 1 without torchrun), so no loop asks whether there is one.
Files are whole or not there (atomic), have one writer (claim), hold no NaN (rodinhd.Finite), say
what they were made with (provenance.py), and never run code when they are read (weights_only).
"""
import atexit
import contextlib
import errno
import functools
import json
import os
import platform
import secrets
import shlex
import subprocess
import sys
import time
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import autoencoder
import endings
import provenance
import refiner
import rodin
import rodinhd as rh
import shortcuts

SECONDS_A_LINE = 10  # of progress, in a file
MOST_SEEDS = 2 ** 62  # what is drawn from a seed takes up to twice of it, and more, of 64 bits

# Ranks --------------------------------------------------------------------------------------------
def start(device=None, seed=0, patience=None):
    """Starts the process group and seeds PyTorch by seed and rank -> rank, world, device.

    patience: minutes that a rank waits for the others before the job ends; None: a week.
    """
    for stream in (sys.stdout, sys.stderr):  # a name that cannot be printed ends no work
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors='replace')
    if not 0 <= seed < MOST_SEEDS:
        rh.stop(f'--seed {seed}: give a number from 0 to {MOST_SEEDS - 1}')
    if device is None:
        device = 'cuda' if torch.cuda.is_available() else 'cpu'
    if device.startswith('mps'):
        rh.stop('--device mps: Apple GPUs have no 64-bit floats, which rendering needs; give cpu')
    if device != 'cpu' and not (device.startswith('cuda') and torch.cuda.is_available()):
        rh.stop(f'--device {device}: give cpu, or cuda where PyTorch sees a GPU')
    if not dist.is_initialized():
        start_group(device, patience)
    rank = dist.get_rank()
    world = dist.get_world_size()
    endings.install()  # in place of torch.distributed's

    if device.startswith('cuda'):
        if under_torchrun() and 'LOCAL_RANK' in os.environ:
            device = f'cuda:{os.environ["LOCAL_RANK"]}'
        elif device == 'cuda':  # which names no device
            device = 'cuda:0'
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    keep_memory()
    torch.manual_seed((seed * 1000 + rank) % 2 ** 63)
    return rank, world, torch.device(device)


def keep_memory():
    """Has glibc keep what is freed for what is asked for next, which saves 600 page faults, a
    twentieth of the time, in each step of a fit: it does so once a block of 32 MiB was freed."""
    torch.empty(2 ** 23 - 2 ** 10)


def under_torchrun():
    """Whether all is set that torchrun sets: some of it may be a cluster's, for something else."""
    return all(name in os.environ for name in ('RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT'))


def start_group(device, patience=None):
    """The process group of torchrun, or one of a single rank.

    GPUs talk by NCCL where there are several; one alone has nobody to talk to, and on Windows
    there is no NCCL.
    """
    if under_torchrun():
        try:
            store, rank, world = next(dist.rendezvous('env://'))
        except (ValueError, RuntimeError) as error:  # no numbers, or nobody answers
            rh.stop(f'RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT: {first_line(error)}')
    else:
        store = dist.HashStore()
        rank = 0
        world = 1
    several_gpus = device != 'cpu' and world > 1 and dist.is_nccl_available()
    backend = 'nccl' if several_gpus else 'gloo'
    wait = timedelta(minutes=patience) if patience else timedelta(days=7)

    # after a restart, torchrun's store still has what dead ranks wrote
    store = dist.PrefixStore(os.environ.get('TORCHELASTIC_RESTART_COUNT', '0'), store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=wait)
    SIGNS['store'] = store
    atexit.register(dist.destroy_process_group)


# Ranks that do not wait for one another at every step, as those that fit avatars, show in the store
# of the process group that they live.
SIGNS = {'store': None, 'last': 0.0}
SIGN_EVERY = 5.0  # seconds


def sign_of_life():
    """Tells the other ranks that this one goes on; cheap enough for any loop."""
    store = SIGNS['store']
    now = time.monotonic()
    if store is not None and dist.get_world_size() > 1 and now - SIGNS['last'] > SIGN_EVERY:
        SIGNS['last'] = now
        store.set(f'sign/{dist.get_rank()}', str(now))


def wait_for_ranks(name, minutes=4.0):
    """Waits until all ranks call this with the same name; stops where one of them gives no sign of
    life for so many minutes."""
    store = SIGNS['store']
    world = dist.get_world_size()
    if store is None or world == 1:
        return
    store.set(f'done/{name}/{dist.get_rank()}', '1')
    for rank in range(world):
        seen = None
        since = time.monotonic()
        while not store.check([f'done/{name}/{rank}']):
            key = f'sign/{rank}'
            sign = store.get(key) if store.check([key]) else None
            if sign != seen:
                seen = sign
                since = time.monotonic()
            if time.monotonic() - since > 60 * minutes:
                rh.stop(f'rank {rank} gave no sign of life for {minutes:g} minutes; '
                        'the same command goes on')
            time.sleep(0.5)


def parallel(network, device):
    """The network for a training step, whose gradients are averaged over the ranks, and what makes
    a context in which they are not yet. A single rank has nobody to average with."""
    if dist.get_world_size() == 1:
        return network, contextlib.nullcontext
    devices = [device] if device.type == 'cuda' else None
    # By default it sorts gradients anew after its first step. Then a run that was interrupted adds
    # them up in another order than one that was not, and of three ranks the sums differ.
    model = torch.nn.parallel.DistributedDataParallel(
        network, device_ids=devices, find_unused_parameters=True
    )
    return model, model.no_sync


def summed(x):
    """Sums a tensor over the ranks, in place."""
    if dist.get_world_size() > 1:
        dist.all_reduce(x)
    return x


def spare_cores(most=16):
    """How many cores there are for a rank besides the one that it runs on, of those of its machine;
    at least 1."""
    if hasattr(os, 'sched_getaffinity'):  # of Linux: what this process may use
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    ranks = int(os.environ['LOCAL_WORLD_SIZE']) if 'LOCAL_WORLD_SIZE' in os.environ else 1
    return min(max(cores // ranks - 1, 1), most)


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
    flat /= flat[-1].clamp(min=1)
    sizes = [p.numel() for p in parameters]
    for p, gradient in zip(parameters, flat[:-1].split(sizes), strict=True):
        p.grad = gradient.view_as(p).clone()


# Progress -----------------------------------------------------------------------------------------
class Bar(tqdm):
    """A progress bar of tqdm; into a file or a pipe it writes a line now and then, and no \\r."""

    def __init__(self, *args, **how):
        self.live = sys.stderr.isatty()
        if not self.live:
            how = {'mininterval': SECONDS_A_LINE, 'maxinterval': 10 * SECONDS_A_LINE, **how}
        super().__init__(*args, **how)

    def status_printer(self, file):
        """What shows a text; tqdm itself ends the last line."""
        if self.live:
            return tqdm.status_printer(file)
        shown = []

        def show(text):
            if text and text not in shown[-1:]:
                file.write('\n' * bool(shown) + text)
                file.flush()
                shown.append(text)

        return show

    def set_postfix_str(self, s='', refresh=True):
        """Says something behind the bar: at once, or in a file with the next line."""
        super().set_postfix_str(s, refresh and self.live)

    def set_postfix(self, ordered_dict=None, refresh=True, **values):
        """Says values behind the bar: at once, or in a file with the next line."""
        super().set_postfix(ordered_dict, refresh and self.live, **values)


class Count:
    """Tells of the steps of loops, as tell((done, total), desc=what), to a page for instance."""

    def __init__(self, tell, what, total=0):
        self.tell = tell
        self.what = what
        self.total = total
        self.done = 0

    def steps(self, items):
        """Yields the items of a loop."""
        for k, item in enumerate(items):
            self.tell((k, len(items)), desc=self.what)
            yield item

    def update(self, *_):
        """Counts one step of a loop of `total`."""
        self.done += 1
        self.tell((min(self.done, self.total), self.total), desc=self.what)


# Files --------------------------------------------------------------------------------------------
def first_line(error, most=100):
    """What an error says, in one line of at most so many letters."""
    lines = str(error).strip().splitlines()
    return lines[0][:most] if lines else type(error).__name__


@contextlib.contextmanager
def atomic(path):
    """A temporary path beside `path` (same suffix) to write to.

    It becomes `path` if all goes well; else the old file stays as it is. Both the bytes and the
    name are on the disk then, so a power loss leaves one of the two files whole.
    """
    path = Path(path)
    temporary = path.with_name(f'.{secrets.token_hex(4)}.tmp.{path.name}')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        synchronise(temporary)
        os.replace(temporary, path)
        synchronise(path.parent)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
        if isinstance(error.__context__, OSError):
            error = error.__context__
        rh.stop(f'{path}: cannot be written ({first_line(error)})')
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def synchronise(path):
    """Waits until a file, or the names in a folder, are on the disk.

    Some file systems cannot do this for a folder; then there is nothing to wait for.
    """
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError:
        if path.is_dir():  # Windows opens no folders
            return
        raise
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF):
            raise
    finally:
        os.close(file)


def write_json(path, content, **how):
    """Writes plain types as JSON with an indent of 1. how: of json.dumps."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, **how) + '\n', encoding='utf-8')


def commit_here():
    """The commit of the project's own files, with `+` where they were changed since, or unknown."""
    here = Path(__file__).parent

    def ask(*words):
        return subprocess.run(['git', *words], cwd=here, capture_output=True, text=True)

    try:
        answer = ask('rev-parse', '--short', 'HEAD')
        changed = ask('status', '--porcelain', '--untracked-files=no').stdout.strip()
    except OSError:  # there is no git
        return 'unknown'
    if answer.returncode:
        return 'unknown'
    return answer.stdout.strip() + ('+' if changed else '')


def machine_here(device):
    """The processor, or the GPU of a device, and PyTorch, in words."""
    kind = platform.processor() or platform.machine()
    threads = f'{os.cpu_count()} cores of {kind}, {torch.get_num_threads()} threads'
    if torch.device(device).type == 'cuda':
        threads = torch.cuda.get_device_name(device)
    return f'{threads}, PyTorch {torch.__version__}'


def origin(device='cpu'):
    """What figures are of: {'command', 'commit', 'machine'}, for the JSON file that holds them."""
    words = ['python', os.path.basename(sys.argv[0]), *sys.argv[1:]]
    return {
        'command': shlex.join(words),
        'commit': commit_here(),
        'machine': machine_here(device),
    }


@functools.cache
def leftovers(folder):
    """The temporary files that were in a folder when this process first asked."""
    return list(folder.glob('.[0-9a-f]*.tmp.*'))


@contextlib.contextmanager
def claim(path, *others):
    """Whether this process may write `path`: False while another one may.

    It locks a byte of <folder>/.lock until the process ends. Whoever holds it removes what killed
    processes have left of writing `path`, and of `others`: files that the same claim is for.
    Without locks (on Windows, and where the file system has none) there are no claims.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.parent / '.lock', 'a') as lock:
        mine = locked(lock, path)
        if mine:
            remove_leftovers(path, *others)
        yield mine


def locked(lock, path):
    """Locks the byte of an open file that is for `path`; False where another process has it."""
    try:
        import fcntl
        byte = zlib.crc32(os.fsencode(path.name))
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
    except ImportError:
        pass
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        rh.note(f'{path.parent}: this file system has no locks ({first_line(error)}); '
                'run one command at a time on it')
    return True


def remove_leftovers(*paths):
    for path in map(Path, paths):
        for temporary in leftovers(path.parent):
            if temporary.name.endswith(f'.tmp.{path.name}'):
                with contextlib.suppress(OSError):
                    temporary.unlink(missing_ok=True)


def remove_all_leftovers(folder):
    """Removes all temporary files in a folder and those in it, which the same claim is for."""
    for temporary in Path(folder).rglob('.[0-9a-f]*.tmp.*'):
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def claimed(items, place, left):
    """Yields the items whose file, place(item), this process may write.

    Those of other processes come at the end, if they become free in about the time that three
    items take here; those that do not are put into the list `left`.
    """
    waiting = []
    longest = 3.0
    for item in items:
        began = time.monotonic()
        with claim(place(item)) as mine:
            if not mine:
                waiting.append(item)
                continue
            yield item
        longest = max(longest, time.monotonic() - began)

    deadline = time.monotonic() + 3 * longest
    for item in waiting:
        while True:
            with claim(place(item)) as mine:
                if mine:
                    yield item
            if mine:
                deadline = time.monotonic() + 3 * longest
                break
            if time.monotonic() > deadline:
                left.append(item)
                break
            time.sleep(0.2)


class Ahead:
    """Reads what comes next in a thread, while what is there is worked on."""
    def __init__(self):
        self.thread = ThreadPoolExecutor(1)
        self.begun = {}

    def begin(self, key, work):
        """Begins work(), whose result will be asked for by `key`."""
        if key not in self.begun:
            self.begun[key] = self.thread.submit(work)

    def take(self, key, work):
        """The result of work(), of the thread where it was begun there; or what it raised."""
        begun = self.begun.pop(key, None)
        return begun.result() if begun else work()


class Behind:
    """Writes in a thread what a run saves, while the run goes on.

    One work at a time: the next waits until the one before is done. What that raised is raised
    then, or when it is waited for.
    """
    def __init__(self):
        self.thread = ThreadPoolExecutor(1)
        self.begun = None

    def begin(self, work):
        self.wait()
        self.begun = self.thread.submit(work)

    def wait(self):
        if self.begun is not None:
            begun, self.begun = self.begun, None
            begun.result()


def copied(x):
    """Copies tensors, and those in dicts and lists, to the CPU, as they are now."""
    if torch.is_tensor(x):
        return x.detach().to('cpu', copy=True)
    if isinstance(x, dict):
        return {name: copied(value) for name, value in x.items()}
    return [copied(value) for value in x] if type(x) is list else x


# Checkpoints --------------------------------------------------------------------------------------
def write_checkpoint(path, kind, content):
    """Writes a dict of plain types and tensors.

    read_checkpoint checks its kind: 'decoder', 'planes', 'vae' ... What is written depends on the
    content alone: to a path, torch.save would write the temporary file's name, too.
    """
    with atomic(path) as temporary, open(temporary, 'wb') as file:
        torch.save({'kind': kind, **content}, file)


def read_checkpoint(path, kind, made_by='', whole=True):
    """Reads what write_checkpoint wrote.

    Tensors are memory-mapped, so what is not used is not read; but first all bytes are compared
    with their checksums, unless `whole` is False.
    """
    try:
        if not os.path.isfile(path) and os.path.exists(path):
            raise ValueError('no file')
        check_archive(path, whole)
        content = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
        check_tensors(content)
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


def check_archive(path, whole):
    """Raises ValueError where a file is no archive of torch.save, would grow when it is read, or
    (with `whole`) does not have the bytes that were written. PyTorch looks at no checksum."""
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
        if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
            raise ValueError('compressed')
        if sum(part.file_size for part in parts) > os.path.getsize(path):
            raise ValueError('parts that lie on one another')
        for part in parts:
            if whole or '/data/' not in part.filename:  # what is no tensor is small
                with archive.open(part) as file:
                    while file.read(2 ** 20):  # raises at its end where its checksum is another
                        pass


def check_tensors(content):
    """Raises ValueError where a tensor, somewhere in nested dicts and lists, is not what it
    seems: without bytes, or larger than its bytes."""
    seen = set()
    waiting = [content]
    while waiting:
        x = waiting.pop()
        if id(x) in seen:
            continue
        seen.add(id(x))
        if isinstance(x, dict):
            waiting += x.values()
        elif isinstance(x, (list, tuple)):
            waiting += x
        elif torch.is_tensor(x):
            if x.layout != torch.strided or x.device.type != 'cpu' or x.is_quantized:
                raise ValueError('a tensor without bytes')
            if x.numel() * x.element_size() > x.untyped_storage().nbytes():
                raise ValueError('a tensor larger than its bytes')


def read_planes(path, decoder=None, folder=None, low=False, known=False):
    """Reads what fit.py wrote of an avatar; stops where it is not as fit.py writes it, is of
    another decoder, or of other images than those in a folder.

    decoder: the model, or where it lies and its fingerprint. low: only the low-resolution planes
    will be used, so the others' bytes are not looked at. known: all of it was looked at before.
    """
    advice = 'delete it and fit it again with python fit.py'
    content = read_checkpoint(path, 'planes', 'python fit.py', whole=not low and not known)
    with reading(path, advice):
        check_planes(content)
        if low and not known:
            check_low(path, content)
    made_with = content.get('made_with', {'decoder': content.get('decoder')})
    if decoder is not None:
        if isinstance(decoder, torch.nn.Module):
            place = getattr(decoder, 'path', 'the one it is used with')
            decoder = (place, provenance.fingerprint(decoder))
        beside = {'decoder': decoder}
        provenance.compare(path, made_with, beside, f'{advice}, or put its decoder back')
    if folder is not None:
        provenance.check_avatar(path, made_with, folder)
    return content


def check_low(path, content):
    """ValueError unless low-resolution planes are as they were written; files of before, which do
    not carry their checksum, are read as a whole."""
    if 'sum_of_low' not in content:
        check_archive(path, whole=True)
    elif content['sum_of_low'] != provenance.of_tensor(content['low']):
        raise ValueError('other low-resolution planes than were written')


def check_planes(content):
    """ValueError unless planes are (3, C, R, R), in fp16, and in a box that is finite."""
    for name in ('planes', 'low'):
        x = content[name]
        square = x.ndim == 4 and len(x) == 3 and x.shape[2] == x.shape[3] > 0
        if not square or x.dtype != torch.float16 or not x.is_contiguous():
            raise ValueError(f'{name} are {x.dtype} of {tuple(x.shape)}')
    centre, half = content['centre'], content['half']
    is_centre = torch.is_tensor(centre) and centre.is_floating_point() and centre.shape == (3,)
    is_half = isinstance(half, (int, float)) and not isinstance(half, bool)
    if not is_centre or not is_half or not centre.abs().max() < 1e12 or not 1e-12 < half < 1e12:
        raise ValueError('its box is no centre and half of its width')


@contextlib.contextmanager
def reading(path, advice):
    """Ends in one line where what a checkpoint holds does not fit what is made of it."""
    try:
        yield
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        lacks = 'it has no ' if isinstance(error, KeyError) else ''
        rh.stop(f'{path}: does not fit this program ({lacks}{first_line(error, 80)}); {advice}')


def load_optimizer(optimizer, state):
    """optimizer.load_state_dict, which raises ValueError where sizes are others, too, or numbers
    are none that it has; its settings stay as they are."""
    settings = [
        {name: value for name, value in group.items() if name != 'params'}
        for group in optimizer.param_groups
    ]
    groups = [
        {**saved, 'fused': own.get('fused')}  # says on which device steps are counted
        for saved, own in zip(state['param_groups'], settings, strict=True)
    ]
    optimizer.load_state_dict({**state, 'param_groups': groups})
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)
        for p in group['params']:
            for name, x in optimizer.state.get(p, {}).items():  # some were never used
                if not torch.is_tensor(x):
                    continue
                if x.ndim and x.shape != p.shape:
                    raise ValueError(f'{name} of the optimizer is {tuple(x.shape)}')
                if not x.isfinite().all():
                    raise ValueError(f'{name} of the optimizer is not finite')
                if name in ('step', 'exp_avg_sq') and (x < 0).any():
                    raise ValueError(f'{name} of the optimizer is negative')


def counted(content, name, most=None):
    """Reads a whole number of a checkpoint, from 0 to `most`; ValueError where it is none."""
    value = content[name]
    if type(value) is not int or value < 0 or (most is not None and value > most):
        raise ValueError(f'{name} is {str(value)[:40]}')
    return value


def check_finite(weights, what):
    """ValueError where one of the tensors of a dict is not finite."""
    for name, x in weights.items():
        if not x.isfinite().all():
            raise ValueError(f'{name} of {what} is not finite')


def differing(settings, saved):
    """Names of the settings that have other values in what was saved.

    Settings that are newer than that are left out.
    """
    return [name for name in settings if name in saved and settings[name] != saved[name]]


# Models -------------------------------------------------------------------------------------------
MODELS = {  # kind: what makes it of a Config, and which command trains it
    'decoder': (rh.Decoder, 'python fit.py --decoder'),
    'vae': (rh.portrait_encoder, 'python train.py --stage vae'),
    'base': (autoencoder.base_network, 'python train.py --stage base'),
    'upsample': (shortcuts.upsample_network, 'python train.py --stage upsample'),
}
LATENTS = {  # the same of what Rodin has besides, which may or may not have been trained
    'clip': (rodin.clip_encoder, 'python train.py --stage clip'),
    'prior': (rodin.prior_network, 'python train.py --stage prior'),
    'text': (rodin.text_network, 'python train.py --stage text'),
}
REFINER = {'refiner': (refiner.Refiner, 'python train.py --stage refiner')}
MAKERS = {**MODELS, **LATENTS, **REFINER}


def build(kind, config):
    """A new network of a kind; stops where settings of a Config do not go together."""
    make, _ = MAKERS[kind]
    try:
        return make(config)
    except (ValueError, RuntimeError, IndexError, ZeroDivisionError) as error:
        rh.stop(f'--set: there is no {kind} network of these settings ({first_line(error)})')


def write_model(path, kind, config, state, step, **more):
    """A model for inference: its Config, and its weights in fp16 (those of the decoder, which are
    few, in fp32).

    more: what else the file says, of what it was `made_with` for example. A weight that fp16
    cannot hold stops the program, and the file of before stays.
    """
    dtype = torch.float32 if kind == 'decoder' else torch.float16
    weights = {name: x.detach().to('cpu', dtype) for name, x in state.items()}
    for name, x in weights.items():
        if not x.isfinite().all():
            largest = state[name].abs().max().item()
            rh.stop(f'{path}: not written: {name} has values up to {largest:.3g}, '
                    f'which {str(dtype)[6:]} cannot hold; train with a lower learning rate')
    content = {'config': vars(config), 'model': weights, 'step': step, **more}
    write_checkpoint(path, kind, content)


BLOCK = 64  # values that share a step


def packed(state):
    """Weights in 8 bits: blocks of 64 values, whole numbers of -127 ... 127 times a step of their
    own (fp16) -> those, and {name: steps}. What has less than 1024 values stays as it is."""
    weights = {}
    steps = {}
    for name, x in state.items():
        if x.numel() < 1024:
            weights[name] = x
            continue
        blocks = F.pad(x.float().flatten(), (0, -x.numel() % BLOCK)).view(-1, BLOCK)
        step = (blocks.abs().amax(1) / 127).half()
        whole = (blocks / step.float().clamp(min=1e-12)[:, None]).round().clamp(-127, 127)
        weights[name] = whole.to(torch.int8).flatten()[:x.numel()].view(x.shape)
        steps[name] = step
    return weights, steps


def unpacked(weights, steps):
    """The weights that `packed` was given, as nearly as 8 bits tell; ValueError where steps are
    not of these weights."""
    state = dict(weights)
    for name, step in steps.items():
        x = weights[name]
        if x.dtype != torch.int8 or step.shape != (-(-x.numel() // BLOCK),):
            raise ValueError(f'the steps of {name} are of other weights')
        each = step.float().repeat_interleave(BLOCK)[:x.numel()]
        state[name] = each.view(x.shape) * x
    return state


WITHOUT_LAYERS = {'base_aligned': 0}  # where a checkpoint is older than the setting


def config_of(saved):
    """The Config that a checkpoint carries; settings that are newer than it are its preset's, but
    for those that give a network other layers.

    ValueError where it has values that --set would refuse.
    """
    values = {**rh.PRESETS.get(saved.get('preset'), {}), **WITHOUT_LAYERS, **saved}
    config = rh.Config(**{name: values[name] for name in values if name in rh.SETTINGS})
    rh.check_config(config)
    return config


def check_sizes(kind, config, state):
    """ValueError unless weights are those of a Config's network, before that takes memory."""
    make, _ = MAKERS[kind]
    with torch.device('meta'):
        expected = make(config).state_dict()
    odd = expected.keys() ^ state.keys()
    if odd:
        raise ValueError(f'{min(odd)} is in one of file and network alone')
    for name, x in expected.items():
        if not torch.is_tensor(state[name]) or state[name].shape != x.shape:
            raise ValueError(f'{name} is not {tuple(x.shape)}')
        if not state[name].is_floating_point():
            raise ValueError(f'{name} is {state[name].dtype}')


def load_model(kind, folder, device):
    """The model of a kind from folder/<kind>.pt, in fp32 and frozen, with its Config as .config,
    what it was made with as .made_with, and its own fingerprint."""
    make, made_by = MAKERS[kind]
    path = Path(folder) / f'{kind}.pt'
    content = read_checkpoint(path, kind, made_by)
    with reading(path, f'make it again with {made_by}'):
        config = config_of(content['config'])
        state = unpacked(content['model'], content.get('steps', {}))
        check_sizes(kind, config, state)
        model = make(config)
        model.load_state_dict(state)
        if not all(x.isfinite().all() for x in model.state_dict().values()):
            raise ValueError('it holds NaN or infinite values')
    model.config = config
    model.path = path
    model.made_with = content.get('made_with', {})
    model.fingerprint = provenance.fingerprint(model)
    model.settings = content.get('settings')  # of the command that made it
    return model.requires_grad_(False).eval().to(device)


def load_refiner(runs, device):
    """The refiner of `runs`, else the one that ships, of weights/; stops where there is neither."""
    shipped = Path(__file__).parent / 'weights'
    for folder in (Path(runs), shipped):
        if (folder / 'refiner.pt').exists():
            return load_model('refiner', folder, device)
    rh.stop(f'no refiner.pt in {runs} or {shipped}; train one with '
            'python train.py --stage refiner, or leave out --refiner')


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

    # Base and upsample network are of the decoder and the VAE that they were trained with
    beside = {name: beside_of(models[name]) for name in ('decoder', 'vae')}
    for kind in ('base', 'upsample'):
        model = models[kind]
        _, made_by = MODELS[kind]
        provenance.compare(model.path, model.made_with, beside, f'train it again with {made_by}, '
                           'or give the --runs and --fits that belong together')

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
    base = models['base']
    if base.config.latent_width and base.config.condition_drop == 1:  # it sees vectors alone
        latents = dict(models)
        load_latents(latents)
        models['vae'].vector = latents['clip'].encode_images
    return models


def load_clip(folder, device):
    """The CLIP of a folder: our own of clip.pt, or a published one of clip/."""
    published = Path(folder) / 'clip'
    if (Path(folder) / 'clip.pt').exists() or not published.is_dir():
        return load_model('clip', folder, device)
    model = rodin.load_published(published)
    model.path = published
    model.made_with = {}
    model.fingerprint = provenance.fingerprint(model)
    return model.to(device)


def load_latents(models, *kinds):
    """Loads `clip`, `prior` or `text` from where the base network of load_models lies into
    `models`; stops where one is missing, or they do not belong together."""
    base = models['base']
    device = next(base.parameters()).device
    if not base.config.latent_width:
        rh.stop(
            f'{base.path}: takes no vectors, of words for example; train it with '
            '--stage base --set latent_width=96, after --stage clip'
        )
    clip = load_clip(base.path.parent, device)
    beside = {'clip': beside_of(clip)}
    found = {'clip': clip}
    for kind in kinds:
        if kind != 'clip':
            found[kind] = load_model(kind, base.path.parent, device)
    for kind, model in {**found, 'base': base}.items():
        width = model.config.latent_width
        if width != clip.config.latent_width:
            rh.stop(f'{model.path}: vectors of {width} values, {clip.path} makes '
                    f'{clip.config.latent_width}; train both with the same latent_width')
        _, made_by = MAKERS[kind]
        provenance.compare(model.path, model.made_with, beside, f'train it again with {made_by}')
    models.update(found)


def has_latents(models, kind):
    """Whether load_latents would find a model of a kind."""
    base = models['base']
    return bool(base.config.latent_width) and (base.path.parent / f'{kind}.pt').exists()


def beside_of(model):
    """Where a model lies, and its fingerprint: see provenance.compare."""
    return model.path, model.fingerprint


def load_vae(path, config):
    """A portrait encoder with published weights (.safetensors, .bin, .pt): of an AutoencoderKL,
    where it is a VAE."""
    if not Path(path).is_file():
        rh.stop(f'{path}: there is no such file')
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


class Chores:
    """When a run is saved: every so many steps or, without a number, every ten minutes, as long as
    that and pictures take at most 2 % of its time."""
    def __init__(self, every=None, minutes=10, share=0.02):
        self.every = every
        self.between = 60 * minutes
        self.share = share
        self.began = time.monotonic()
        self.last = self.began
        self.spent = 0.0

    def due(self, step):
        """Whether to save after this step."""
        if self.every is not None:
            return (step + 1) % max(self.every, 1) == 0
        now = time.monotonic()
        affordable = self.spent <= self.share * (now - self.began)
        return affordable and now - self.last >= self.between

    @contextlib.contextmanager
    def doing(self):
        began = time.monotonic()
        yield
        self.last = time.monotonic()
        self.spent += self.last - began


class Fused(torch.autograd.Function):
    """What attention keeps on a GPU: queries, keys, values and its result, not all products."""
    @staticmethod
    def forward(ctx, q, k, v):
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out)
        return out


@contextlib.contextmanager
def fused_attention():
    """Lets attention be counted, not computed."""
    plain = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = Fused.apply
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain


def kept_for_backward(network, *inputs):
    """Bytes that a forward pass keeps for the backward pass, besides weights."""
    weights = {p.untyped_storage()._cdata for p in network.parameters()}
    kept = {}

    def pack(x):
        storage = x.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), fused_attention():
        network(*inputs)
    return sum(storage.nbytes() for storage in kept.values())


HALF = 0.55  # of its activations that a network keeps in bf16: 0.51 and 0.52 were counted


def memory_of_training(kind, config, bf16, recompute):
    """Bytes that training of a base or upsample network takes -> (of the run, of each sample): by
    shapes alone, so that nothing is computed."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # imports much, for this alone
    make, _ = MODELS[kind]
    size = config.base_resolution if kind == 'base' else config.resolution
    (channels, pixels), maps = rh.feature_shapes(config)
    with FakeTensorMode():
        network = make(config).train()
        network.checkpoint = recompute
        low = torch.zeros(1, 3, config.channels, config.base_resolution, config.base_resolution)
        latent = torch.zeros(1, channels, pixels, pixels)
        portrait = rh.Portrait(latent, [torch.zeros(1, c, p, p) for c, p in maps], low)
        planes = torch.zeros(1, 3, config.channels, size, size)
        kept = kept_for_backward(network, planes, torch.zeros(1), portrait)
    # Weight, gradient, Adam's two and EMA; and the weight in bf16
    of_run = (22 if bf16 else 20) * sum(p.numel() for p in network.parameters())
    of_sample = kept * (HALF if bf16 else 1) + 8 * planes.nbytes  # and what the loss is made of
    return of_run, of_sample


def fit_memory(kind, config, samples, bf16, available):
    """Whether training has to compute activations again to fit `samples` at a time into so many
    bytes; stops, and says how many fit, where that does not help."""
    for recompute in (False, True):
        of_run, of_sample = memory_of_training(kind, config, bf16, recompute)
        if of_run + samples * of_sample <= available:
            return recompute
    fits = int((available - of_run) / of_sample)
    advice = f'give --micro-batch {fits}, which changes nothing else' if fits > 0 else (
        'not even one sample fits; give --bf16, another preset or a larger GPU')
    rh.stop(f'{samples} samples at a time take {(of_run + samples * of_sample) / 2 ** 30:.0f} GiB, '
            f'{available / 2 ** 30:.0f} are free; {advice}')


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
        now = {name: p.float() for name, p in module.named_parameters()}
        averages = [self.shadow[name] for name in now]
        torch._foreach_lerp_(averages, list(now.values()), 1 - decay)


def print_departures(config):
    """One line: what a config does that no paper does."""
    changed = rh.departures(config)
    if changed:
        print(f'not in the papers (docs/details.md): {", ".join(changed)}')
