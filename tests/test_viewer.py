"""The viewer in a real headless Chromium: the picture is that of `render`, and the controls work."""
import base64
import io
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import export
import rodinhd as rh

sync_api = pytest.importorskip('playwright.sync_api')
CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason='needs Chromium (apt-get install chromium)')


def avatar(config, seed=0):
    """A soft ball of random features: planes, decoder, grid."""
    torch.manual_seed(seed)
    decoder, R = rh.Decoder(config).requires_grad_(False), config.resolution
    decoder.color_net[4].weight.mul_(6)
    planes = rh.resize_planes(torch.randn(3, config.channels, 9, 9) * 0.6, R).clamp(-1, 1)
    axis = torch.linspace(-1, 1, R)
    ball = (axis[:, None] ** 2 + axis ** 2 < 0.6).float()
    with torch.no_grad():                               # the last channel says where the ball is
        decoder.sigma_net[0].weight[0] = 0
        decoder.sigma_net[0].weight[0, config.channels // 4 - 1] = 20
        decoder.sigma_net[2].weight[0], decoder.sigma_net[2].bias[0] = 0, -8        # thin air outside: little to march through
        decoder.sigma_net[2].weight[0, 0] = 0.8
    planes[:, -1] = ball
    grid = rh.grid_for(rh.PlaneField(planes, decoder), config)
    return planes, decoder, grid


@pytest.fixture(scope='module')
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[
            '--no-sandbox', '--use-gl=angle', '--use-angle=swiftshader', '--enable-unsafe-swiftshader', '--ignore-gpu-blocklist'])
        yield browser
        browser.close()


def make_viewer(path, steps):
    """viewer.html of a random avatar with the decoder of `small`, and a function that renders the same from an orbit."""
    config = rh.make_config('small', [f'steps={steps}', 'resolution=64', 'grid=32'])        # few steps: Chromium has no GPU here
    planes, decoder, grid = avatar(config)

    def view(azimuth, elevation, distance, size):
        pose, k = rh.orbit_pose(azimuth, elevation, distance), rh.intrinsics_of(34.0, size)
        return rh.render_view(rh.PlaneField(planes, decoder), pose, k, size, size, config.steps, grid)[0]
    frames = [Image.fromarray((view(a, 5, 4.0, 32) * 255).byte().numpy()) for a in (0, 120, 240)]
    export.write_viewer(path, planes, decoder, grid, frames, frames[0])
    return path, view


@pytest.fixture(scope='module')
def viewer(tmp_path_factory):
    return make_viewer(tmp_path_factory.mktemp('viewer') / 'viewer.html', steps=64)


def show(browser, path, width=64, height=64, suffix='', **how):
    """The page, and a list that gathers its errors and console messages."""
    page, messages = browser.new_page(viewport={'width': width, 'height': height}, **how), []
    page.on('console', lambda message: messages.append(message.text))
    page.on('pageerror', lambda error: messages.append(str(error)))
    page.goto(f'file://{path}{suffix}')
    return page, messages


def picture(page):
    data = page.evaluate('(draw(), canvas.toDataURL())')
    image = Image.open(io.BytesIO(base64.b64decode(data.split(',')[1]))).convert('RGB')
    return torch.from_numpy(np.asarray(image).copy()).float() / 255


def test_the_browser_shows_what_render_shows(browser, viewer):
    path, view = viewer
    assert path.stat().st_size < 4e6
    page, messages = show(browser, path)
    page.wait_for_selector('#view:not([hidden])', timeout=60_000)
    for azimuth, elevation, distance in ((20, 5, 4), (200, 40, 3)):
        page.evaluate(f'Object.assign(camera, {{azimuth: {azimuth}, elevation: {elevation}, distance: {distance}}})')
        ours = picture(page)
        assert ours.std() > 0.05 and rh.psnr(ours, view(azimuth, elevation, float(distance), ours.shape[0])) > 30
    assert not messages
    page.close()


def test_mouse_keys_and_wheel(browser, viewer):
    page, messages = show(browser, viewer[0])
    page.wait_for_selector('#view:not([hidden])', timeout=60_000)
    before = picture(page)
    page.mouse.move(40, 30)
    page.mouse.down()
    page.mouse.move(2, 12)
    page.mouse.up()
    page.wait_for_function('camera.azimuth == 39 && camera.elevation == -4')
    assert (picture(page) - before).abs().max() > 0.1
    page.keyboard.press('ArrowRight')
    page.keyboard.press('ArrowUp')
    page.wait_for_function('camera.azimuth == 44 && camera.elevation == 1')
    page.mouse.wheel(0, 200)
    page.keyboard.press('-')
    page.wait_for_function('camera.distance > 4.9')
    assert not messages
    page.close()


def test_frames_without_webgl(browser, viewer):
    page, messages = show(browser, viewer[0], suffix='#frames')
    page.wait_for_function("document.getElementById('hint').textContent.includes('frames')")
    first = page.evaluate('frame.src')
    page.evaluate('turn(120, 0)')
    page.wait_for_timeout(500)
    assert page.evaluate('frame.src') != first and page.evaluate('frame.naturalWidth') == 32 and not messages
    page.close()


@pytest.mark.parametrize('preset', ['tiny', 'paper'])
def test_packing_keeps_the_decoder(preset):
    """The shader's arithmetic, written out, on packed weights of other sizes: density and colour are the decoder's."""
    decoder = rh.Decoder(rh.make_config(preset)).requires_grad_(False)
    weights, sizes = export.pack_decoder(decoder)
    C, D, H = sizes['COLOUR'], sizes['DENSITY'], sizes['HIDDEN']
    planes = torch.randn(1, rh.make_config(preset).channels, 1, 1).expand(3, -1, 1, 1)
    layers = export.pack_planes(planes, decoder, sizes).float()[:C + D, 0, 0]                       # (groups, 4)
    feature, direction = planes[:1, :, 0, 0].half().float(), torch.nn.functional.normalize(torch.randn(1, 3), dim=1)
    rest = list(weights)

    def take(n):
        taken, rest[:] = torch.stack(rest[:n]), rest[n:]
        return taken

    def encoded(f):
        return torch.stack([f, f.sin(), f.cos(), 2 * f.sin() * f.cos(), 1 - 2 * f.sin() ** 2], dim=1).reshape(-1)
    colour, density = encoded(layers[:C]), encoded(layers[C:])
    h = torch.nn.functional.softplus(take(4 * H * 5 * D).view(4 * H, -1) @ density + take(H).flatten())
    logit = take(H).flatten() @ h + take(1)[0, 0]
    a = take(4 * H * H).view(4 * H, -1) @ h + take(H).flatten()
    first = take(4 * H * (5 * C + H + 5)).view(4 * H, -1)
    b = (first @ torch.cat([colour, a, encoded(torch.nn.functional.pad(direction, (0, 1)))])).relu()
    c = (take(4 * H * H).view(4 * H, -1) @ b).relu()
    rgb = torch.sigmoid(take(3 * H).view(3, -1) @ c)
    sigma, truth = decoder(feature, direction)
    assert not rest and torch.allclose(logit.exp(), sigma[0], rtol=1e-4) and torch.allclose(rgb, truth[0], atol=1e-4)


def test_a_phone(browser, tmp_path):
    path, _ = make_viewer(tmp_path / 'viewer.html', steps=4)            # its picture has 30 times the pixels of the others
    page, messages = show(browser, path, 360, 640, has_touch=True, is_mobile=True)
    page.wait_for_selector('#view:not([hidden])', timeout=60_000)
    for element in ('#view', '#portrait', '#hint'):
        box = page.locator(element).bounding_box()
        assert box['x'] >= 0 and box['y'] >= 0 and box['x'] + box['width'] <= 361 and box['y'] + box['height'] <= 641, element
    hint, stage = page.locator('#hint').bounding_box(), page.locator('#view').bounding_box()
    assert hint['y'] >= stage['y'] + stage['height'] and not messages   # text does not cover the avatar
    page.close()
