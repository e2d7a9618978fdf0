"""Pictures of what is exported, made by the programs that people open it in.

    python tests/importers.py --planes samples/*/planes.pt          -> results/meshes.json

measures the meshes and the splats of avatars of sample.py in each program that is there, beside the
volumes' own views from four sides; the pictures go to --pictures.

`npm install --prefix tests` gets three.js, model-viewer, a splat viewer and the Khronos validator;
`pip install bpy` is Blender. Where one is absent, `missing` says so.
"""
import argparse
import base64
import importlib.util
import io
import json
import mimetypes
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

HERE = Path(__file__).parent
if __name__ == '__main__':
    sys.path.insert(0, str(HERE.parent))

import rodinhd as rh  # noqa: E402

MODULES = Path(os.environ.get('NODE_MODULES', HERE / 'node_modules'))
NAMES = ('chromium', 'chromium-browser', 'google-chrome')
CHROMIUM = next((path for path in map(shutil.which, NAMES) if path), None)
WITHOUT_A_GPU = [
    '--no-sandbox',
    '--use-gl=angle',
    '--use-angle=swiftshader',
    '--enable-unsafe-swiftshader',
    '--ignore-gpu-blocklist',
]
SITE = 'http://localhost:1/'  # never asked: the browser's requests are answered from files
PATIENCE = 120_000  # milliseconds
ELEVATION = 5
SIDES = (0, 90, 180, 270)


def missing(package=None):
    """What must be installed to use a package of npm's in a browser, or None where it is there."""
    if importlib.util.find_spec('playwright') is None:
        return 'needs playwright'
    if CHROMIUM is None:
        return 'needs Chromium (apt-get install chromium)'
    if package and not (MODULES / package).is_dir():
        return f'needs {package} (npm install --prefix tests)'
    return None


# Pages --------------------------------------------------------------------------------------------
IMPORTS = {
    'three': 'three/build/three.module.js',
    'three/addons/': 'three/examples/jsm/',
    'spark': '@sparkjsdev/spark/dist/spark.module.js',
    'model-viewer': '@google/model-viewer/dist/model-viewer-module.min.js',
}
PAGE = '''<!doctype html><style>body {{ margin: 0 }} * {{
  --poster-color: transparent; --progress-bar-color: transparent }}</style>
<script type="importmap">{{"imports": {imports}}}</script>
<body><script type="module">{script}</script></body>'''
THREE = '''
import * as THREE from 'three';
import {{ GLTFLoader }} from 'three/addons/loaders/GLTFLoader.js';
const renderer = new THREE.WebGLRenderer({{
  antialias: true, alpha: true, preserveDrawingBuffer: true }});
renderer.setSize({size}, {size});
document.body.append(renderer.domElement);
const scene = new THREE.Scene();
const {{ scene: avatar }} = await new GLTFLoader().loadAsync('asset');
if ({lit}) {{
  scene.add(new THREE.HemisphereLight(0xffffff, 0x666666, 1.5));
  const sun = new THREE.DirectionalLight(0xffffff, 2);
  sun.position.set(-2, 2, 3);
  scene.add(sun);
  avatar.traverse(x => {{ if (x.isMesh) x.material = new THREE.MeshStandardMaterial({{
    map: x.material.map, vertexColors: x.material.vertexColors, roughness: 1, metalness: 0 }}); }});
}}
scene.add(avatar);
'''
ORBIT = '''
const camera = new THREE.PerspectiveCamera({fov}, 1, 0.1, 100);
window.look = async azimuth => {{
  const a = azimuth * Math.PI / 180, e = {elevation} * Math.PI / 180;
  const flat = 4 * Math.cos(e);
  camera.position.set(flat * Math.sin(a), 4 * Math.sin(e), flat * Math.cos(a));
  camera.lookAt(0, 0, 0);
  {settle}
  renderer.render(scene, camera);
  return renderer.domElement.toDataURL();
}};
'''
MODEL_VIEWER = '''
import {{ ModelViewerElement }} from 'model-viewer';
ModelViewerElement.minimumRenderScale = 1;
const viewer = document.createElement('model-viewer');
Object.assign(viewer.style, {{ width: '{size}px', height: '{size}px', background: 'transparent' }});
for (const [name, value] of Object.entries({{
  src: 'asset', 'camera-target': '0m 0m 0m', 'interaction-prompt': 'none',
  'field-of-view': '{fov}deg', 'max-field-of-view': '60deg',
  'min-camera-orbit': 'auto auto 1m', 'max-camera-orbit': 'Infinity Infinity 9m',
}})) viewer.setAttribute(name, value);
document.body.append(viewer);
await new Promise(done => viewer.addEventListener('load', done));
window.look = async azimuth => {{
  viewer.cameraOrbit = `${{azimuth}}deg ${{90 - {elevation}}}deg 4m`;
  viewer.jumpCameraToGoal();
  await new Promise(done => setTimeout(done, 500));
  return null;
}};
'''
SPARK = '''
import * as THREE from 'three';
import {{ SparkRenderer, SplatMesh }} from 'spark';
const renderer = new THREE.WebGLRenderer({{ alpha: true, preserveDrawingBuffer: true }});
renderer.setSize({size}, {size});
document.body.append(renderer.domElement);
const scene = new THREE.Scene();
const spark = new SparkRenderer({{ renderer }});
scene.add(spark);
const splats = new SplatMesh({{ url: 'asset', fileName: '{name}' }});
await splats.initialized;
if ('{name}'.endsWith('.ply')) splats.rotation.x = -Math.PI / 2;  // Z up
scene.add(splats);
'''
SORTED = '''
  const towards = new THREE.Vector3(), wait = () => new Promise(done => setTimeout(done, 50));
  camera.updateMatrixWorld();
  camera.getWorldDirection(towards);
  do { await spark.update({ scene, camera }); await wait(); }
  while (spark.sorting || spark.sortDirty || spark.sortedDir.distanceTo(towards) > 1e-3);
'''
SCRIPTS = {
    'three': THREE + ORBIT,
    'model-viewer': MODEL_VIEWER,
    'spark': SPARK + ORBIT,
}


def answer(asset, script):
    """Makes a function that answers a page's requests from files."""
    imports = {name: SITE + 'modules/' + path for name, path in IMPORTS.items()}
    page = PAGE.format(imports=json.dumps(imports), script=script)

    def handle(route):
        name = route.request.url.removeprefix(SITE).split('?')[0]
        if not name:
            route.fulfill(body=page, content_type='text/html')
        elif name == 'asset':
            route.fulfill(body=Path(asset).read_bytes(), content_type='model/gltf-binary')
        elif name.startswith('modules/') and (MODULES / name[8:]).is_file():
            kind = mimetypes.guess_type(name)[0] or 'application/octet-stream'
            route.fulfill(body=(MODULES / name[8:]).read_bytes(), content_type=kind)
        else:
            route.fulfill(status=404, body='')

    return handle


def picture_of(data):
    """Bytes of an image file -> its rh.Picture, on white."""
    image = Image.open(io.BytesIO(data)).convert('RGBA')
    pixels = torch.from_numpy(np.array(image)).float() / 255
    rgb = pixels[..., :3] * pixels[..., 3:] + 1 - pixels[..., 3:]
    return rh.Picture(rgb, pixels[..., 3])


def in_browser(browser, program, asset, size=256, sides=SIDES, lit=False, elevation=ELEVATION):
    """Pictures (rh.Picture) of a file from some sides, in a program of SCRIPTS, and what the page
    complained about."""
    settle = SORTED if program == 'spark' else ''
    script = SCRIPTS[program].format(
        size=size,
        fov=rh.PORTRAIT_FOV,
        elevation=elevation,
        lit=str(lit).lower(),
        name=Path(asset).name,
        settle=settle,
    )
    page = browser.new_page(viewport={'width': size, 'height': size})
    complaints = []
    page.on('pageerror', lambda error: complaints.append(str(error)))
    page.on('console', lambda m: complaints.append(m.text) if m.type == 'error' else None)
    page.route('**/*', answer(asset, script))
    page.goto(SITE)
    try:
        page.wait_for_function('window.look', timeout=PATIENCE)
        pictures = []
        for side in sides:
            url = page.evaluate(f'look({side})')
            if url:
                data = base64.b64decode(url.split(',')[1])
            else:
                data = page.screenshot(omit_background=True)
            pictures.append(picture_of(data))
    except Exception as error:
        raise RuntimeError('\n'.join(complaints) or 'no complaint') from error
    finally:
        page.close()
    return pictures, complaints


# Blender ------------------------------------------------------------------------------------------
BLENDER = '''
import json, math, sys
import bpy
from mathutils import Matrix
path, out, size, fov, lit, poses = json.loads(sys.argv[-1])
bpy.ops.wm.read_factory_settings(use_empty=True)
kind = path.rsplit('.', 1)[1].lower()
if kind == 'glb':
    bpy.ops.import_scene.gltf(filepath=path)
elif kind == 'obj':
    bpy.ops.wm.obj_import(filepath=path, forward_axis='Y', up_axis='Z')
scene = bpy.context.scene
scene.render.engine = 'CYCLES'
scene.cycles.samples = 16
scene.cycles.use_denoising = False
scene.render.resolution_x = scene.render.resolution_y = size
scene.render.film_transparent = True
scene.render.image_settings.color_mode = 'RGBA'
scene.view_settings.view_transform = 'Standard'
scene.render.threads_mode = 'FIXED'
scene.render.threads = 2
if lit:
    for material in bpy.data.materials:
        nodes = material.node_tree.nodes
        pictures = [node for node in nodes if node.type == 'TEX_IMAGE']
        shader = nodes.new('ShaderNodeBsdfDiffuse')
        if pictures:
            material.node_tree.links.new(pictures[0].outputs[0], shader.inputs[0])
        output = next(node for node in nodes if node.type == 'OUTPUT_MATERIAL')
        material.node_tree.links.new(shader.outputs[0], output.inputs[0])
    sun = bpy.data.objects.new('sun', bpy.data.lights.new('sun', 'SUN'))
    sun.data.energy = 3
    sun.rotation_euler = (math.radians(50), 0, math.radians(-35))
    scene.collection.objects.link(sun)
    world = bpy.data.worlds.new('world')
    world.color = (0.3, 0.3, 0.3)
    scene.world = world
camera = bpy.data.objects.new('camera', bpy.data.cameras.new('camera'))
camera.data.angle = math.radians(fov)
scene.collection.objects.link(camera)
scene.camera = camera
for i, pose in enumerate(poses):
    camera.matrix_world = Matrix(pose)
    scene.render.filepath = f'{out}/{i}.png'
    bpy.ops.render.render(write_still=True)
'''


def blender_command(script):
    """The command that runs a script of Blender's, or None where there is no Blender."""
    if importlib.util.find_spec('bpy'):
        return [sys.executable, str(script)]
    blender = shutil.which('blender')
    return [blender, '--background', '--factory-startup', '--python', str(script), '--'] \
        if blender else None


def in_blender(asset, folder, size=256, sides=SIDES, lit=False, elevation=ELEVATION):
    """Pictures (rh.Picture) of a mesh from some sides, by Cycles; folder is for its files."""
    script = Path(folder) / 'picture.py'
    script.write_text(BLENDER)
    poses = [rh.orbit_pose(side, elevation).tolist() for side in sides]
    task = json.dumps([str(asset), str(folder), size, rh.PORTRAIT_FOV, lit, poses])
    done = subprocess.run([*blender_command(script), task], capture_output=True, text=True)
    pictures = sorted(Path(folder).glob('[0-9].png'))
    assert len(pictures) == len(sides), done.stdout + done.stderr
    return [picture_of(path.read_bytes()) for path in pictures]


# The Khronos validator ----------------------------------------------------------------------------
VALIDATOR = '''
const fs = require('fs'), validator = require(process.argv[1]);
validator.validateBytes(new Uint8Array(fs.readFileSync(process.argv[2])))
  .then(report => console.log(JSON.stringify(report.issues)));
'''


def validated(asset):
    """What the Khronos validator finds in a .glb: numErrors, numWarnings, messages ..."""
    command = ['node', '-e', VALIDATOR, str(MODULES / 'gltf-validator'), str(asset)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


# Numbers ------------------------------------------------------------------------------------------
def compared(ours, theirs):
    """PSNR and overlap of the silhouettes of pairs of rh.Picture, means over them."""
    psnrs, overlaps = [], []
    for a, b in zip(ours, theirs):
        psnrs.append(rh.psnr(a.rgb, b.rgb))
        one, other = a.opacity > 0.5, b.opacity > 0.5
        overlaps.append(float((one & other).sum() / (one | other).sum()))
    return np.mean(psnrs), np.mean(overlaps)


# The command --------------------------------------------------------------------------------------
BROWSED = {  # a program, its package, and what it opens
    'three': ('three', '.glb'),
    'model-viewer': ('@google/model-viewer', '.glb'),
    'spark': ('@sparkjsdev/spark', '.ply'),
}


def seen_in_all(folder, size):
    """Opens avatar.glb and avatar.ply in a folder in all programs that are there -> {program:
    [rh.Picture]}."""
    seen = {}
    if blender_command('x'):
        seen['Blender'] = in_blender(folder / 'avatar.glb', folder, size)
    if missing():
        return seen
    from playwright import sync_api
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=WITHOUT_A_GPU)
        for program, (package, suffix) in BROWSED.items():
            if not missing(package):
                asset = folder / f'avatar{suffix}'
                seen[program], _ = in_browser(browser, program, asset, size)
        browser.close()
    return seen


def main(args):
    import frozen
    import meshes
    import pictures
    import running
    import splats

    torch.set_grad_enabled(False)
    decoder = running.load_model('decoder', args.fits, 'cpu')
    intrinsics = rh.intrinsics_of(rh.PORTRAIT_FOV, args.size)
    found, rows = {}, []
    for path in args.planes:
        planes = running.read_checkpoint(path, 'avatars')['planes'][0].float()
        avatar = pictures.avatar_of(planes, decoder, decoder.config)
        poses = [rh.orbit_pose(side, ELEVATION) for side in SIDES]
        views = [
            frozen.render_view(avatar.field, pose, intrinsics, args.size, args.size)
            for pose in poses
        ]
        rows.append(views)
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            how = {'triangles': meshes.TRIANGLES, 'texture': meshes.TEXTURE}
            mesh = meshes.mesh_of(*avatar, **how)
            meshes.write_mesh(folder / 'avatar.glb', mesh)
            splats.write_splats(folder / 'avatar.ply', splats.splats_of(*avatar))
            numbers = {'triangles': len(mesh.faces)}
            for program, seen in seen_in_all(folder, args.size).items():
                psnr, overlap = compared(seen, views)
                numbers[program] = {'PSNR': float(psnr), 'overlap': float(overlap)}
                rows.append(seen)
        found[path.parent.name] = numbers
        print(path.parent.name, numbers)

    ask = ['git', 'rev-parse', '--short', 'HEAD']
    commit = subprocess.run(ask, cwd=HERE, capture_output=True, text=True).stdout.strip()
    running.write_json(HERE.parent / 'results' / 'meshes.json', {
        'command': 'python tests/importers.py --planes samples/*/planes.pt',
        'commit': commit,
        'machine': f'{os.cpu_count()} CPU cores, PyTorch {torch.__version__}',
        'size': args.size,
        'sides': SIDES,
        'avatars': found,
    })
    if args.pictures:
        sheet = np.concatenate([np.concatenate([p.rgb.numpy() for p in row], 1) for row in rows])
        Image.fromarray((sheet * 255).clip(0, 255).astype(np.uint8)).save(args.pictures)


def parse(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument('--planes', type=Path, nargs='+', required=True)
    p.add_argument('--fits', type=Path, default=HERE.parent / 'weights')
    p.add_argument('--size', type=int, default=256)
    p.add_argument('--pictures', type=Path)
    return p.parse_args(argv)


if __name__ == '__main__':
    main(parse())
