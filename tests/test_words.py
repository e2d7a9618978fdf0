"""Words: a tiny Stable Diffusion with random weights stands in for the real one, which has the same
classes and the same files."""
import json
import os
import pickle
import re
import shutil
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

os.environ['HF_HUB_OFFLINE'] = '1'  # before diffusers: nothing here asks the network
diffusers = pytest.importorskip('diffusers', reason='needs diffusers')
transformers = pytest.importorskip('transformers', reason='needs transformers')
pytest.importorskip('peft', reason='needs peft')

from safetensors.torch import load_file, save_file  # noqa: E402

import batches  # noqa: E402
import rodinhd as rh  # noqa: E402
import running  # noqa: E402
import sample  # noqa: E402
import scenes  # noqa: E402
import train  # noqa: E402
import watching  # noqa: E402
import words  # noqa: E402

pytestmark = pytest.mark.usefixtures('brief_descent')

PROJECTIONS = 8  # that a LoRA adds to: of two attentions down, in the middle, up, up
NO_PIPELINE = 'nobody/no-such-model'


# What stands in for Stable Diffusion --------------------------------------------------------------
def tiny_tokenizer(folder):
    """A tokenizer of single letters; the last two of its tokens begin and end a text."""
    letters = [chr(code) for code in range(33, 127)]
    at_the_end = [letter + '</w>' for letter in letters]
    tokens = [*letters, *at_the_end, '<|startoftext|>', '<|endoftext|>']
    vocabulary = {token: i for i, token in enumerate(tokens)}
    vocabulary_path = folder.with_name(f'{folder.name}-vocab.json')
    merges_path = folder.with_name(f'{folder.name}-merges.txt')
    vocabulary_path.write_text(json.dumps(vocabulary))
    merges_path.write_text('#version: 0.2\n')
    paths = str(vocabulary_path), str(merges_path)
    return transformers.CLIPTokenizer(*paths, model_max_length=48)


def tiny_text_encoder(tokens):
    return transformers.CLIPTextModel(transformers.CLIPTextConfig(
        vocab_size=tokens,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        projection_dim=16,
        max_position_embeddings=48,
        bos_token_id=tokens - 2,
        eos_token_id=tokens - 1,
        pad_token_id=tokens - 1,
    ))


def tiny_unet(width):
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(width, 32),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
        down_block_types=('CrossAttnDownBlock2D', 'DownBlock2D'),
        up_block_types=('UpBlock2D', 'CrossAttnUpBlock2D'),
    )


def tiny_vae():
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=('DownEncoderBlock2D',) * 2,
        up_block_types=('UpDecoderBlock2D',) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )


def tiny_pipeline(folder, prediction='epsilon', width=16):
    """Saves a StableDiffusionPipeline of 16 x 16 pixels: one layer of text, two small blocks."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer(folder)
    text_encoder = tiny_text_encoder(len(tokenizer))
    unet = tiny_unet(width)
    vae = tiny_vae()
    scheduler = diffusers.PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule='scaled_linear',
        skip_prk_steps=True,
        steps_offset=1,
        prediction_type=prediction,
    )
    pipe = diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        unet=unet,
        scheduler=scheduler,
        tokenizer=tokenizer,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope='module')
def sd(tmp_path_factory):
    return tiny_pipeline(tmp_path_factory.mktemp('sd') / 'tiny')


@pytest.fixture(scope='module')
def portraits(tmp_path_factory):
    """Three images: one with a caption beside it, one with a caption and the trigger phrase in it,
    one with none."""
    folder = tmp_path_factory.mktemp('portraits')
    generator = np.random.default_rng(0)
    for name, alpha in (('a.png', 255), ('b.png', 0), ('c.webp', 255)):
        pixels = generator.integers(256, size=(20, 20, 4), dtype=np.uint8)
        pixels[..., 3] = alpha
        Image.fromarray(pixels).save(folder / name)
    (folder / 'a.txt').write_text('a man\nwith a hat\n')
    (folder / 'b.txt').write_text('a blender synthetic avata of a woman')
    return folder


def command(sd, portraits, runs, *settings):
    """The options of train.py for four steps of a tiny LoRA."""
    options = ['--stage', 'lora', '--sd', sd, '--data', portraits, '--runs', runs]
    options += ['--log-every', 1, '--save-every', 2, '--device', 'cpu']
    options += ['--set', 'lora_rank=2', 'lora_batch=2', 'lora_lr=0.03', 'lora_steps=4', *settings]
    return train.parse([str(option) for option in options])


class Trained(types.SimpleNamespace):
    """Holds `runs`, the folder of a LoRA, and `pipe`, in whose U-Net it was trained."""


@pytest.fixture(scope='module')
def trained(sd, portraits, tmp_path_factory):
    """Four steps through the real command."""
    runs = tmp_path_factory.mktemp('runs')
    pipes = []
    load = words.load_pipeline

    def recorded(*args):
        pipes.append(load(*args))
        return pipes[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(words, 'load_pipeline', recorded)
        train.main(command(sd, portraits, runs))
    return Trained(runs=runs, pipe=pipes[0])


def prepared(sd, portraits, runs):
    """What train.py's loop is told of a LoRA: data, draw, network, loss, picture."""
    settings = words.make_settings(sd)
    return words.prepare_lora(command(sd, portraits, runs), settings, torch.device('cpu'))


def assert_one_line(stopped):
    """What ended the program is one line."""
    assert '\n' not in str(stopped.value)


# Words and portraits ------------------------------------------------------------------------------
def picture(*args, **how):
    return np.asarray(words.portrait_of(*args, steps=2, **how)).astype(int)


def test_the_same_seed_gives_the_same_portrait(sd):
    first = picture('a man', sd, seed=3)
    again = picture('a man', sd, seed=3)
    assert first.shape == (16, 16, 3)
    assert (first == again).all()
    assert (first != picture('a man', sd, seed=4)).mean() > 0.5
    assert (first != picture('a woman with red hair', sd, seed=3)).any()


def test_sampling_begins_with_words(sd, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for kind, (build, _) in running.MODELS.items():
        place = 'fits' if kind == 'decoder' else 'runs'
        weights = build(tiny).state_dict()
        running.write_model(f'{place}/{kind}.pt', kind, tiny, weights, 0)
    options = ['--sd', str(sd), '--frames', '1', '--size', '16', '--steps', '2']
    options += ['--device', 'cpu', '--refine', '3']
    sample.main(sample.parse(['--prompt', 'A man: red beard', *options]))

    folder = tmp_path / 'samples' / 'a-man-red-beard'
    written = {path.name for path in folder.iterdir()}
    assert written > {'prompt.png', 'portrait.png', 'grid.png', 'planes.pt'}
    with Image.open(folder / 'prompt.png') as image:
        drawn = words.portrait_of('A man: red beard', sd)
        assert (np.asarray(image) == np.asarray(drawn)).all()
    with pytest.raises(rh.Stop, match='--lora goes with --prompt'):
        sample.main(sample.parse(['--unconditional', '--lora', 'x.safetensors', *options]))


def test_a_blank_portrait_is_not_passed_on(sd, monkeypatch):
    drawn = types.SimpleNamespace()

    class Pipeline:
        def __call__(self, prompt, generator):
            return drawn

        def set_progress_bar_config(self, desc):
            pass

    def draw(image, unfit):
        drawn.images = [image]
        drawn.nsfw_content_detected = [unfit]
        return words.portrait_of('a man', sd)

    monkeypatch.setattr(words, 'load_pipeline', lambda *args: Pipeline())
    image = Image.linear_gradient('L')
    assert draw(image, unfit=False).tobytes() == image.convert('RGB').tobytes()
    reason = r'the portrait is blank.*safety checker.*another --seed'
    with pytest.raises(rh.Stop, match=reason):
        draw(image, unfit=True)
    with pytest.raises(rh.Stop, match=reason):
        draw(Image.new('RGB', (16, 16)), unfit=False)


def test_names_and_triggers():
    name = words.name_of('A man, 40, with  a "red" beard!')
    assert name == 'a-man-40-with-a-red-beard'
    assert words.name_of('?') == 'prompt'
    assert words.name_of('Ein Mädchen') == 'ein-mädchen'
    assert len(words.name_of('ab ' * 50)) <= 40

    assert words.with_trigger('', 'T') == 'T'
    assert words.with_trigger(' x', 'T') == 'T, x'
    assert words.with_trigger('a t.', 'T') == 'a t.'
    assert re.fullmatch(r'[\w-]+/[\w.-]+', words.SD)
    assert words.TRIGGER == 'Blender Synthetic Avata'


# Training -----------------------------------------------------------------------------------------
def test_the_lora_is_trained_and_stable_diffusion_is_not(trained, sd):
    runs = trained.runs
    names = {'.lock', 'lora.safetensors', 'lora-state.pt', 'lora.jsonl', 'lora-000004.png'}
    assert {path.name for path in runs.iterdir()} == names

    before = diffusers.UNet2DConditionModel.from_pretrained(sd / 'unet').state_dict()
    after = {}
    for name, x in trained.pipe.unet.state_dict().items():
        after[name.replace('.base_layer', '')] = x
    assert all(torch.equal(before[name], after.pop(name)) for name in before)

    # A and B, of two attentions each, of 4 layers
    assert len(after) == 2 * PROJECTIONS * 4
    assert all('lora_' in name for name in after)
    begin_at_zero = [x for name, x in after.items() if 'lora_B' in name]
    assert all(x.abs().max() > 0.01 for x in begin_at_zero)

    state = running.read_checkpoint(runs / 'lora-state.pt', 'lora-state')
    assert len(state['model']) == len(after)
    total = sum(x.numel() for x in state['model'].values())
    assert total == sum(x.numel() for x in after.values())

    # The average is written and shown, and the weights put back
    differs = [not torch.equal(x, state['ema'][name]) for name, x in state['model'].items()]
    assert any(differs)
    lines = (runs / 'lora.jsonl').read_text().splitlines()
    assert [json.loads(line)['step'] for line in lines] == [0, 1, 2, 3]
    assert Image.open(runs / 'lora-000004.png').size == (4 * 16, 2 * 16)


def test_the_lora_that_was_written_changes_the_portrait(trained, sd, capsys):
    prompt = 'Blender Synthetic Avata, a man'
    plain = picture(prompt, sd)
    tuned = picture('a man', sd, lora=trained.runs)
    assert capsys.readouterr().out.splitlines() == [
        f'portrait of: {prompt}, {words.FRAMING}',
        f'portrait of: {prompt}',
    ]
    assert (plain != tuned).mean() > 0.2

    # What is written is the average, by the names of diffusers
    written = load_file(trained.runs / 'lora.safetensors')
    state = running.read_checkpoint(trained.runs / 'lora-state.pt', 'lora-state')
    names = {
        'lora_A/default': 'lora.down',
        'lora_B/default': 'lora.up',
        'weights.': 'unet.',
        '/': '.',
    }
    for name, x in state['ema'].items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        assert torch.equal(written.pop(name), x)
    assert not written

    # The U-Net that was trained draws the same
    with words.Adapter(trained.pipe.unet).holding(state['ema']):
        drawn = trained.pipe(
            prompt,
            negative_prompt=words.NEGATIVE,
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(0),
        )
    assert np.abs(tuned - np.asarray(drawn.images[0])).max() <= 1


class Killed(Exception):
    pass


def test_training_goes_on_to_the_same_weights(trained, sd, portraits, tmp_path, monkeypatch):
    """Four steps at a stretch, and with an interruption in the fourth: the same bits. Other
    settings or captions are refused."""
    update = running.EMA.update

    def killed(self, module):
        if self.updates == 3:
            raise Killed
        update(self, module)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(running.EMA, 'update', killed)
        train.main(command(sd, portraits, tmp_path))
    assert running.read_checkpoint(tmp_path / 'lora-state.pt', 'lora-state')['step'] == 2

    for setting in ('lora_lr=0.1', 'lora_rank=3', 'trigger=Avatar'):
        name = setting.split('=')[0]
        with pytest.raises(rh.Stop, match=rf'other settings \({name}'):
            train.main(command(sd, portraits, tmp_path, setting))
    other = shutil.copytree(portraits, tmp_path / 'other' / portraits.name)
    (other / 'a.txt').write_text('a man without a hat')
    with pytest.raises(rh.Stop, match=r'other settings \(captions\)'):
        train.main(command(sd, other, tmp_path))

    train.main(command(sd, portraits, tmp_path))
    both = trained.runs, tmp_path
    a, b = (running.read_checkpoint(runs / 'lora-state.pt', 'lora-state') for runs in both)
    for part in ('model', 'ema'):
        assert all(torch.equal(a[part][name], b[part][name]) for name in a[part])
    a, b = (load_file(runs / 'lora.safetensors') for runs in both)  # its header's order differs
    assert len(a) == 64
    assert all(torch.equal(a[name], b[name]) for name in a | b)
    name = 'lora-000004.png'
    assert (trained.runs / name).read_bytes() == (tmp_path / name).read_bytes()
    a, b = (watching.lines_of(runs / 'lora.jsonl') for runs in both)
    for line in a + b:
        assert line.pop('seconds') > 0
    assert a == b


@pytest.mark.parametrize('prediction', ['epsilon', 'v_prediction'])
def test_what_training_wants_the_network_to_say(portraits, tmp_path, prediction):
    """A network that knows the noise, or the velocity by its formula, has no loss; latents are VAE
    samples in the pipeline's scale."""
    folder = tiny_pipeline(tmp_path / 'tiny', prediction)
    data, draw, network, loss, _ = prepared(folder, portraits, tmp_path)
    batch = batches.drawn(batches.collate([data[0, 0, 0]]), draw, 'cpu')

    vae = diffusers.AutoencoderKL.from_pretrained(folder / 'vae')
    moments = vae.encode(batch['image']).latent_dist
    latent = moments.mean + moments.var.sqrt() * batch['posterior']
    x_start = vae.config.scaling_factor * latent
    betas = torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000) ** 2
    a = torch.cumprod(1 - betas, 0)[batch['t']]

    def oracle(x_t, t, states):
        expected = a.sqrt() * x_start + (1 - a).sqrt() * batch['noise']
        assert torch.allclose(x_t, expected, atol=1e-5)
        assert states.shape == (1, 48, 16)
        if prediction == 'epsilon':
            return batch['noise']
        return a.sqrt() * batch['noise'] - (1 - a).sqrt() * x_start

    assert loss(oracle, batch)['mse'] < 1e-9
    assert loss(network, batch)['mse'] > 0.1

    learning = [p for p in network.frozen[0].parameters() if p.requires_grad]
    total = sum(p.numel() for p in learning)
    assert sum(p.numel() for p in network.parameters()) == total
    of_width_16 = 8 * (3 * 8 * (16 + 16))  # three of them
    of_width_32 = 8 * (6 * (32 + 32) + 2 * (16 + 32))
    assert total == of_width_16 + of_width_32


def test_all_randomness_follows_from_the_index(sd, portraits, tmp_path):
    data, draw, *_ = prepared(sd, portraits, tmp_path)

    def drawn(*index):
        return batches.drawn(batches.collate([data[index]]), draw, 'cpu')

    item = drawn(0, 0, 0)
    again = drawn(0, 0, 0)
    assert item.keys() == {'image', 'ids', 't', 'posterior', 'noise'}
    assert all(torch.equal(item[name], again[name]) for name in item)
    for other in (drawn(0, 1, 0), drawn(1, 0, 0)):
        assert not torch.equal(item['noise'], other['noise'])

    # A tenth of the captions is dropped
    end = item['ids'][0, -1]
    empty = [bool((drawn(step, 0, 0)['ids'][0, 2:] == end).all()) for step in range(300)]
    assert 0.05 < sum(empty) / 300 < 0.16


# Captions -----------------------------------------------------------------------------------------
def captions_in(folder, trigger):
    return [text for _, text in words.read_captions(folder, trigger)]


def test_captions_of_images(portraits, tmp_path):
    found = words.read_captions(portraits, words.TRIGGER)
    assert [(path.name, text) for path, text in found] == [
        ('a.png', 'Blender Synthetic Avata, a man with a hat'),
        ('b.png', 'a blender synthetic avata of a woman'),
        ('c.webp', 'Blender Synthetic Avata'),
    ]
    item = words.Captioned(found, 16, lambda texts: texts)[1]
    assert item['image'].shape == (3, 16, 16)
    assert (item['image'] == 1).all()  # transparent: white

    # In one file, before those beside the images
    both = shutil.copytree(portraits, tmp_path / 'both')
    (both / 'captions.json').write_text(json.dumps({'a.png': 'one', 'c.webp': 'three'}))
    assert captions_in(both, 'T') == [
        'T, one',
        'T, a blender synthetic avata of a woman',
        'T, three',
    ]


def test_captions_of_avatars(data, tmp_path):
    avatars = shutil.copytree(data, tmp_path / 'avatars')
    (avatars / 'avatar_0001/caption.txt').write_text('a woman')
    found = words.read_captions(avatars, words.TRIGGER)
    assert [(path.parent.parent.name, text) for path, text in found] == [
        ('avatar_0000', 'Blender Synthetic Avata'),
        ('avatar_0001', 'Blender Synthetic Avata, a woman'),
    ]


def test_frames_of_avatars_are_not_turned_by_exif(data, tmp_path):
    """Portraits are, and frames, which poses belong to, are not."""
    avatars = shutil.copytree(data, tmp_path / 'avatars')
    exif = Image.Exif()
    exif[0x0112] = 6

    def image_of(avatar):
        pairs = words.read_captions(avatars, 'T')
        items = words.Captioned(pairs, 64, lambda texts: texts, words.avatars_of(avatars))
        return items[avatar]['image']

    plain = [image_of(0), image_of(1)]
    frame = scenes.portrait_path(avatars / 'avatar_0000')
    own = avatars / 'avatar_0001/portrait.png'
    Image.open(scenes.portrait_path(avatars / 'avatar_0001')).save(own, exif=exif)
    Image.open(frame).save(frame, exif=exif)
    assert torch.equal(image_of(0), plain[0])
    assert torch.equal(image_of(1), plain[1].rot90(-1, (1, 2)))


# What is refused ----------------------------------------------------------------------------------
class Trap:
    """Its pickle makes a folder when it is read."""
    def __reduce__(self):
        return os.mkdir, ('trapped',)


@pytest.fixture
def broken(sd, portraits, tmp_path, monkeypatch):
    """A folder of things that do not work."""
    monkeypatch.chdir(tmp_path)
    for name in ('empty', 'two', 'bad', 'captions', 'other'):
        (tmp_path / name).mkdir()
    for path in (
        'two/a.safetensors',
        'two/b.safetensors',
        'bad.safetensors',
        'bad/model_index.json',
        'captions/captions.json',
    ):
        (tmp_path / path).write_text('[1]')
    for path in ('lora.bin', 'pickle.safetensors'):
        (tmp_path / path).write_bytes(pickle.dumps(Trap()))
    shutil.copy(portraits / 'a.png', tmp_path / 'captions')

    save_file({'something': torch.zeros(2)}, tmp_path / 'else.safetensors')
    of_flux = {f'transformer.x.lora_{x}.weight': torch.zeros(2, 2) for x in 'AB'}
    save_file(of_flux, tmp_path / 'flux.safetensors')

    shutil.copytree(sd, tmp_path / 'binary')
    weights = tmp_path / 'binary/unet/diffusion_pytorch_model.safetensors'
    torch.save(load_file(weights), weights.with_suffix('.bin'))
    weights.unlink()
    return tmp_path


@pytest.mark.parametrize(
    ('model', 'lora', 'message'),
    [
        (
            NO_PIPELINE,
            None,
            'no-such-model: no such folder, not in the cache, and cannot be downloaded .* --sd',
        ),
        ('empty', None, 'empty: not a pipeline of diffusers .*model_index.json'),
        ('bad', None, 'bad: not a pipeline of diffusers'),
        ('binary', None, 'binary: not a pipeline of diffusers in .safetensors files'),
        (
            'tiny',
            'nothing.safetensors',
            'nothing.safetensors: there is no such LoRA; make it with',
        ),
        ('tiny', 'empty', 'empty: give --lora one .safetensors file'),
        ('tiny', 'two', 'two: give --lora one .safetensors file, or a folder with one'),
        (
            'tiny',
            'lora.bin',
            'lora.bin: give --lora one .safetensors file.* can run code',
        ),
        (
            'tiny',
            'pickle.safetensors',
            'pickle.safetensors: not a readable .safetensors file',
        ),
        ('tiny', 'bad.safetensors', 'not a readable .safetensors file'),
        ('tiny', 'else.safetensors', 'else.safetensors: this LoRA does not fit'),
        (
            'tiny',
            'flux.safetensors',
            'flux.safetensors: this LoRA does not fit .*none of its weights has a place there',
        ),
    ],
)
def test_what_cannot_be_read_ends_in_one_line(broken, sd, model, lora, message):
    with pytest.raises(rh.Stop, match=message) as stopped:
        words.portrait_of('a man', sd if model == 'tiny' else model, lora, steps=1)
    assert_one_line(stopped)
    assert not (broken / 'trapped').exists()  # nothing ran code


def test_a_lora_of_another_network_is_refused(trained, tmp_path):
    wide = tiny_pipeline(tmp_path / 'wide', width=32)
    lora = trained.runs / 'lora.safetensors'
    with pytest.raises(rh.Stop, match=r'lora.safetensors: this LoRA does not fit .*wide'):
        words.portrait_of('a man', wide, lora, steps=1)


@pytest.mark.parametrize('name', ['diffusers', 'transformers', 'peft'])
def test_missing_packages_are_named(sd, portraits, tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    advice = f'^words need the {name} package: pip install diffusers transformers peft$'
    with pytest.raises(rh.Stop, match=advice):
        words.portrait_of('a man', sd)
    with pytest.raises(rh.Stop, match=advice):
        train.main(command(sd, portraits, tmp_path))


@pytest.mark.parametrize(
    ('model', 'data', 'setting', 'message'),
    [
        ('tiny', 'nothing', 'ema=0', 'nothing: holds neither images nor avatars'),
        ('tiny', 'empty', 'ema=0', 'empty: holds neither images'),
        ('tiny', 'captions', 'ema=0', 'captions.json: not readable as captions'),
        (NO_PIPELINE, 'portraits', 'ema=0', 'cannot be downloaded'),
        ('tiny', 'portraits', 'lora_rank=0', 'lora_rank takes a positive int'),
        (
            'tiny',
            'portraits',
            'base_lr=1',
            'no such setting of --stage lora; there are .*lora_lr',
        ),
        ('tiny', 'portraits', 'lora_size=17', 'must divide by 2'),
    ],
)
def test_training_ends_in_one_line_where_something_is_missing(
    sd, broken, portraits, model, data, setting, message
):
    model = sd if model == 'tiny' else model
    data = portraits if data == 'portraits' else data
    with pytest.raises(rh.Stop, match=message) as stopped:
        train.main(command(model, data, 'runs', setting))
    assert_one_line(stopped)
