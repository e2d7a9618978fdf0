"""Words: a tiny Stable Diffusion with random weights stands in for the real one, which has the same classes and the same files."""
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

os.environ['HF_HUB_OFFLINE'] = '1'      # before diffusers: nothing here asks the network
diffusers, transformers = (pytest.importorskip(name, reason=f'needs {name}') for name in ('diffusers', 'transformers'))
pytest.importorskip('peft', reason='needs peft')

from safetensors.torch import load_file, save_file  # noqa: E402

import rodinhd as rh  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
import words  # noqa: E402


def tiny_pipeline(folder, prediction='epsilon', width=16):
    """A StableDiffusionPipeline of 16 x 16 pixels, saved: a tokenizer of single letters, one layer of text, two small blocks."""
    letters = [chr(c) for c in range(33, 127)]
    vocabulary = {w: i for i, w in enumerate([*letters, *(x + '</w>' for x in letters), '<|startoftext|>', '<|endoftext|>'])}
    files = folder.with_name(f'{folder.name}-vocab.json'), folder.with_name(f'{folder.name}-merges.txt')
    files[0].write_text(json.dumps(vocabulary))
    files[1].write_text('#version: 0.2\n')
    end = len(vocabulary) - 1
    torch.manual_seed(0)
    text = transformers.CLIPTextConfig(
        vocab_size=end + 1, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, projection_dim=16,
        max_position_embeddings=48, bos_token_id=end - 1, eos_token_id=end, pad_token_id=end)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(width, 32), layers_per_block=1, cross_attention_dim=16, attention_head_dim=2, norm_num_groups=4,
        down_block_types=('CrossAttnDownBlock2D', 'DownBlock2D'), up_block_types=('UpBlock2D', 'CrossAttnUpBlock2D'))
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=('DownEncoderBlock2D',) * 2, up_block_types=('UpDecoderBlock2D',) * 2,
        latent_channels=4, norm_num_groups=4, sample_size=16)
    scheduler = diffusers.PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule='scaled_linear', skip_prk_steps=True,
                                        steps_offset=1, prediction_type=prediction)
    pipe = diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=transformers.CLIPTextModel(text), unet=unet, scheduler=scheduler, safety_checker=None, feature_extractor=None,
        tokenizer=transformers.CLIPTokenizer(*map(str, files), model_max_length=48), requires_safety_checker=False)
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope='module')
def sd(tmp_path_factory):
    return tiny_pipeline(tmp_path_factory.mktemp('sd') / 'tiny')


@pytest.fixture(scope='module')
def portraits(tmp_path_factory):
    """Three images: one with a caption beside it, one with a caption and the trigger phrase in it, one with none."""
    folder, generator = tmp_path_factory.mktemp('portraits'), np.random.default_rng(0)
    for name, alpha in (('a.png', 255), ('b.png', 0), ('c.webp', 255)):
        pixels = generator.integers(256, size=(20, 20, 4), dtype=np.uint8)
        pixels[..., 3] = alpha
        Image.fromarray(pixels).save(folder / name)
    (folder / 'a.txt').write_text('a man\nwith a hat\n')
    (folder / 'b.txt').write_text('a blender synthetic avata of a woman')
    return folder


def command(sd, portraits, runs, *settings):
    return train.parse([str(x) for x in (
        '--stage', 'lora', '--sd', sd, '--data', portraits, '--runs', runs, '--log-every', 1, '--save-every', 2, '--device', 'cpu',
        '--set', 'lora_rank=2', 'lora_batch=2', 'lora_lr=0.03', 'lora_steps=4', *settings)])


@pytest.fixture(scope='module')
def trained(sd, portraits, tmp_path_factory):
    """Four steps through the real command: its folder, and the pipeline in whose U-Net the LoRA was trained."""
    runs, pipes = tmp_path_factory.mktemp('runs'), []

    def load(*args, original=words.load_pipeline):
        pipes.append(original(*args))
        return pipes[-1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(words, 'load_pipeline', load)
        train.main(command(sd, portraits, runs))
    return runs, pipes[0]


def picture(*args, **how):
    return np.asarray(words.portrait_of(*args, steps=2, **how)).astype(int)


def test_the_same_seed_gives_the_same_portrait(sd):
    first, again = picture('a man', sd, seed=3), picture('a man', sd, seed=3)
    assert first.shape == (16, 16, 3) and (first == again).all()
    assert (first != picture('a man', sd, seed=4)).mean() > 0.5 and (first != picture('a woman with red hair', sd, seed=3)).any()


def test_sampling_begins_with_words(sd, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for kind, folder in (('decoder', 'fits'), ('vae', 'runs'), ('base', 'runs'), ('upsample', 'runs')):
        rh.write_model(f'{folder}/{kind}.pt', kind, tiny, rh.MODELS[kind][0](tiny).state_dict(), 0)
    command = ['--sd', str(sd), '--frames', '1', '--size', '16', '--steps', '2', '--device', 'cpu']
    sample.main(sample.parse(['--prompt', 'A man: red beard', *command]))
    assert {p.name for p in (tmp_path / 'samples/a-man-red-beard').iterdir()} > {'prompt.png', 'portrait.png', 'grid.png', 'planes.pt'}
    with Image.open('samples/a-man-red-beard/prompt.png') as image:
        assert (np.asarray(image) == np.asarray(words.portrait_of('A man: red beard', sd))).all()
    with pytest.raises(SystemExit, match='--lora goes with --prompt'):
        sample.main(sample.parse(['--unconditional', '--lora', 'x.safetensors', *command]))


def test_the_lora_is_trained_and_stable_diffusion_is_not(trained, sd):
    runs, pipe = trained
    assert {p.name for p in runs.iterdir()} == {'.lock', 'lora.safetensors', 'lora-state.pt', 'lora.jsonl', 'lora.png'}
    before = diffusers.UNet2DConditionModel.from_pretrained(sd / 'unet').state_dict()
    after = {k.replace('.base_layer', ''): v for k, v in pipe.unet.state_dict().items()}
    assert all(torch.equal(before[k], after.pop(k)) for k in before)
    assert len(after) == 2 * 8 * 4 and all('lora_' in k for k in after)   # A and B of 8 projections: down, middle, up, up
    assert all(v.abs().max() > 0.01 for k, v in after.items() if 'lora_B' in k)  # B begins at zero
    state = rh.read_checkpoint(runs / 'lora-state.pt', 'lora-state')
    assert len(state['model']) == len(after) and sum(v.numel() for v in state['model'].values()) == sum(v.numel() for v in after.values())
    assert any(not torch.equal(state['model'][k], state['ema'][k]) for k in state['model'])       # which is written, shown and put back
    assert [json.loads(line)['step'] for line in (runs / 'lora.jsonl').read_text().splitlines()] == [0, 1, 2, 3]
    assert Image.open(runs / 'lora.png').size == (4 * 16, 2 * 16)


def test_the_lora_that_was_written_changes_the_portrait(trained, sd, capsys):
    runs, pipe = trained
    plain, tuned = picture('Blender Synthetic Avata, a man', sd), picture('a man', sd, lora=runs)
    assert capsys.readouterr().out.splitlines() == [f'portrait of: Blender Synthetic Avata, a man, {words.FRAMING}',
                                                    'portrait of: Blender Synthetic Avata, a man']
    assert (plain != tuned).mean() > 0.2
    written, ema = load_file(runs / 'lora.safetensors'), rh.read_checkpoint(runs / 'lora-state.pt', 'lora-state')['ema']
    names = {'lora_A/default': 'lora.down', 'lora_B/default': 'lora.up', 'weights.': 'unet.', '/': '.'}
    for key, value in ema.items():
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        assert torch.equal(written.pop(key), value)
    assert not written
    with words.Adapter(pipe.unet).holding(ema):                         # the U-Net that was trained
        ours = pipe('Blender Synthetic Avata, a man', negative_prompt=words.NEGATIVE, num_inference_steps=2,
                    generator=torch.Generator().manual_seed(0)).images[0]
    assert np.abs(tuned - np.asarray(ours)).max() <= 1


def test_training_goes_on_to_the_same_weights(trained, sd, portraits, tmp_path, monkeypatch):
    """Four steps at a stretch, and with an interruption in the fourth: the same bits. Other settings or captions are refused."""
    class Killed(Exception):
        pass

    def update(self, module, original=train.EMA.update):
        if self.updates == 3:
            raise Killed
        original(self, module)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train.EMA, 'update', update)
        train.main(command(sd, portraits, tmp_path))
    assert rh.read_checkpoint(tmp_path / 'lora-state.pt', 'lora-state')['step'] == 2
    for setting in ('lora_lr=0.1', 'lora_rank=3', 'trigger=Avatar'):
        with pytest.raises(SystemExit, match=r'other settings \(' + setting.split('=')[0]):
            train.main(command(sd, portraits, tmp_path, setting))
    other = shutil.copytree(portraits, tmp_path / 'other' / portraits.name)
    (other / 'a.txt').write_text('a man without a hat')
    with pytest.raises(SystemExit, match=r'other settings \(captions\)'):
        train.main(command(sd, other, tmp_path))
    train.main(command(sd, portraits, tmp_path))
    a, b = (rh.read_checkpoint(runs / 'lora-state.pt', 'lora-state') for runs in (trained[0], tmp_path))
    assert all(torch.equal(a[part][k], b[part][k]) for part in ('model', 'ema') for k in a[part])
    a, b = (load_file(runs / 'lora.safetensors') for runs in (trained[0], tmp_path))                # its header's order differs
    assert len(a) == 64 and all(torch.equal(a[k], b[k]) for k in a | b)
    for name in ('lora.jsonl', 'lora.png'):
        assert (trained[0] / name).read_bytes() == (tmp_path / name).read_bytes(), name


@pytest.mark.parametrize('prediction', ['epsilon', 'v_prediction'])
def test_what_training_wants_the_network_to_say(portraits, tmp_path, prediction):
    """A network that knows the noise, or the velocity by its formula, has no loss; latents are VAE samples in the pipeline's scale."""
    folder = tiny_pipeline(tmp_path / 'tiny', prediction)
    data, network, loss, _ = words.prepare_lora(command(folder, portraits, tmp_path), words.make_settings(folder), torch.device('cpu'), 1)
    sample, vae = data[0, 0, 0], diffusers.AutoencoderKL.from_pretrained(folder / 'vae')
    batch = {k: v[None] for k, v in sample.items()}
    moments = vae.encode(batch['image']).latent_dist
    x_start = vae.config.scaling_factor * (moments.mean + moments.var.sqrt() * batch['posterior'])
    a = torch.cumprod(1 - torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000) ** 2, 0)[batch['t']]

    def oracle(x_t, t, states):
        assert torch.allclose(x_t, a.sqrt() * x_start + (1 - a).sqrt() * batch['noise'], atol=1e-5) and states.shape == (1, 48, 16)
        return batch['noise'] if prediction == 'epsilon' else a.sqrt() * batch['noise'] - (1 - a).sqrt() * x_start
    assert loss(oracle, batch)['mse'] < 1e-9 and loss(network, batch)['mse'] > 0.1
    trained = [p for p in network.frozen[0].parameters() if p.requires_grad]
    assert sum(p.numel() for p in network.parameters()) == sum(p.numel() for p in trained)
    assert sum(p.numel() for p in trained) == 8 * (3 * 8 * (16 + 16) + 6 * (32 + 32) + 2 * (16 + 32))    # three of width 16, one of 32


def test_all_randomness_follows_from_the_index(sd, portraits, tmp_path):
    data, *_ = words.prepare_lora(command(sd, portraits, tmp_path), words.make_settings(sd), torch.device('cpu'), 1)
    sample, again = data[0, 0, 0], data[0, 0, 0]
    assert sample.keys() == {'image', 'ids', 't', 'posterior', 'noise'} and all(torch.equal(sample[k], again[k]) for k in sample)
    assert not torch.equal(sample['noise'], data[0, 1, 0]['noise']) and not torch.equal(sample['noise'], data[1, 0, 0]['noise'])
    empty = sum((data[step, 0, 0]['ids'][2:] == sample['ids'][-1]).all().item() for step in range(300)) / 300
    assert 0.05 < empty < 0.16                                          # a tenth of the captions is dropped


def test_captions(portraits, data, tmp_path):
    assert [(p.name, text) for p, text in words.read_captions(portraits, words.TRIGGER)] == [
        ('a.png', 'Blender Synthetic Avata, a man with a hat'), ('b.png', 'a blender synthetic avata of a woman'),
        ('c.webp', 'Blender Synthetic Avata')]
    item = words.Captioned(words.read_captions(portraits, words.TRIGGER), 16, lambda texts: texts)[1]
    assert item['image'].shape == (3, 16, 16) and (item['image'] == 1).all()      # transparent: white
    both = tmp_path / 'both'
    both.mkdir()
    for path in portraits.iterdir():
        (both / path.name).write_bytes(path.read_bytes())
    (both / 'captions.json').write_text(json.dumps({'a.png': 'one', 'c.webp': 'three'}))
    assert [text for _, text in words.read_captions(both, 'T')] == ['T, one', 'T, a blender synthetic avata of a woman', 'T, three']
    avatars = tmp_path / 'avatars'
    shutil.copytree(data, avatars)
    (avatars / 'avatar_0001/caption.txt').write_text('a woman')
    assert [(p.parent.parent.name, text) for p, text in words.read_captions(avatars, words.TRIGGER)] == [
        ('avatar_0000', 'Blender Synthetic Avata'), ('avatar_0001', 'Blender Synthetic Avata, a woman')]


class Trap:
    def __reduce__(self):
        return os.mkdir, ('trapped',)


@pytest.fixture
def broken(sd, portraits, tmp_path, monkeypatch):
    """A folder of things that do not work."""
    monkeypatch.chdir(tmp_path)
    for name in ('empty', 'two', 'bad', 'captions', 'other'):
        (tmp_path / name).mkdir()
    for path in ('two/a.safetensors', 'two/b.safetensors', 'bad.safetensors', 'bad/model_index.json', 'captions/captions.json'):
        (tmp_path / path).write_text('[1]')
    for path in ('lora.bin', 'pickle.safetensors'):
        (tmp_path / path).write_bytes(pickle.dumps(Trap()))
    (tmp_path / 'captions/a.png').write_bytes((portraits / 'a.png').read_bytes())
    save_file({'something': torch.zeros(2)}, tmp_path / 'else.safetensors')
    save_file({f'transformer.x.lora_{x}.weight': torch.zeros(2, 2) for x in 'AB'}, tmp_path / 'flux.safetensors')
    shutil.copytree(sd, tmp_path / 'binary')
    weights = tmp_path / 'binary/unet/diffusion_pytorch_model.safetensors'
    torch.save(load_file(weights), weights.with_suffix('.bin'))
    weights.unlink()
    return tmp_path


@pytest.mark.parametrize(('model', 'lora', 'message'), [
    ('nobody/no-such-model', None, r'no-such-model: no such folder, not in the cache, and cannot be downloaded .* --sd'),
    ('empty', None, r'empty: not a pipeline of diffusers .*model_index.json'),
    ('bad', None, r'bad: not a pipeline of diffusers'),
    ('binary', None, r'binary: not a pipeline of diffusers in .safetensors files'),
    ('tiny', 'nothing.safetensors', r'nothing.safetensors: there is no such LoRA; make it with'),
    ('tiny', 'empty', r'empty: give --lora one .safetensors file'),
    ('tiny', 'two', r'two: give --lora one .safetensors file, or a folder with one'),
    ('tiny', 'lora.bin', r'lora.bin: give --lora one .safetensors file.* can run code'),
    ('tiny', 'pickle.safetensors', r'pickle.safetensors: not a readable .safetensors file'),
    ('tiny', 'bad.safetensors', r'not a readable .safetensors file'),
    ('tiny', 'else.safetensors', r'else.safetensors: this LoRA does not fit'),
    ('tiny', 'flux.safetensors', r'flux.safetensors: this LoRA does not fit .*none of its weights has a place there'),
])
def test_what_cannot_be_read_ends_in_one_line(broken, sd, model, lora, message):
    with pytest.raises(SystemExit, match=message) as stopped:
        words.portrait_of('a man', sd if model == 'tiny' else model, lora, steps=1)
    assert str(stopped.value).startswith('error: ') and str(stopped.value).count('\n') == 0
    assert not (broken / 'trapped').exists()                            # nothing ran code


def test_a_lora_of_another_network_is_refused(trained, tmp_path):
    with pytest.raises(SystemExit, match=r'lora.safetensors: this LoRA does not fit .*wide'):
        words.portrait_of('a man', tiny_pipeline(tmp_path / 'wide', width=32), trained[0] / 'lora.safetensors', steps=1)


@pytest.mark.parametrize('name', ['diffusers', 'transformers', 'peft'])
def test_missing_packages_are_named(sd, portraits, tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    for call in (lambda: words.portrait_of('a man', sd), lambda: train.main(command(sd, portraits, tmp_path))):
        with pytest.raises(SystemExit, match=f'^error: words need the {name} package: pip install diffusers transformers peft$'):
            call()


def test_training_ends_in_one_line_where_something_is_missing(sd, broken, portraits):
    for model, data, setting, message in (
            (sd, 'nothing', 'ema=0', 'nothing: holds neither images nor avatars'),
            (sd, 'empty', 'ema=0', 'empty: holds neither images'),
            (sd, 'captions', 'ema=0', 'captions.json: not readable as captions'),
            ('nobody/no-such-model', portraits, 'ema=0', 'cannot be downloaded'),
            (sd, portraits, 'lora_rank=0', 'lora_rank takes a positive int'),
            (sd, portraits, 'base_lr=1', 'no such setting of --stage lora; there are .*lora_lr'),
            (sd, portraits, 'lora_size=17', 'must divide by 2')):
        with pytest.raises(SystemExit, match=message) as stopped:
            train.main(command(model, data, 'runs', setting))
        assert str(stopped.value).startswith('error: ') and str(stopped.value).count('\n') == 0


def test_a_blank_portrait_is_not_passed_on(sd, monkeypatch):
    outputs = []

    class Pipeline:
        def __call__(self, prompt, generator):
            return types.SimpleNamespace(images=[outputs[0]], nsfw_content_detected=[outputs[1]])

        def set_progress_bar_config(self, desc):
            pass
    monkeypatch.setattr(words, 'load_pipeline', lambda *args: Pipeline())
    image = Image.linear_gradient('L')
    outputs[:] = image, False
    assert words.portrait_of('a man', sd).tobytes() == image.convert('RGB').tobytes()
    for outputs[:] in ((image, True), (Image.new('RGB', (16, 16)), False)):
        with pytest.raises(SystemExit, match=r'the portrait is blank.*safety checker.*another --seed'):
            words.portrait_of('a man', sd)


def test_names_and_triggers():
    assert words.name_of('A man, 40, with  a "red" beard!') == 'a-man-40-with-a-red-beard' and words.name_of('?') == 'prompt'
    assert words.name_of('Ein Mädchen') == 'ein-mädchen' and len(words.name_of('ab ' * 50)) <= 40
    assert words.with_trigger('', 'T') == 'T' and words.with_trigger(' x', 'T') == 'T, x' and words.with_trigger('a t.', 'T') == 'a t.'
    assert re.fullmatch(r'[\w-]+/[\w.-]+', words.SD) and words.TRIGGER == 'Blender Synthetic Avata'
