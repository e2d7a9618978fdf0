"""The page in a real headless Chromium: a photograph goes in, an avatar and its files come out."""
import shutil
from pathlib import Path

import pytest
import torch

import app
import meshes
import pictures
import rodin
import rodinhd as rh
import running

gradio = pytest.importorskip('gradio', reason='needs gradio')
sync_api = pytest.importorskip('playwright.sync_api', reason='needs playwright')

NAMES = ('chromium', 'chromium-browser', 'google-chrome')
CHROMIUM = next((path for path in map(shutil.which, NAMES) if path), None)
PORTRAIT = Path(__file__).parent.parent / 'examples' / 'smile.png'
PATIENCE = 240_000  # milliseconds


@pytest.fixture(scope='module')
def models():
    """Random ones, which make an avatar in seconds; the decoder is dense everywhere."""
    torch.manual_seed(0)
    names = 'base_width=32', 'up_width=32', 'sample_steps=1', 'steps=16', 'grid=8'
    config = rh.make_config('tiny', [*names, 'likeness_steps=2'])
    made = {}
    for kind in running.MODELS:
        made[kind] = running.build(kind, config).requires_grad_(False).eval()
        made[kind].config = config
    made['decoder'].sigma_net[2].bias[0] = 6
    return made


@pytest.fixture
def url(models, monkeypatch):
    """The address of the page, whose meshes are a triangle."""
    monkeypatch.setattr(meshes, 'mesh_of', lambda *_, **__: None)

    def write_mesh(path, mesh):
        path.write_bytes(b'glTF')
        return [path]

    monkeypatch.setattr(meshes, 'write_mesh', write_mesh)
    turn_of = pictures.turn_of
    monkeypatch.setattr(pictures, 'turn_of', lambda *args: turn_of(*args, size=32))
    blocks = app.page(models)
    _, address, _ = blocks.launch(server_name='127.0.0.1', prevent_thread_lock=True, quiet=True)
    yield address
    blocks.close()


@pytest.mark.skipif(CHROMIUM is None, reason='needs Chromium (apt-get install chromium)')
def test_a_photograph_becomes_an_avatar(url, tmp_path):
    assert url.startswith('http://127.0.0.1:')
    shutil.copy(PORTRAIT, tmp_path / 'me.png')
    (tmp_path / 'not.png').write_text('no image')
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'])
        page = browser.new_page()
        page.goto(url)
        chosen = page.locator('input[type=file]').first
        chosen.set_input_files(tmp_path / 'not.png')
        page.get_by_text('not.png').first.wait_for()
        page.get_by_role('button', name='Make avatars').click()
        page.get_by_text('not a readable image').first.wait_for(timeout=PATIENCE)

        page.reload()
        page.locator('input[type=file]').first.set_input_files(tmp_path / 'me.png')
        page.get_by_text('me.png').first.wait_for()
        page.get_by_role('button', name='Make avatars').click()
        file_named = 'a[download="{}"]'.format
        page.locator(file_named('turntable.webp')).first.wait_for(timeout=PATIENCE)
        for name in ('avatar0.glb', 'splats0.ply', 'grid.png', 'viewer.html', 'turntable.gif'):
            assert page.locator(file_named(name)).count(), name
        assert page.locator('iframe[title="An avatar to turn"]').count() == 1
        with page.expect_download() as download:
            page.locator(file_named('avatar0.glb')).first.click()
        assert download.value.path().read_bytes() == b'glTF'
        browser.close()


def test_a_sentence_becomes_an_avatar(models, monkeypatch):
    monkeypatch.setattr(running, 'load_latents', lambda *_: None)
    monkeypatch.setattr(rodin, 'planes_of', lambda *_: torch.zeros(1, 3, 8, 32, 32))
    monkeypatch.setattr(meshes, 'mesh_of', lambda *_, **__: None)
    monkeypatch.setattr(meshes, 'write_mesh', lambda *_: [])
    turn_of = pictures.turn_of
    monkeypatch.setattr(pictures, 'turn_of', lambda *args: turn_of(*args, size=16))
    parts = app.make(models, None, 'a man', lambda *_, **__: None)
    found = [name for part in parts for name in part]
    assert found == ['picture', 'viewer', 'turning', 'files']


def test_what_is_missing_is_said(models):
    with pytest.raises(rh.Stop, match='there is no such image'):
        list(app.make(models, ['nowhere.png'], '', lambda *_, **__: None))
