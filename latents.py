"""What trains Rodin's latents: portraits with facts about them, and the vectors of CLIP.

train.py's loop does the training, and this file tells it what it needs to know of the stages clip,
prior and text; the networks and their losses are in rodin.py.
"""
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F

import batches
import captions
import rodin
import rodinhd as rh
import running
import scenes


# Items --------------------------------------------------------------------------------------------
class Described(torch.utils.data.Dataset):
    """Reads the portraits of the avatars in `data`, small, and the facts about them (captions.py).

    An item is a dict of portrait (3, S, S) in [-1, 1], alpha (1, S, S) in 0..1 and facts (F,) of
    zeros and ones. It is kept, in bytes, once it was read: portraits of 64 x 64 pixels are 16 KB.
    """
    def __init__(self, data, config, size):
        self.config = config
        self.size = size
        self.made_with = {}
        self.folders = scenes.list_avatars(data)
        self.kept = {}

    def names(self):
        """What tells these items from others."""
        return [folder.name for folder in self.folders]

    def __len__(self):
        return len(self.folders)

    def __getitem__(self, i):
        i = range(len(self))[i]
        if i not in self.kept:
            portrait = scenes.portrait_of(self.folders[i], self.config.portrait)
            facts = captions.as_vector(captions.facts_of(self.folders[i], *portrait))
            rgb, alpha = (F.adaptive_avg_pool2d(x, self.size) for x in portrait)
            pixels = torch.cat([(rgb + 1) / 2, alpha])
            self.kept[i] = ((pixels * 255).round().byte(), facts)
        pixels, facts = self.kept[i]
        pixels = pixels.float() / 255
        return {'portrait': pixels[:3] * 2 - 1, 'alpha': pixels[3:], 'facts': facts}


def on_white(item):
    """The portrait (..., 3, S, S) of an item of Described, or of a batch, on white."""
    return scenes.portrait_on_white(item['portrait'], item['alpha'])


def some_facts(facts, dice):
    """Facts (B, F) of which a random share is left out, as sentences leave out most."""
    least = dice.uniform(1) ** 2
    return facts * (dice.uniform(facts.shape[1]) >= least)


class Latents(torch.utils.data.Dataset):
    """The vectors z (K, D) that CLIP makes of K views of each avatar's portrait, and its facts
    (F,): the portrait as it is, and disturbed where training disturbs portraits."""

    def __init__(self, clip, described, config, views=4):
        self.described = described
        self.made_with = {'clip': clip.fingerprint}
        found = []
        for i, item in enumerate(
            running.Bar(described, desc='latents', disable=dist.get_rank() > 0)
        ):
            rgb, alpha = item['portrait'], item['alpha']
            images = [scenes.portrait_on_white(rgb, alpha)]
            if config.augment:
                others = range(i * (views - 1), (i + 1) * (views - 1))
                images += batches.photo(
                    rgb.expand(views - 1, -1, -1, -1), alpha.expand(views - 1, -1, -1, -1),
                    batches.Dice(others),
                )
            found.append(clip.encode_images(torch.stack(images).to(clip.device)).cpu())
        self.z = torch.stack(found)
        self.facts = torch.stack([item['facts'] for item in described])

    def names(self):
        return self.described.names()

    def __len__(self):
        return len(self.z)

    def paths(self):
        return []  # of planes files

    def __getitem__(self, i):
        return {'z': self.z[i], 'facts': self.facts[i]}


def keep_published(source, runs):
    """Puts a published CLIP (a folder, or its name on the hub) into runs/clip."""
    clip = rodin.load_published(source)
    if (runs / 'clip.pt').exists():
        rh.stop(f'{runs / "clip.pt"}: our own CLIP is there; delete it, or give other --runs')
    runs.mkdir(parents=True, exist_ok=True)
    clip.model.save_pretrained(runs / 'clip')
    clip.tokenizer.save_pretrained(runs / 'clip')
    print(f'written to {runs / "clip"}: vectors of {clip.config.latent_width} values; '
          f'train the base network with --set latent_width={clip.config.latent_width}')


# Stages -------------------------------------------------------------------------------------------
def clip_of(args, config, device):
    """The CLIP of a run; stops where its vectors have another width than a config asks for."""
    clip = running.load_clip(args.runs, device)
    if clip.config.latent_width != config.latent_width:
        rh.stop(
            f'{clip.path}: its vectors have {clip.config.latent_width} values, '
            f'latent_width is {config.latent_width}; give --set '
            f'latent_width={clip.config.latent_width}'
        )
    return clip


def prepare_clip(args, config, device):
    """Prepares what train.prepare_vae does, for our CLIP: data, draw, network, loss and picture."""
    if dist.get_world_size() > 1 or args.micro_batch:
        rh.stop('--stage clip compares all samples of a batch with one another: '
                'give it one rank, without --micro-batch')
    items = Described(args.data, config, rodin.SIDE)
    network = running.build('clip', config)

    def draw(batch, dice):
        return {
            'image': on_white(batch),
            'other': batches.photo(batch['portrait'], batch['alpha'], dice),
            'facts': batch['facts'],
            'said': some_facts(batch['facts'], dice),
        }

    def picture(network):
        """Six portraits, and for each that of all others whose z is nearest."""
        images = torch.stack([on_white(item) for item in items])
        z = network.encode_images(images.to(device))
        near = z @ z.T
        near.fill_diagonal_(-math.inf)
        shown = [i * len(items) // 6 for i in range(6)]
        return torch.cat([images[shown], images[near[shown].argmax(1).cpu()]], dim=2)

    return batches.Draws(items, args.seed), draw, network, rodin.clip_loss, picture


def prepare_latents(args, config, device):
    """The same for the diffusion of vectors, of nothing (--stage prior) or of words (text)."""
    clip = clip_of(args, config, device)
    items = Latents(clip, Described(args.data, config, clip.side), config)
    network = running.build(args.stage, config)
    of_words = args.stage == 'text'

    def draw(batch, dice):
        count, views, _ = batch['z'].shape
        made = {
            'z': batch['z'][torch.arange(count, device=device), dice.below(views)],
            'noise': dice.normal(config.latent_width),
            't': dice.below(config.prior_timesteps),
        }
        if of_words:
            made['said'] = some_facts(batch['facts'], dice)
            made['keep'] = dice.uniform() >= config.condition_drop
        return made

    def loss(network, batch):
        if of_words:
            words = clip.encode_facts(batch['said'])
            batch = {**batch, 'words': words * batch['keep'][:, None]}
        return rodin.latents_loss(network, batch, config)

    def picture(network):
        """Six portraits whose z are nearest to six that are drawn: of nothing, or of the facts of
        the portraits above them."""
        shown = [i * len(items) // 6 for i in range(6)]
        if of_words:
            words = clip.encode_facts(items.facts[shown].to(device))
            drawn = torch.cat([rodin.draw_latents(network, words=x[None]) for x in words])
        else:
            drawn = rodin.draw_latents(network, 6)
        near = (drawn.cpu() @ items.z[:, 0].T).topk(2).indices.T.tolist()
        rows = [shown, near[0]] if of_words else near
        images = torch.stack([on_white(items.described[i]) for row in rows for i in row])
        return torch.cat(images.to(device).chunk(2), dim=2)

    return batches.Draws(items, args.seed), draw, network, loss, picture
