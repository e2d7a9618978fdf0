"""Words to a portrait: Stable Diffusion, with a LoRA that has learned how our portraits look.

    pip install diffusers transformers peft
    python train.py --stage lora --data portraits       images with captions: x.png and x.txt
    python sample.py --prompt "a man with a red beard" --lora runs/lora.safetensors

This is section 4.5 of the paper and its supplement D. The paper tunes on 40 frontal renders with
prompts that begin with a trigger phrase; it names neither the version of Stable Diffusion nor any
number, so those of Settings are ours. train.py's loop does the training, and this file tells it
what it needs to know of a LoRA. Weights are read from .safetensors files alone, since others can
run code.
"""
import contextlib
import inspect
import json
import math
import re
import zlib
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import batches
import rodinhd as rh
import running
import scenes

SD = 'stable-diffusion-v1-5/stable-diffusion-v1-5'
TRIGGER = 'Blender Synthetic Avata'  # the paper's, spelled like this

# What words have to ask for where there is no LoRA, and what they ask not to have.
FRAMING = 'portrait, head and shoulders, front view, plain white background'
NEGATIVE = 'cropped head, side view, several people, hands, text, frame'

# The layers of the U-Net's attention that the LoRA adds to.
PROJECTIONS = ['to_k', 'to_q', 'to_v', 'to_out.0']


@dataclass
class Settings:
    """What --set changes with --stage lora."""
    sd: str = SD
    trigger: str = TRIGGER
    lora_rank: int = 8
    lora_size: int = 0  # pixels a side; 0: the pipeline's own
    lora_steps: int = 2000
    lora_batch: int = 4
    lora_lr: float = 1e-4
    final_lr: float = 0.05
    ema: float = 0.99
    clip_grad: float = 1.0
    caption_drop: float = 0.1  # share of the captions left empty, for guidance

    # The captions' checksum, which prepare_lora fills in: a run does not go on with others.
    captions: int = 0


def make_settings(sd, overrides=()):
    """Makes the Settings of a pipeline with `name=value` overrides, each checked against the
    field's name and type; stops where one does not fit."""
    settings = Settings(sd=str(sd))
    kinds = {f.name: type(f.default) for f in fields(Settings)}
    for item in overrides:
        name, _, text = item.partition('=')
        if name not in kinds:
            known = ', '.join(kinds)
            rh.stop(f'--set {item}: no such setting of --stage lora; there are {known}')
        try:
            value = kinds[name](text)
            fits = kinds[name] is str or least(name, kinds[name]) <= value < math.inf
        except ValueError:
            fits = False
        if not fits:
            rh.stop(f'--set {item}: {name} takes a positive {kinds[name].__name__}')
        setattr(settings, name, value)
    return settings


def least(name, kind):
    """The smallest value of a setting: only lora_size and what is no integer may be 0."""
    return 1 if kind is int and name != 'lora_size' else 0


# Pipelines and LoRA files -------------------------------------------------------------------------


def packages():
    """Imports diffusers, whose warnings about what does not matter are turned off, and returns
    it; stops where a package is missing."""
    try:
        import diffusers
        import peft  # noqa: F401
        import transformers
    except ImportError as error:
        missing = error.name or error
        rh.stop(f'words need the {missing} package: pip install diffusers transformers peft')
    for package in (diffusers, transformers):
        package.utils.logging.set_verbosity_error()
        package.utils.logging.disable_progress_bar()
    return diffusers


def brief(error):
    """The first line of an error, or its type where it has no text."""
    lines = str(error).strip().splitlines()
    return lines[0][:120] if lines else type(error).__name__[:120]


def load_pipeline(sd, device, dtype):
    """Loads a pipeline of diffusers from a folder, the cache or the network, in this order, and
    .safetensors files only; stops where none has it."""
    diffusers = packages()
    reason = None

    # Where all is in the cache, the network is not asked.
    for cached in (True, False):
        try:
            pipe = diffusers.DiffusionPipeline.from_pretrained(
                str(sd), use_safetensors=True, local_files_only=cached
            )
            return pipe.to(device, dtype)
        except Exception as error:  # what is missing, damaged or refused raises many types
            reason = error

    if Path(sd).exists():
        rh.stop(
            f'{sd}: not a pipeline of diffusers in .safetensors files, with model_index.json, '
            f'unet/, vae/ ({brief(reason)})'
        )
    rh.stop(
        f'{sd}: no such folder, not in the cache, and cannot be downloaded '
        f'({type(reason).__name__}); give --sd the folder of a Stable Diffusion pipeline '
        f'(model_index.json, unet/, vae/, ...) or a model id such as {SD}'
    )


def lora_file(path):
    """Finds a LoRA's file, or the only one of a folder -> (Path, its trigger phrase); stops
    where it is not to be read."""
    from safetensors import safe_open

    path = Path(path)
    files = sorted(path.glob('*.safetensors')) if path.is_dir() else [path]
    if len(files) != 1 or files[0].suffix != '.safetensors':
        rh.stop(
            f'{path}: give --lora one .safetensors file, or a folder with one; other files, '
            'which can run code, are not read'
        )
    if not files[0].is_file():
        rh.stop(f'{path}: there is no such LoRA; make it with python train.py --stage lora')
    try:
        with safe_open(files[0], 'pt') as file:
            metadata = file.metadata() or {}
    except Exception as error:  # damaged, or a pickle under another name
        rh.stop(f'{path}: not a readable .safetensors file ({brief(error)})')
    return files[0], metadata.get('trigger', TRIGGER)


def add_lora(pipe, file, sd, lora):
    """Loads a LoRA's file into a pipeline; stops where it is of another network."""
    try:
        pipe.load_lora_weights(
            file.parent, weight_name=file.name, use_safetensors=True, local_files_only=True
        )
        reason = None if pipe.get_active_adapters() else 'none of its weights has a place there'
    except Exception as error:  # another version of Stable Diffusion, or no LoRA at all
        reason = brief(error)
    if reason:
        rh.stop(f'{lora}: this LoRA does not fit {sd} ({reason})')


# Words and portraits ------------------------------------------------------------------------------


def with_trigger(text, trigger):
    """Puts the trigger phrase before a text, unless it is in there already."""
    if re.search(rf'(?<!\w){re.escape(trigger)}(?!\w)', text, re.I):
        return text
    return ', '.join(filter(None, (trigger, text.strip())))


def name_of(prompt):
    """Makes a folder's name of a prompt."""
    return re.sub(r'\W+', '-', prompt.lower()).strip('-')[:40].strip('-') or 'prompt'


def is_blank(image):
    """Tells whether a PIL image has one colour everywhere."""
    return all(darkest == brightest for darkest, brightest in image.getextrema())


def portrait_of(
    prompt,
    sd=SD,  # folder or model id of a text-to-image pipeline
    lora=None,  # a file, or a folder with one
    seed=0,
    device='cpu',  # a GPU works in fp16
    steps=None,  # None: the pipeline's own
    guidance=None,
    negative=NEGATIVE,
):
    """Draws a portrait of what the prompt says: a PIL image of the pipeline's own size, the same
    for the same seed. With a LoRA its trigger phrase goes before the prompt; without one, words
    that ask for a portrait from the front follow it."""
    packages()
    if lora:
        file, trigger = lora_file(lora)
        text = with_trigger(prompt, trigger)
    else:
        text = ', '.join(filter(None, (prompt.strip(), FRAMING)))

    on_gpu = torch.device(device).type == 'cuda'
    pipe = load_pipeline(sd, device, torch.float16 if on_gpu else torch.float32)
    takes = inspect.signature(pipe.__call__).parameters
    if 'prompt' not in takes:
        rh.stop(f'{sd}: a {type(pipe).__name__} makes no pictures of words')
    if lora:
        add_lora(pipe, file, sd, lora)

    print(f'portrait of: {text}')
    packages().utils.logging.set_verbosity_warning()  # it says what it cuts from a long prompt
    pipe.set_progress_bar_config(desc='portrait')
    how = {
        'negative_prompt': negative,
        'num_inference_steps': steps,
        'guidance_scale': guidance,
    }
    how = {name: value for name, value in how.items() if value is not None and name in takes}
    drawn = pipe(prompt=text, generator=torch.Generator().manual_seed(seed), **how)

    image = drawn.images[0].convert('RGB')
    if any(getattr(drawn, 'nsfw_content_detected', None) or ()) or is_blank(image):
        rh.stop(
            f'{sd}: the portrait is blank, as its safety checker makes pictures that it deems '
            'unfit; try another --seed or other words'
        )
    return image


# Captions -----------------------------------------------------------------------------------------


def read_text(path):
    """Reads a caption's file, '' where there is none; stops where it is not text."""
    if not path.is_file():
        return ''
    try:
        return path.read_text(encoding='utf-8')
    except ValueError as error:
        rh.stop(f'{path}: not readable as captions ({brief(error)})')


def read_table(path):
    """Reads captions.json, {file name or id: text}, {} where there is none; stops where it is
    something else."""
    if not path.is_file():
        return {}
    try:
        table = json.loads(read_text(path))
    except ValueError as error:
        rh.stop(f'{path}: not readable as captions ({brief(error)})')
    if not isinstance(table, dict) or not all(isinstance(x, str) for x in table.values()):
        rh.stop(f'{path}: not readable as captions (give {{file name: text}})')
    return table


def avatars_of(data):
    """Finds {portrait path: folder} of the avatars in a folder; {} where it holds none."""
    data = Path(data)
    if any(data.glob('transforms*.json')) or any(data.glob('*/transforms*.json')):
        return {scenes.portrait_path(folder): folder for folder in scenes.list_avatars(data)}
    return {}


def find_portraits(data):
    """Finds [(name, image path, path of its caption)] in a folder of images, or of avatars,
    whose portraits these are."""
    avatars = avatars_of(data)
    if avatars:
        return [(f.name, path, f / 'caption.txt') for path, f in avatars.items()]
    paths = sorted(p for p in data.glob('*') if p.suffix.lower() in scenes.IMAGE_SUFFIXES)
    return [(path.name, path, path.with_suffix('.txt')) for path in paths]


def read_captions(data, trigger):
    """Reads [(image path, caption)] of a folder: of images, with captions in x.txt beside x.png,
    or of avatars (their portraits, with captions in <id>/caption.txt); or all of them in one
    captions.json, {file name or id: text}. Each caption begins with the trigger phrase, which
    stands alone where there is none."""
    data = Path(data)
    found = find_portraits(data)
    if not found:
        rh.stop(
            f'{data}: holds neither images nor avatars; give a folder of portraits, x.png with '
            'its caption in x.txt, with --data'
        )
    table = read_table(data / 'captions.json')
    pairs = []
    for name, path, caption_path in found:
        text = table.get(name) or read_text(caption_path)
        pairs.append((path, with_trigger(' '.join(text.split()), trigger)))
    return pairs


class Captioned(torch.utils.data.Dataset):
    """Portraits on white, image (3, S, S) in [-1, 1], with their captions as the tokenizer's ids
    (L,).

    avatars: {image path: folder} of the portraits that are avatars', whose frames are turned by
    their pose and not by EXIF.
    """
    def __init__(self, pairs, size, tokenize, avatars=None):
        self.size = size
        self.avatars = avatars or {}
        self.made_with = {}  # the captions are among the Settings
        self.paths, self.captions = zip(*pairs)
        self.ids = tokenize(list(self.captions))

    def names(self):
        """What tells these items from others."""
        return [Path(path).parent.name + Path(path).name for path in self.paths]

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        path = self.paths[i]
        if path in self.avatars:
            rgb, alpha = scenes.portrait_of(self.avatars[path], self.size)
        else:
            rgb, alpha = scenes.read_portrait(path, self.size)
        return {'image': scenes.portrait_on_white(rgb, alpha), 'ids': self.ids[i]}


# Training -----------------------------------------------------------------------------------------


class Adapter(nn.Module):
    """A U-Net whose parameters are the LoRA's alone, so that optimiser, EMA and checkpoints hold
    none of Stable Diffusion's 860 million."""
    def __init__(self, unet):
        super().__init__()
        self.frozen = [unet]  # in a list, so that it is no submodule
        trained = {n: p for n, p in unet.named_parameters() if p.requires_grad}
        self.weights = nn.ParameterDict({n.replace('.', '/'): p for n, p in trained.items()})

    def forward(self, x_t, t, states):
        return self.frozen[0](x_t, t, states).sample

    @contextlib.contextmanager
    def holding(self, state):
        """Yields the U-Net with other weights, and puts its own back afterwards."""
        trained = {n: p.clone() for n, p in self.state_dict().items()}
        self.load_state_dict(state)
        yield self.frozen[0]
        self.load_state_dict(trained)


def load_for_training(config, device):
    """Loads Stable Diffusion 1 or 2, frozen, with a new LoRA in its U-Net, and its noise
    schedule."""
    diffusers = packages()
    from peft import LoraConfig

    pipe = load_pipeline(config.sd, device, torch.float32)
    if not isinstance(pipe, diffusers.StableDiffusionPipeline):
        kind = type(pipe).__name__
        rh.stop(
            f'{config.sd}: --stage lora tunes a StableDiffusionPipeline (1.x or 2.x), '
            f'this is a {kind}'
        )
    scheduler = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
    for module in (pipe.unet, pipe.vae, pipe.text_encoder):
        module.requires_grad_(False)
    rank = config.lora_rank
    lora = LoraConfig(r=rank, lora_alpha=rank, target_modules=PROJECTIONS)
    pipe.unet.add_adapter(lora)
    pipe.unet.enable_gradient_checkpointing()
    pipe.set_progress_bar_config(disable=True)
    return pipe, scheduler


def prepare_lora(args, config, device):
    """Prepares what train.prepare_vae does, for a LoRA: data, draw, network, loss and picture,
    which takes the weights and not a network."""
    packages()
    pairs = read_captions(args.data, config.trigger)
    pipe, scheduler = load_for_training(config, device)
    vae = pipe.vae
    factor = pipe.vae_scale_factor
    size = config.lora_size or pipe.unet.config.sample_size * factor
    if size % factor:
        rh.stop(f'--set lora_size={size}: must divide by {factor}')
    latent_shape = (vae.config.latent_channels, size // factor, size // factor)

    def tokenize(texts):
        # Cut to the 77 tokens that CLIP reads.
        how = dict(padding='max_length', truncation=True, return_tensors='pt')
        return pipe.tokenizer(texts, **how).input_ids

    network = Adapter(pipe.unet)
    items = Captioned(pairs, size, tokenize, avatars_of(args.data))
    no_words = tokenize([''])[0].to(device)
    config.captions = zlib.crc32('\n'.join(items.captions).encode())

    def draw(batch, dice):
        keep = dice.uniform(1) >= config.caption_drop
        return {
            'image': batch['image'],
            'ids': torch.where(keep, batch['ids'], no_words),
            't': dice.below(scheduler.config.num_train_timesteps),
            'posterior': dice.normal(*latent_shape),
            'noise': dice.normal(*latent_shape),
        }

    def loss(network, batch):
        noise, t = batch['noise'], batch['t']
        with torch.no_grad():
            encoded = vae.encode(batch['image']).latent_dist
            x_start = encoded.mean + encoded.std * batch['posterior']
            x_start = x_start * vae.config.scaling_factor
            states = pipe.text_encoder(batch['ids'])[0]
        x_t = scheduler.add_noise(x_start, noise, t)
        targets = {
            'epsilon': noise,
            'v_prediction': scheduler.get_velocity(x_start, noise, t),
        }
        target = targets[scheduler.config.prediction_type]
        return {'mse': F.mse_loss(network(x_t, t, states).float(), target.float())}

    def picture(state):
        shown = [i * len(items) // 4 for i in range(4)]
        drawn = []
        with network.holding(state):
            for i in shown:
                generator = torch.Generator().manual_seed(i)
                how = dict(num_inference_steps=20, generator=generator, output_type='pt')
                drawn += pipe(items.captions[i], height=size, width=size, **how).images
        images = torch.stack([items[i]['image'] for i in shown]).to(device)
        return torch.cat([images, torch.stack(drawn) * 2 - 1], dim=2)

    return batches.Draws(items, args.seed), draw, network, loss, picture


def write_lora(path, network, state, trigger):
    """Writes the weights `state` of an Adapter in the form of diffusers, with the trigger phrase
    in the file's header."""
    from diffusers import StableDiffusionPipeline, utils
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    def save(weights, name):
        save_file(weights, name, metadata={'format': 'pt', 'trigger': trigger})

    for name, x in state.items():
        if not x.isfinite().all():
            rh.stop(f'{path}: not written: {name} has NaN or infinite values')
    with running.atomic(path) as temporary, network.holding(state) as unet:
        layers = utils.convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
        StableDiffusionPipeline.save_lora_weights(
            temporary.parent, layers, weight_name=temporary.name, save_function=save
        )
