"""Words to a portrait: Stable Diffusion with a LoRA that has learned how our portraits look (section 4.5, supplement D).

    pip install diffusers transformers peft
    python train.py --stage lora --data portraits               images, each with a caption beside it: x.png and x.txt
    python sample.py --prompt "a man with a red beard" --lora runs/lora.safetensors

The paper tunes on 40 frontal renders with prompts that begin with a trigger phrase, and names neither the version of Stable Diffusion nor
any number: those of Settings are ours. train.py's loop does the training; here is what it needs to know of a LoRA. Weights are read from
.safetensors alone, since other files can run code.
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

SD = 'stable-diffusion-v1-5/stable-diffusion-v1-5'
TRIGGER = 'Blender Synthetic Avata'     # the paper's, spelled like this
FRAMING = 'portrait, head and shoulders, front view, plain white background'    # what words without a LoRA have to ask for
NEGATIVE = 'cropped head, side view, several people, hands, text, frame'


@dataclass
class Settings:
    """What --set changes with --stage lora."""
    sd: str = SD
    trigger: str = TRIGGER
    lora_rank: int = 8
    lora_size: int = 0                  # pixels a side; 0: the pipeline's own
    lora_steps: int = 2000
    lora_batch: int = 4
    lora_lr: float = 1e-4
    final_lr: float = 0.05
    ema: float = 0.99
    caption_drop: float = 0.1           # share of the captions that are left empty, for guidance
    captions: int = 0                   # their checksum, which prepare_lora fills in: a run does not go on with others

def make_settings(sd, overrides=()):
    """Settings of a pipeline with `name=value` overrides, each checked against the field's name and type."""
    settings, kinds = Settings(sd=str(sd)), {f.name: type(f.default) for f in fields(Settings)}
    for item in overrides:
        name, _, text = item.partition('=')
        if name not in kinds:
            rh.stop(f'--set {item}: no such setting of --stage lora; there are {", ".join(kinds)}')
        try:
            setattr(settings, name, value := kinds[name](text))
            assert kinds[name] is str or (kinds[name] is int and name != 'lora_size') <= value < math.inf
        except (ValueError, AssertionError):
            rh.stop(f'--set {item}: {name} takes a positive {kinds[name].__name__}')
    return settings

def packages():
    """The diffusers module, told to keep to itself what does not matter; one line where a package is missing."""
    try:
        import diffusers
        import peft  # noqa: F401
        import transformers
    except ImportError as error:
        rh.stop(f'words need the {error.name or error} package: pip install diffusers transformers peft')
    for package in (diffusers, transformers):
        package.utils.logging.set_verbosity_error()
        package.utils.logging.disable_progress_bar()
    return diffusers

def brief(error):
    """The first line of an error, or its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]

def load_pipeline(sd, device, dtype):
    """A pipeline of diffusers from a folder, the cache or the network, in this order; one line where none has it. safetensors only."""
    diffusers, reason = packages(), None
    for cached in (True, False):        # where all is in the cache, the network is not asked
        try:
            return diffusers.DiffusionPipeline.from_pretrained(str(sd), use_safetensors=True, local_files_only=cached).to(device, dtype)
        except Exception as error:      # what is missing, damaged or refused raises many types
            reason = error
    if Path(sd).exists():
        rh.stop(f'{sd}: not a pipeline of diffusers in .safetensors files, with model_index.json, unet/, vae/ ({brief(reason)})')
    rh.stop(f'{sd}: no such folder, not in the cache, and cannot be downloaded ({type(reason).__name__}); give --sd the folder of a '
            f'Stable Diffusion pipeline (model_index.json, unet/, vae/, ...) or a model id such as {SD}')

def lora_file(path):
    """A LoRA's file, or the only one of a folder -> (Path, its trigger phrase); one line where it is not to be read."""
    from safetensors import safe_open
    path = Path(path)
    files = sorted(path.glob('*.safetensors')) if path.is_dir() else [path]
    if len(files) != 1 or files[0].suffix != '.safetensors':
        rh.stop(f'{path}: give --lora one .safetensors file, or a folder with one; other files, which can run code, are not read')
    if not files[0].is_file():
        rh.stop(f'{path}: there is no such LoRA; make it with python train.py --stage lora')
    try:
        with safe_open(files[0], 'pt') as file:
            return files[0], (file.metadata() or {}).get('trigger', TRIGGER)
    except Exception as error:          # damaged, or a pickle under another name
        rh.stop(f'{path}: not a readable .safetensors file ({brief(error)})')

def with_trigger(text, trigger):
    """The trigger phrase, then the text, unless it is in there already."""
    there = re.search(rf'(?<!\w){re.escape(trigger)}(?!\w)', text, re.I)
    return text if there else ', '.join(filter(None, (trigger, text.strip())))

def name_of(prompt):
    """A folder's name for a prompt."""
    return re.sub(r'\W+', '-', prompt.lower()).strip('-')[:40].strip('-') or 'prompt'

def portrait_of(prompt, sd=SD, lora=None, seed=0, device='cpu', steps=None, guidance=None, negative=NEGATIVE):
    """A portrait of what the prompt says, a PIL image of the pipeline's own size, the same for the same seed; in fp16 on a GPU. sd: folder
    or model id of a text-to-image pipeline; lora: file, or folder with one; steps, guidance: None for the pipeline's own. With a LoRA its
    trigger phrase goes before the prompt; without one, words that ask for a portrait from the front follow it."""
    packages()
    file, trigger = lora_file(lora) if lora else (None, '')
    text = with_trigger(prompt, trigger) if lora else ', '.join(filter(None, (prompt.strip(), FRAMING)))
    pipe = load_pipeline(sd, device, torch.float16 if torch.device(device).type == 'cuda' else torch.float32)
    takes = inspect.signature(pipe.__call__).parameters
    if 'prompt' not in takes:
        rh.stop(f'{sd}: a {type(pipe).__name__} makes no pictures of words')
    if lora:
        try:
            pipe.load_lora_weights(file.parent, weight_name=file.name, use_safetensors=True, local_files_only=True)
            assert pipe.get_active_adapters(), 'none of its weights has a place there'
        except Exception as error:      # another version of Stable Diffusion, or no LoRA at all
            rh.stop(f'{lora}: this LoRA does not fit {sd} ({brief(error)})')
    print(f'portrait of: {text}')
    packages().utils.logging.set_verbosity_warning()                            # it says what it cuts from a long prompt
    pipe.set_progress_bar_config(desc='portrait')
    how = {'negative_prompt': negative, 'num_inference_steps': steps, 'guidance_scale': guidance}
    how = {k: v for k, v in how.items() if v is not None and k in takes}
    out = pipe(prompt=text, generator=torch.Generator().manual_seed(seed), **how)
    image = out.images[0].convert('RGB')
    if any(getattr(out, 'nsfw_content_detected', None) or ()) or all(low == high for low, high in image.getextrema()):
        rh.stop(f'{sd}: the portrait is blank, as its safety checker makes pictures that it deems unfit; try another --seed or other words')
    return image

def read_captions(data, trigger):
    """[(image path, caption)] of a folder: of images, with captions in x.txt beside x.png, or of avatars (their portraits, with captions in
    <id>/caption.txt); or all in one captions.json, {file name or id: text}. Each begins with the trigger phrase, which stands alone where
    there is no caption."""
    data, source, pairs = Path(data), Path(data) / 'captions.json', []
    if any(data.glob('transforms*.json')) or any(data.glob('*/transforms*.json')):
        found = [(folder.name, rh.portrait_path(folder), folder / 'caption.txt') for folder in rh.list_avatars(data)]
    else:
        images = sorted(p for p in data.glob('*') if p.suffix.lower() in rh.IMAGE_SUFFIXES)
        found = [(p.name, p, p.with_suffix('.txt')) for p in images]
    if not found:
        rh.stop(f'{data}: holds neither images nor avatars; give a folder of portraits, x.png with its caption in x.txt, with --data')
    try:
        table = json.loads(source.read_text(encoding='utf-8')) if source.is_file() else {}
        assert isinstance(table, dict) and all(isinstance(text, str) for text in table.values()), 'give {file name: text}'
        for name, path, source in found:
            text = table.get(name) or (source.read_text(encoding='utf-8') if source.is_file() else '')
            pairs.append((path, with_trigger(' '.join(text.split()), trigger)))
    except (ValueError, AssertionError) as error:
        rh.stop(f'{source}: not readable as captions ({brief(error)})')
    return pairs

class Captioned(torch.utils.data.Dataset):
    """Portraits on white, image (3, S, S) in [-1, 1], with their captions as the tokenizer's ids (L,)."""
    def __init__(self, pairs, size, tokenize):
        self.size, (self.paths, self.captions) = size, zip(*pairs)
        self.ids = tokenize(list(self.captions))

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        return {'image': rh.portrait_on_white(*rh.read_portrait(self.paths[i], self.size)), 'ids': self.ids[i]}

class Adapter(nn.Module):
    """A U-Net whose parameters are the LoRA's alone, so that optimiser, EMA and checkpoints hold none of Stable Diffusion's 860 million."""
    def __init__(self, unet):
        super().__init__()
        self.frozen = [unet]            # in a list, so no submodule
        self.weights = nn.ParameterDict({n.replace('.', '/'): p for n, p in unet.named_parameters() if p.requires_grad})

    def forward(self, x_t, t, states):
        return self.frozen[0](x_t, t, states).sample

    @contextlib.contextmanager
    def holding(self, state):
        """With other weights for a while."""
        trained = {n: p.clone() for n, p in self.state_dict().items()}
        self.load_state_dict(state)
        yield self.frozen[0]
        self.load_state_dict(trained)

def prepare_lora(args, config, device, world):
    """What train.prepare_vae returns, for a LoRA of Stable Diffusion 1 or 2; picture takes the weights, not a network."""
    diffusers, pairs = packages(), read_captions(args.data, config.trigger)
    from peft import LoraConfig
    pipe = load_pipeline(config.sd, device, torch.float32)
    if not isinstance(pipe, diffusers.StableDiffusionPipeline):
        rh.stop(f'{config.sd}: --stage lora tunes a StableDiffusionPipeline (1.x or 2.x), this is a {type(pipe).__name__}')
    unet, vae, scheduler = pipe.unet, pipe.vae, diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
    size, factor = config.lora_size or unet.config.sample_size * pipe.vae_scale_factor, pipe.vae_scale_factor
    if size % factor:
        rh.stop(f'--set lora_size={size}: must divide by {factor}')
    def tokenize(texts):                # cut to the 77 tokens that CLIP reads
        return pipe.tokenizer(texts, padding='max_length', truncation=True, return_tensors='pt').input_ids
    for module in (unet, vae, pipe.text_encoder):
        module.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=config.lora_rank, lora_alpha=config.lora_rank, target_modules=['to_k', 'to_q', 'to_v', 'to_out.0']))
    unet.enable_gradient_checkpointing()
    network, items, empty = Adapter(unet), Captioned(pairs, size, tokenize), tokenize([''])[0]
    config.captions = zlib.crc32('\n'.join(items.captions).encode())
    pipe.set_progress_bar_config(disable=True)
    def draw(item, i, j):
        ids, latent = item['ids'] if torch.rand(()) >= config.caption_drop else empty, (vae.config.latent_channels, *2 * [size // factor])
        return {'image': item['image'], 'ids': ids, 't': torch.randint(scheduler.config.num_train_timesteps, ()),
                'posterior': torch.randn(latent), 'noise': torch.randn(latent)}
    def loss(network, batch):
        noise, t = batch['noise'], batch['t']
        with torch.no_grad():
            encoded = vae.encode(batch['image']).latent_dist
            x_start = (encoded.mean + encoded.std * batch['posterior']) * vae.config.scaling_factor
            states = pipe.text_encoder(batch['ids'])[0]
        x_t = scheduler.add_noise(x_start, noise, t)
        target = {'epsilon': noise, 'v_prediction': scheduler.get_velocity(x_start, noise, t)}[scheduler.config.prediction_type]
        return {'mse': F.mse_loss(network(x_t, t, states).float(), target.float())}
    def picture(state):
        shown = [i * len(items) // 4 for i in range(4)]
        with network.holding(state):
            drawn = [pipe(items.captions[i], height=size, width=size, num_inference_steps=20, generator=torch.Generator().manual_seed(i),
                          output_type='pt').images for i in shown]
        return torch.cat([torch.stack([items[i]['image'] for i in shown]).to(device), torch.cat(drawn) * 2 - 1], dim=2)
    return batches.Draws(items, draw, args.seed), network, loss, picture

def write_lora(path, network, state, trigger):
    """The weights `state` of an Adapter in the form of diffusers, with the trigger phrase in the file's header."""
    from diffusers import StableDiffusionPipeline, utils
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file
    def save(weights, name):
        save_file(weights, name, metadata={'format': 'pt', 'trigger': trigger})
    with rh.atomic(path) as temporary, network.holding(state) as unet:
        layers = utils.convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
        StableDiffusionPipeline.save_lora_weights(temporary.parent, layers, weight_name=temporary.name, save_function=save)
