"""The viewer in a real headless Chromium: its picture is that of `render`, its controls work."""
import base64
import dataclasses
import io
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import export
import rodinhd as rh

sync_api = pytest.importorskip('playwright.sync_api')

NAMES = ('chromium', 'chromium-browser', 'google-chrome')
CHROMIUM = next((path for path in map(shutil.which, NAMES) if path), None)
WITHOUT = 'needs Chromium (apt-get install chromium)'
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=WITHOUT)

WITHOUT_A_GPU = [
    '--no-sandbox',
    '--use-gl=angle',
    '--use-angle=swiftshader',
    '--enable-unsafe-swiftshader',
    '--ignore-gpu-blocklist',
]
VIEW_IS_SHOWN = '#view:not([hidden])'
PATIENCE = 60_000  # milliseconds


def soft_ball(config):
    """A ball of random features -> its field, and the occupancy grid of it."""
    torch.manual_seed(0)
    R = config.resolution
    decoder = rh.Decoder(config).requires_grad_(False)
    decoder.color_net[4].weight.mul_(6)
    planes = torch.randn(3, config.channels, 9, 9) * 0.6
    planes = rh.resize_planes(planes, R).clamp(-1, 1)

    # The last channel says where the ball is; outside is thin air, with little to march through
    axis = torch.linspace(-1, 1, R)
    planes[:, -1] = (axis[:, None] ** 2 + axis ** 2 < 0.6).float()
    first, _, last = decoder.sigma_net
    first.weight[0] = 0
    first.weight[0, config.channels // 4 - 1] = 20
    last.weight[0] = 0
    last.weight[0, 0] = 0.8
    last.bias[0] = -8

    field = rh.PlaneField(planes, decoder)
    return field, rh.grid_for(field, config)


@pytest.fixture(scope='module')
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=WITHOUT_A_GPU)
        yield browser
        browser.close()


def make_viewer(path, steps):
    """Writes viewer.html of a random avatar with the decoder of `small`.

    Returns its path, and view(azimuth, elevation, distance, size), which renders the same. Few
    steps are enough: Chromium has no GPU here.
    """
    config = rh.make_config('small', [f'steps={steps}', 'resolution=64', 'grid=32'])
    field, grid = soft_ball(config)

    def view(azimuth, elevation, distance, size):
        pose = rh.orbit_pose(azimuth, elevation, distance)
        intrinsics = rh.intrinsics_of(34.0, size)
        return rh.render_view(field, pose, intrinsics, size, size, config.steps, grid).rgb

    frames = []
    for azimuth in (0, 120, 240):
        pixels = (view(azimuth, 5, 4.0, 32) * 255).byte().numpy()
        frames.append(Image.fromarray(pixels))
    export.write_viewer(path, field.planes, field.decoder, grid, frames, frames[0])
    return path, view


@pytest.fixture(scope='module')
def viewer(tmp_path_factory):
    return make_viewer(tmp_path_factory.mktemp('viewer') / 'viewer.html', steps=64)


def show(browser, path, width=64, height=64, suffix='#live', **how):
    """Opens a file -> the page, and a list that gathers its errors and console messages. It stands
    still, and with #live it is drawn here, too, at full size."""
    how.setdefault('reduced_motion', 'reduce')
    page = browser.new_page(viewport={'width': width, 'height': height}, **how)
    messages = []
    page.on('console', lambda message: messages.append(message.text))
    page.on('pageerror', lambda error: messages.append(str(error)))
    page.goto(f'file://{path}{suffix}')
    return page, messages


def picture(page):
    """What the page draws now, (H, W, 3) in 0..1."""
    url = page.evaluate('(draw(), canvas.toDataURL())')
    data = base64.b64decode(url.split(',')[1])
    image = Image.open(io.BytesIO(data)).convert('RGB')
    return torch.from_numpy(np.asarray(image).copy()).float() / 255


def test_the_browser_shows_what_render_shows(browser, viewer):
    path, view = viewer
    assert path.stat().st_size < 4e6
    page, messages = show(browser, path)
    page.wait_for_selector(VIEW_IS_SHOWN, timeout=PATIENCE)
    for azimuth, elevation, distance in ((20, 5, 4), (200, 40, 3)):
        camera = f'{{azimuth: {azimuth}, elevation: {elevation}, distance: {distance}}}'
        page.evaluate(f'Object.assign(camera, {camera})')
        ours = picture(page)
        theirs = view(azimuth, elevation, float(distance), ours.shape[0])
        assert ours.std() > 0.05
        assert rh.psnr(ours, theirs) > 30
    assert not messages
    page.close()


def test_mouse_keys_and_wheel(browser, viewer):
    page, messages = show(browser, viewer[0])
    page.wait_for_selector(VIEW_IS_SHOWN, timeout=PATIENCE)
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
    assert page.evaluate('frame.src') != first
    assert page.evaluate('frame.naturalWidth') == 32
    assert not messages
    page.close()


class Shader:
    """The shader's arithmetic, written out; it reads packed weights (vec4s, 4) in their order."""
    def __init__(self, weights):
        self.rest = weights

    def take(self, count, columns=1):
        """The next `count` vec4s as a matrix of so many columns, or as a vector."""
        taken = self.rest[:count]
        self.rest = self.rest[count:]
        return taken.reshape(-1, columns) if columns > 1 else taken.flatten()

    def layer(self, x, groups):
        """`groups` groups of four linear combinations of x."""
        return self.take(groups * len(x), len(x)) @ x


def encoded(groups):
    """Groups of four values (n, 4) by their frequency encoding, group by group."""
    sine = groups.sin()
    double = [2 * sine * groups.cos(), 1 - 2 * sine ** 2]
    return torch.stack([groups, sine, groups.cos(), *double], dim=1).reshape(-1)


@pytest.mark.parametrize('preset', ['tiny', 'paper'])
def test_packing_keeps_the_decoder(preset):
    """On packed weights of other sizes the shader's density and colour are the decoder's."""
    config = rh.make_config(preset)
    decoder = rh.Decoder(config).requires_grad_(False)
    weights, sizes = export.pack_decoder(decoder)
    colour_groups = sizes['COLOUR']
    density_groups = sizes['DENSITY']
    hidden_groups = sizes['HIDDEN']

    # One texel, the same on all planes
    planes = torch.randn(1, config.channels, 1, 1).expand(3, -1, 1, 1)
    layers = export.pack_planes(planes, decoder, sizes).float()
    layers = layers[:colour_groups + density_groups, 0, 0]  # (groups, 4)
    direction = F.normalize(torch.randn(1, 3), dim=1)
    colour = encoded(layers[:colour_groups])
    density = encoded(layers[colour_groups:])

    shader = Shader(weights)
    first = shader.layer(density, hidden_groups)
    h = F.softplus(first + shader.take(hidden_groups))
    logit = shader.take(hidden_groups) @ h + shader.take(1)[0]
    geometry = shader.layer(h, hidden_groups)
    geometry = geometry + shader.take(hidden_groups)
    seen = torch.cat([colour, geometry, encoded(F.pad(direction, (0, 1)))])
    b = shader.layer(seen, hidden_groups).relu()
    c = shader.layer(b, hidden_groups).relu()
    rgb = torch.sigmoid(shader.take(3 * hidden_groups, 4 * hidden_groups) @ c)
    assert not len(shader.rest)

    feature = planes[:1, :, 0, 0].half().float()
    sigma, truth = decoder(feature, direction)
    assert torch.allclose(logit.exp(), sigma[0], rtol=1e-4)
    assert torch.allclose(rgb, truth[0], atol=1e-4)


def test_a_phone(browser, tmp_path):
    """All is on the screen, and text does not cover the avatar."""
    # Its picture has 30 times the pixels of the others, so a ray has few steps
    path, _ = make_viewer(tmp_path / 'viewer.html', steps=4)
    page, messages = show(browser, path, 360, 640, has_touch=True, is_mobile=True)
    page.wait_for_selector(VIEW_IS_SHOWN, timeout=PATIENCE)
    for element in ('#view', '#portrait', '#hint'):
        box = page.locator(element).bounding_box()
        assert box['x'] >= 0, element
        assert box['y'] >= 0, element
        assert box['x'] + box['width'] <= 361, element
        assert box['y'] + box['height'] <= 641, element
    hint = page.locator('#hint').bounding_box()
    stage = page.locator('#view').bounding_box()
    assert hint['y'] >= stage['y'] + stage['height']
    assert not messages
    page.close()


def test_a_decoder_in_a_texture(browser, viewer):
    """A decoder that is too large for uniforms makes the same picture."""
    path, view = viewer
    page, messages = show(browser, path, 32, 32, suffix='#texture')
    page.wait_for_selector(VIEW_IS_SHOWN, timeout=PATIENCE)
    assert rh.psnr(picture(page), view(20, 5, 4.0, 32)) > 30
    assert not messages
    page.close()


def lose_context(page):
    page.evaluate("""(() => {
      window.loser = canvas.getContext('webgl2').getExtension('WEBGL_lose_context');
      loser.loseContext();
    })()""")


def test_lost_contexts_keep_the_camera_and_are_restored_twice(browser, viewer):
    page, messages = show(browser, viewer[0])
    page.wait_for_selector(VIEW_IS_SHOWN, timeout=PATIENCE)
    page.evaluate('turn(30, 10)')
    for losses in range(1, 6):
        lose_context(page)
        page.wait_for_selector('#frame:not([hidden])', timeout=PATIENCE)
        if losses <= 2:
            page.wait_for_timeout(100)
            page.evaluate('loser.restoreContext()')
            page.wait_for_selector(VIEW_IS_SHOWN, timeout=PATIENCE)
        else:
            break
    page.wait_for_timeout(300)
    assert page.evaluate('canvas.hidden && frame.naturalWidth') == 32
    assert page.evaluate('[camera.azimuth, camera.elevation]') == [50, 15]
    assert page.evaluate("document.getElementById('hint').textContent").endswith('lost: frames')
    page.close()


def test_a_slow_browser_keeps_the_frames(browser, viewer):
    """At 0.65 ms a pixel, as without a GPU, none is drawn; at 0.01 ms small ones while it moves."""
    page, messages = show(browser, viewer[0], suffix='#frames')
    page.wait_for_function("document.getElementById('hint').textContent.includes('frames')")
    assert page.evaluate('sizes(0.65, 512)') is None
    assert page.evaluate('sizes(0.01, 512)') == {'moving': 83, 'rest': 158}
    assert page.evaluate('sizes(1e-5, 2000)') == {'moving': 512, 'rest': 512}
    assert not messages
    page.close()


def test_title_tag_and_mesh(browser, tmp_path, tiny):
    """The page bears them, and gives the mesh back as the file that it was made of."""
    field, grid = soft_ball(tiny)
    (tmp_path / 'me.glb').write_bytes(b'glTF and so on')
    frames = [Image.new('RGB', (32, 32), 'red')]
    words = {'title': 'somebody', 'tag': 'synthetic'}
    path = tmp_path / 'viewer.html'
    how = field.planes, field.decoder, grid, frames
    export.write_viewer(path, *how, mesh=tmp_path / 'me.glb', **words)
    page, messages = show(browser, path, 400, 400, suffix='#frames')
    assert page.title() == 'somebody'
    assert page.locator('#tag').inner_text() == 'synthetic'
    with page.expect_download() as download:
        page.locator('#mesh').click()
    assert download.value.suggested_filename == 'me.glb'
    assert download.value.path().read_bytes() == b'glTF and so on'
    assert page.evaluate("(canvas.width = canvas.height = 200, tagged().width)") == 200
    assert not messages
    page.close()

    export.write_viewer(path, *how)
    page, _ = show(browser, path, 400, 400, suffix='#frames')
    assert page.locator('#mesh').is_hidden()
    page.close()


def test_it_turns_until_it_is_touched(browser, viewer):
    page, messages = show(browser, viewer[0], suffix='#frames', reduced_motion='no-preference')
    page.wait_for_function('camera.azimuth > 21')
    page.evaluate('turn(0, 0)')
    page.wait_for_timeout(200)
    before = page.evaluate('camera.azimuth')
    page.wait_for_timeout(300)
    assert page.evaluate('camera.azimuth') == before
    page.evaluate("document.getElementById('reset').click()")
    assert page.evaluate('camera.azimuth') == 20
    assert not messages
    page.close()


def test_a_decoder_of_any_width(tiny):
    """Its packed weights have zeros where the width does not divide by four."""
    config = dataclasses.replace(tiny, decoder_width=18)
    weights, sizes = export.pack_decoder(rh.Decoder(config).requires_grad_(False))
    assert sizes['HIDDEN'] == 5
    density = 5 * sizes['DENSITY']
    first = weights[:20 * density].view(20, density, 4)
    assert (first[18:] == 0).all()
    assert (first[:18] != 0).any()
