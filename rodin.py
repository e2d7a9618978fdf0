"""What Rodin (Wang et al., CVPR 2023) has and RodinHD has dropped: latents, their prior, words.

    z        a vector of a portrait, by CLIP (section 3.4), conditions the base network by AdaGN
    Prior    draws z of nothing: unconditional avatars (section 3.4)
    Text     draws z of words: avatars from sentences (section 3.4)
    edits    z moves by the difference of two sentences (section 3.4)

`Clip` is a small one of our own, which knows the words of captions.py; `PublishedClip` has the same
methods and published weights. The core (rodinhd.py) is given a vector and does not know of what.
Letters as there, and: D the width of z, F the number of facts.
"""
import math
import random

import torch
import torch.nn as nn
import torch.nn.functional as F

import captions
import likeness
import paint
import rodinhd as rh

SIDE = 64  # pixels a side that our CLIP sees of a portrait
STEPS = 50  # of sampling z, which costs nothing beside planes


# CLIP ---------------------------------------------------------------------------------------------
def on_sphere(x):
    """Vectors (B, D) with their length set to sqrt(D), so that their values have unit variance."""
    return F.normalize(x.float(), dim=1) * x.shape[1] ** 0.5


def halving(c_in, c_out):
    """Layers of the image tower that halve an image's sides."""
    return nn.Sequential(
        nn.Conv2d(c_in, c_out, 3, stride=2, padding=1),
        nn.GroupNorm(8, c_out),
        nn.SiLU(),
    )


class Clip(nn.Module):
    """A small CLIP (Radford et al. 2021): portraits and facts as vectors of one space.

    The image tower is a few convolutions of a portrait of 64 x 64 pixels. A sentence is a set of
    facts (captions.py), whose embeddings are summed; those that training never saw stay zero.
    """
    side = SIDE  # of the images that it looks at

    def __init__(self, config):
        super().__init__()
        self.config = config
        c = config.clip_width
        if c % 8:
            raise ValueError(f'clip_width {c} is no multiple of 8 groups')
        D = config.latent_width
        if D < 1:
            raise ValueError('latent_width is 0, the width of what CLIP gives; give 96')
        self.images = nn.Sequential(
            halving(3, c),                                      # 32 x 32
            halving(c, 2 * c),                                  # 16 x 16
            halving(2 * c, 4 * c),                              # 8 x 8
            halving(4 * c, 4 * c),                              # 4 x 4
            nn.Flatten(),
            nn.Linear(4 * c * 16, D),
        )
        self.facts = nn.Parameter(torch.zeros(len(captions.FACTS), 128))
        self.words = nn.Sequential(
            nn.Linear(128, 256), nn.SiLU(), nn.Linear(256, 128), nn.SiLU(), nn.Linear(128, D)
        )
        self.log_scale = nn.Parameter(torch.tensor(math.log(10)))

    def encode_images(self, images):
        """Portraits (B, 3, P, P) in [-1, 1], on white, as z (B, D)."""
        return on_sphere(self.images(F.adaptive_avg_pool2d(images.float(), SIDE)))

    def encode_facts(self, rows):
        """Facts as rows (B, F) of zeros and ones, as z (B, D)."""
        return on_sphere(self.words(rows.to(self.facts) @ self.facts))

    def encode_texts(self, texts):
        """Sentences as z (B, D)."""
        rows = [captions.as_vector(captions.understand(text).facts) for text in texts]
        return self.encode_facts(torch.stack(rows))

    @property
    def device(self):
        return self.facts.device

    @property
    def scale(self):
        """Of the logits that CLIP was trained with."""
        return self.log_scale.exp().clamp(max=100)

    def knows(self, fact):
        """Whether training has seen a fact, a pair of factor and value."""
        return bool(self.facts[captions.NUMBERS[fact]].any())

    def forward(self, images, others, rows):
        """z of portraits, of the same portraits seen otherwise, and of facts; and the scale of
        logits."""
        both = self.encode_images(torch.cat([images, others])).chunk(2)
        return *both, self.encode_facts(rows), self.scale


def clip_encoder(config):
    """Our own CLIP of a Config, whose weights are in <runs>/clip.pt."""
    return Clip(config)


def agreement(logits, matches):
    """The cross-entropy of rows of logits (A, B) with what they match (A, B), evenly; rows that
    match nothing do not count."""
    share = matches / matches.sum(1, keepdim=True).clamp(min=1)
    return -(share * logits.log_softmax(1)).sum(1).mean()


def clip_loss(network, batch):
    """Contrastive losses, of images and words and of two pictures of the same avatar.

    A sentence matches all portraits of the batch of which it is true: facts are few, and short
    sentences are true of many. The second term, of which CLIP has none, keeps apart avatars that
    have the same facts, so that z tells who it is.
    """
    z, other, words, scale = network(batch['image'], batch['other'], batch['said'])
    D = z.shape[1]
    said, facts = batch['said'], batch['facts']
    true = (said @ facts.T == said.sum(1, keepdim=True)).float()  # (sentences, images)
    logits = scale * words @ z.T / D
    same = torch.eye(len(z), device=z.device)
    pairs = scale * z @ other.T / D
    return {
        'words': agreement(logits, true) / 2,
        'images': agreement(logits.T, true.T) / 2,
        'pairs': (agreement(pairs, same) + agreement(pairs.T, same)) / 4,
    }


# Diffusion of z -----------------------------------------------------------------------------------
class Vectors(rh.Diffusion):
    """The diffusion of z, linear and predicting z itself; x is (B, 1, D, 1, 1), so that all of
    rh.Diffusion works on it."""
    def __init__(self, config):
        super().__init__('linear', config.prior_timesteps, 'x_start')

    def limited(self, x_start):
        """z on its sphere, where all training vectors are."""
        return as_planes(on_sphere(x_start.flatten(1)))


def as_planes(z):
    """z (B, D) in the form that rh.Diffusion takes."""
    return z[:, None, :, None, None]


class Prior(nn.Module):
    """The denoiser of z: an MLP with residual layers, which all see t and, with `words`, a
    sentence's z."""
    def __init__(self, config, words=False):
        super().__init__()
        self.config = config
        D = config.latent_width
        width = config.prior_width
        if D < 1:
            raise ValueError('latent_width is 0: there is no z')
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.words = nn.Linear(D, width) if words else None
        self.first = nn.Linear(D, width)
        self.layers = nn.ModuleList()
        for _ in range(config.prior_layers):
            self.layers.append(nn.Sequential(
                nn.LayerNorm(width), nn.SiLU(), rh.zero(nn.Linear(width, width))
            ))
        self.last = nn.Linear(width, D)

    def forward(self, x, t, condition=None):
        """x (B, 1, D, 1, 1), t (B,) in [0, 1000], the sentence's z (B, D), zero for none."""
        emb = self.time(rh.timestep_embedding(t, self.config.prior_width))
        if self.words is not None:
            emb = emb + self.words(condition)
        h = self.first(x.flatten(1))
        for layer in self.layers:
            h = h + layer(h + emb)
        return as_planes(self.last(F.silu(h)))


def prior_network(config):
    """The network that makes z of noise (Rodin's latent prior)."""
    return Prior(config)


def text_network(config):
    """The network that makes z of noise and a sentence's z."""
    return Prior(config, words=True)


def latents_loss(network, batch, config):
    """The loss of the denoiser, at batch['t'], of vectors batch['z'] (B, D), and of the sentences'
    batch['words'] (B, D) where there are some."""
    diffusion = Vectors(config)
    z = as_planes(batch['z'])
    terms, _ = diffusion.loss(
        network, z, batch['t'], as_planes(batch['noise']), batch.get('words')
    )
    return terms


def draw_latents(network, count=1, words=None, guidance=1.0, seed=0, steps=STEPS):
    """Draws z (count, D); number i has the noise of seed + i.

    network: of stage `prior`, or of `text` with the z (1, D) of a sentence as `words`, which
    guidance above 1 makes weigh more.
    """
    D = network.config.latent_width
    device = next(network.parameters()).device
    generators = [torch.Generator().manual_seed(seed + i) for i in range(count)]

    def draw():
        noise = [torch.randn(1, D, 1, 1, generator=g) for g in generators]
        return torch.stack(noise).to(device)

    condition = null = None
    if words is not None:
        condition = words.expand(count, D)
        null = torch.zeros_like(condition)
    diffusion = Vectors(network.config)
    steps = min(steps, diffusion.timesteps)
    return diffusion.sample(network, draw, condition, null, guidance, steps).flatten(1)


# Facts that CLIP sees -----------------------------------------------------------------------------
def odds_of(clip, z, factor):
    """What CLIP takes vectors (B, D) for: {value of a factor: log probability (B,)}, among the
    values that it knows."""
    known = [value for value in captions.VOCABULARY[factor] if clip.knows((factor, value))]
    rows = torch.stack([captions.as_vector({factor: value}) for value in known])
    logits = clip.scale * z @ clip.encode_facts(rows).T / z.shape[1]
    return dict(zip(known, logits.log_softmax(1).T))


def factors_known(clip):
    """The factors of which CLIP knows two values or more."""
    found = []
    for factor, values in captions.VOCABULARY.items():
        if sum(clip.knows((factor, value)) for value in values) > 1:
            found.append(factor)
    return found


def facts_seen(clip, z):
    """What CLIP takes a portrait's z (D,) for: of each factor that it knows the likeliest value."""
    facts = {}
    for factor in factors_known(clip):
        odds = odds_of(clip, z[None], factor)
        facts[factor] = max(odds, key=odds.get)
    if facts.get('length') == 'bald':
        facts.pop('hair', None)
    return facts


# Words --------------------------------------------------------------------------------------------
CANDIDATES = 64  # vectors that are drawn of a sentence, of which
FINALISTS = 8  # become avatars, of which one is taken


def vectors_of(models, facts, count=1, guidance=1.5, seed=0):
    """z (count, D) of facts, by the networks `clip` and `text`.

    Of 64 draws each is the one in which CLIP sees these facts most surely, as DALL-E 2 picks of
    two; or, as what a vector says need not come out, of the 8 surest the one in whose avatar CLIP
    does.
    """
    clip = models['clip']
    words = clip.encode_facts(captions.as_vector(facts)[None])
    found = []
    for i in range(count):
        z = draw_latents(models['text'], CANDIDATES, words, guidance, (seed + i) * CANDIDATES)
        z = z[how_sure(clip, z, facts).topk(FINALISTS).indices]
        fronts = fronts_of(models, z, seed + i)
        found.append(z[how_sure(clip, clip.encode_images(fronts), facts).argmax()])
    return torch.stack(found)


def how_sure(clip, z, facts):
    """How surely CLIP sees facts in each of z (B, D), logarithms (B,). Whose hair has a colour is
    not bald."""
    words = clip.encode_facts(captions.as_vector(facts)[None])
    sure = z @ words[0] / z.shape[1]
    for factor in factors_known(clip):
        if factor in facts:
            sure = sure + odds_of(clip, z, factor).get(facts[factor], 0)
    if 'hair' in facts and 'length' not in facts:
        bald = odds_of(clip, z, 'length').get('bald', torch.tensor(-math.inf))
        sure = sure + torch.log1p(-bald.exp())
    return sure


def fronts_of(models, vectors, seed=0):
    """The fronts (B, 3, S, S) in [-1, 1] of avatars of vectors (B, D), by the base network alone,
    as small as our CLIP sees them."""
    nobody = rh.nobody(models['base'].config, len(vectors), vectors)
    made = rh.generate(models, nobody, seed=seed, quick=True).planes
    views = [likeness.front_view(planes, models['decoder'], SIDE).view for planes in made]
    return torch.stack(views) * 2 - 1


def known(facts, clip):
    """Those of facts {factor: value} that a CLIP's training data showed."""
    return {factor: value for factor, value in facts.items() if clip.knows((factor, value))}


def planes_of(models, sentence, seed=0):
    """Planes (1, 3, C, R, R) of the facts of a sentence that CLIP knows; ends in one line where it
    has none."""
    clip = models['clip']
    facts = known(captions.understand(sentence).facts, clip)
    if not facts:
        rh.stop('give a photograph, or words of sex, hair, skin, clothes or expression')
    vector = vectors_of(models, paint.before_painting(facts), seed=seed)
    made = rh.generate(models, rh.nobody(models['base'].config, 1, vector), seed=seed).planes
    return paint.recoloured_all(made, models, facts)


# Edits --------------------------------------------------------------------------------------------
def with_facts(facts, changes):
    """Facts after changes to them: who becomes bald has no colour of hair, and new clothes have
    no shade but their own."""
    changed = facts | changes
    if changes.get('length') == 'bald':
        changed.pop('hair', None)
    if 'clothes' in changes and 'shade' not in changes:
        changed.pop('shade', None)
    return changed


def with_needed(facts, changes):
    """Changes to facts, with what they take for granted: hair that gets a colour grows first, on
    who is bald."""
    if 'hair' in changes and 'length' not in changes and facts.get('length') == 'bald':
        return changes | {'length': 'short'}
    return changes


def edited(clip, z, changes, strength=1.0):
    """z (D,) moved by what changes (facts) mean: z + strength (E(target) - E(source)).

    The source is what CLIP sees in z, in place of Rodin's "a photo of a person", so that what is
    not named cancels.
    """
    source = facts_seen(clip, z)
    target = with_facts(source, changes)
    rows = torch.stack([captions.as_vector(facts) for facts in (source, target)])
    before, after = clip.encode_facts(rows)
    return on_sphere((z + strength * (after - before))[None])[0]


# z between head and clothes, where portraits are framed as those of weights/ (docs/data.md)
NECK = 0.05
SOFT = 0.1  # over which a region fades out, on both sides
HEAD = 0.5  # x and y that a head, with its hair, reaches
WORN = ('clothes', 'shade', 'outfit', 'pattern')
EVERYWHERE = ('sex', 'group')


def region_of(changes, R):
    """Where changes (facts) may change an avatar: weights (3, 1, R, R) in 0..1 of its planes.

    Clothes are below the neck, all else is above it, but long hair, which may fall to the chest;
    sex and group are everywhere. The xy plane knows no height: there the rest of the body counts
    for clothes, and the head's own place for a third.
    """
    if any(factor in EVERYWHERE for factor in changes):
        return torch.ones(3, 1, R, R)
    axis = torch.linspace(-1, 1, R)

    def ramp(x):  # 0 below, 1 above
        return (x / (2 * SOFT) + 0.5).clamp(0, 1)

    inner = ramp(HEAD - axis.abs())
    around_head = inner[:, None] * inner                                    # of (y, x) or (z, x)
    worn = torch.zeros(3, R, R)
    head = torch.zeros(3, R, R)
    if any(factor in WORN for factor in changes):
        worn[0] = 1 - around_head * 2 / 3
        worn[1:] = ramp(NECK - axis)[:, None]
    if any(factor not in WORN for factor in changes):
        falls = 0.5 if {'hair', 'length'} & changes.keys() else 0
        head[0] = around_head
        head[1:] = ramp(axis - NECK + falls)[:, None] * inner
    return torch.maximum(worn, head)[:, None]


# Published CLIP -----------------------------------------------------------------------------------
class PublishedClip(nn.Module):
    """Published weights of CLIP, such as ViT-B/32, with the methods of Clip.

    model, tokenizer: a CLIPModel and a CLIPTokenizer of transformers.
    """
    MEAN = (0.48145466, 0.4578275, 0.40821073)  # of the pixels that it was trained on
    STD = (0.26862954, 0.26130258, 0.27577711)

    def __init__(self, model, tokenizer):
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.side = model.config.vision_config.image_size
        self.config = rh.Config(latent_width=model.config.projection_dim)

    @property
    def device(self):
        return self.model.logit_scale.device

    @property
    def scale(self):
        """Of the logits that CLIP was trained with."""
        return self.model.logit_scale.exp()

    def encode_images(self, images):
        """Portraits (B, 3, P, P) in [-1, 1], on white, as z (B, D)."""
        size = (self.side, self.side)
        images = F.interpolate(images.float(), size, mode='bicubic', antialias=True).clamp(-1, 1)
        mean, std = (images.new_tensor(x).view(3, 1, 1) for x in (self.MEAN, self.STD))
        pixels = ((images + 1) / 2 - mean) / std
        pooled = self.model.vision_model(pixel_values=pixels).pooler_output
        return on_sphere(self.model.visual_projection(pooled))

    def encode_texts(self, texts):
        """Sentences as z (B, D); they are cut to the 77 tokens that CLIP reads."""
        most = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=most, return_tensors='pt'
        ).to(self.device)
        pooled = self.model.text_model(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask
        ).pooler_output
        return on_sphere(self.model.text_projection(pooled))

    def encode_facts(self, rows):
        """Facts as rows (B, F) of zeros and ones, as z (B, D) of sentences that say them."""
        sentences = []
        for row in rows:
            facts = dict(captions.FACTS[i] for i in row.nonzero()[:, 0].tolist())
            sentences.append(captions.caption(facts, random.Random(0)))
        return self.encode_texts(sentences)

    def knows(self, fact):
        """It may know any."""
        return True


def load_published(source):
    """A PublishedClip, frozen: of a folder in the form of transformers, or by its name on the hub;
    stops where it cannot be had, or lacks a weight."""
    try:
        import transformers
    except ImportError:
        rh.stop('published CLIP needs the transformers package: pip install transformers')
    transformers.utils.logging.set_verbosity_error()
    try:
        model, info = transformers.CLIPModel.from_pretrained(
            str(source), use_safetensors=True, output_loading_info=True
        )
        tokenizer = transformers.CLIPTokenizer.from_pretrained(str(source))
    except Exception as error:  # missing, damaged, or refused: many types
        lines = str(error).strip().splitlines() or [type(error).__name__]
        rh.stop(
            f'{source}: no CLIP of transformers in .safetensors files, with config.json and a '
            f'tokenizer ({lines[0][:120]})'
        )
    for name in ('missing_keys', 'unexpected_keys', 'mismatched_keys'):
        if info.get(name):
            rh.stop(f'{source}: not the weights of this CLIP: {name} {sorted(info[name])[:3]}')
    return PublishedClip(model, tokenizer).requires_grad_(False).eval()
