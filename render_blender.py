"""Characters for training: renders 3D models of people with Blender into the data format.

    pip install bpy
    python render_blender.py --models characters --data mine
    blender --background --python render_blender.py -- --models characters --data mine

--models is a folder of .glb, .gltf, .vrm, .fbx, .obj and .blend files (or one such file). Each
becomes data/<name>/ with RGBA views from all around, transforms_train.json, transforms_test.json
and portrait.png. The head is found by its bone where there is a skeleton, else it is the top of
the mesh; head and shoulders fill the picture as in the portraits that the models know. Light is
even and comes from all around. A character that is there already is left as it is, so the same
command goes on after an interruption.
"""
import argparse
import contextlib
import functools
import json
import math
import os
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path


@contextlib.contextmanager
def silence(*descriptors):
    """Drops what is written to these file descriptors, by libraries too."""
    kept = [os.dup(descriptor) for descriptor in descriptors]
    with open(os.devnull, 'w') as nowhere:
        for descriptor in descriptors:
            os.dup2(nowhere.fileno(), descriptor)
    try:
        yield
    finally:
        for descriptor, before in zip(descriptors, kept):
            os.dup2(before, descriptor)
            os.close(before)


WITHOUT = ''  # why there is no Blender
try:
    with silence(1, 2):  # with NumPy 2 it complains of its audio, which is not needed
        import bpy
        from mathutils import Matrix, Vector
except ImportError as error:
    bpy = None
    WITHOUT = str(error)

SUFFIXES = ('.glb', '.gltf', '.vrm', '.fbx', '.obj', '.blend')
FOV = 34.0  # degrees, as in rodinhd.PORTRAIT_FOV
DISTANCE = 4.0  # of the cameras from the middle, as in rodinhd.orbit_pose
CHIN = 0.05  # height of the head's lower end in the unit cube
TOP = 0.95  # and of its upper end
BOX = 0.98  # what is farther from the planes through the middle is cut off
SLICES = 100  # of a mesh, in which its width is looked at
WIDER = 1.6  # how many times as wide shoulders are as a neck, at least
LOWEST, HIGHEST = -20, 45  # elevations of the views, degrees
PORTRAIT = (0, 2)  # azimuth and elevation of the portrait
GOLDEN = math.pi * (3 - math.sqrt(5))  # turns azimuths so that no two meet


def stop(message):
    """Ends the program with one line on stderr and exit status 1."""
    raise SystemExit(f'error: {message}')


# Cameras ------------------------------------------------------------------------------------------
def camera_pose(azimuth, elevation):
    """Camera-to-world, rows of a 4 x 4 matrix, of a camera that looks at the origin, as
    rodinhd.orbit_pose; angles in degrees, azimuth 0 is the front (-Y)."""
    a, e = math.radians(azimuth), math.radians(elevation)
    right = (math.cos(a), math.sin(a), 0.0)
    back = (math.sin(a) * math.cos(e), -math.cos(a) * math.cos(e), math.sin(e))
    up = (-math.sin(a) * math.sin(e), math.cos(a) * math.sin(e), math.cos(e))
    rows = [[right[i], up[i], back[i], DISTANCE * back[i]] for i in range(3)]
    return [*rows, [0.0, 0.0, 0.0, 1.0]]


def spread(count, offset):
    """So many views, (azimuth, elevation), evenly over a belt of the sphere; another offset gives
    others."""
    low, high = math.sin(math.radians(LOWEST)), math.sin(math.radians(HIGHEST))
    views = []
    for k in range(count):
        height = low + (high - low) * (k + 0.5) / count
        azimuth = math.degrees(GOLDEN * k) + offset
        views.append((azimuth % 360, math.degrees(math.asin(height))))
    return views


# A character --------------------------------------------------------------------------------------
def load(path, up):
    """Empties Blender and loads a model; raises RuntimeError where it cannot be read."""
    kind = path.suffix.lower()
    if kind == '.blend':
        bpy.ops.wm.open_mainfile(filepath=str(path), load_ui=False)
        return
    bpy.ops.wm.read_factory_settings(use_empty=True)
    if kind == '.fbx':
        bpy.ops.import_scene.fbx(filepath=str(path))
    elif kind == '.obj':
        forward = 'NEGATIVE_Z' if up == 'Y' else 'Y'
        bpy.ops.wm.obj_import(filepath=str(path), up_axis=up, forward_axis=forward)
    elif kind == '.vrm':
        load_vrm(path)
    else:
        bpy.ops.import_scene.gltf(filepath=str(path))


def load_vrm(path):
    """Loads a .vrm: it is a .glb by another name, whose characters look the other way (1.0) or
    to the front (0.x)."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / (path.stem + '.glb')
        copy.write_bytes(path.read_bytes())
        bpy.ops.import_scene.gltf(filepath=str(copy))


def vrm_looks_back(path):
    """Whether a .vrm is of version 0.x, whose characters look along -Z instead of +Z."""
    data = path.read_bytes()
    length = int.from_bytes(data[12:16], 'little')
    used = json.loads(data[20:20 + length]).get('extensionsUsed', [])
    return 'VRM' in used


def hide_bone_shapes():
    """Hides the meshes that a skeleton's bones are drawn as: glTF's importer adds one, and a render
    would show it."""
    for rig in bpy.context.scene.objects:
        for bone in rig.pose.bones if rig.type == 'ARMATURE' else ():
            if bone.custom_shape:
                bone.custom_shape.hide_render = True


def missing_pictures():
    """The names of the textures that a model asks for and that are not there."""
    missing = []
    for image in bpy.data.images:
        if image.source == 'FILE' and not image.packed_file and image.filepath:
            path = Path(bpy.path.abspath(image.filepath))
            if not path.is_file():
                missing.append(path.name)
    return sorted(missing)


def shown_meshes():
    """The meshes that a render would show."""
    return [o for o in bpy.context.scene.objects if o.type == 'MESH' and not o.hide_render]


def corners():
    """Points (x, y, z) of all meshes as they are posed, in world coordinates: their vertices and,
    where edges are long, points along these, so that no height is without any."""
    graph = bpy.context.evaluated_depsgraph_get()
    points, edges = [], []
    for shown in shown_meshes():
        posed = shown.evaluated_get(graph)
        mesh = posed.to_mesh()
        placed = [posed.matrix_world @ vertex.co for vertex in mesh.vertices]
        points += placed
        edges += [[placed[k] for k in edge.vertices] for edge in mesh.edges]
        posed.to_mesh_clear()
    if not points:
        return []
    heights = [point.z for point in points]
    step = max(max(heights) - min(heights), 1e-6) / SLICES
    for a, b in edges:
        parts = math.ceil(abs(a.z - b.z) / step)
        points += [a.lerp(b, k / parts) for k in range(1, parts)]
    return points


def head_bone():
    """The lower end of the head's bone in world coordinates, or None."""
    for rig in bpy.context.scene.objects:
        if rig.type != 'ARMATURE':
            continue
        names = [bone.name for bone in rig.pose.bones]
        plain = [name for name in names if name.lower().split(':')[-1].strip('_ ') == 'head']
        other = [name for name in names if 'head' in name.lower() and 'end' not in name.lower()]
        for name in [*plain, *other]:
            return rig.matrix_world @ rig.pose.bones[name].head
    return None


def frame(points):
    """Where the head is: (its middle x, y, its lower end z, its height), of posed points."""
    top = max(point.z for point in points)
    bone = head_bone()
    if bone and bone.z < top:
        return bone.x, bone.y, bone.z, top - bone.z

    # Without a skeleton: the head is the upper part, until the neck is the narrowest place.
    bottom = min(point.z for point in points)
    widths = []
    for k in range(SLICES):
        low = top - (top - bottom) * (k + 1) / SLICES
        high = top - (top - bottom) * k / SLICES
        xs = [point.x for point in points if low <= point.z < high]
        widths.append(max(xs) - min(xs) if xs else 0.0)
    neck = neck_of(widths)
    chin = top - (top - bottom) * neck / SLICES
    head = [point for point in points if point.z >= chin]
    x, y = (middle_of([point[axis] for point in head]) for axis in (0, 1))
    return x, y, chin, top - chin


def middle_of(values):
    return (min(values) + max(values)) / 2


def neck_of(widths):
    """The slice, counted from the top, at which a person of these widths has the neck: the first
    place that is narrower than the head above it and much narrower than the shoulders below it or,
    where hair hides it, just above where it suddenly is much wider. Further down a whole body is
    wider still, of hands and hips."""
    head = neck = 0
    for k, width in enumerate(widths):
        if width > WIDER * widths[neck] and widths[neck] < 0.9 * widths[head]:
            return neck
        if k > 8 and width > WIDER * widths[k - 4]:  # and not the round top of the head
            return k - 4
        if width >= widths[head]:
            head = neck = k
        elif width < widths[neck]:
            neck = k

    # No neck is to be seen: a head is a third of a bust, whose lower end is wide,
    # and 2 / 15 of a whole body.
    lowest = max(widths[-len(widths) // 10:])
    share = 1 / 3 if lowest > 0.7 * max(widths) else 2 / 15
    return max(1, round(share * len(widths)))


def place(points):
    """Moves the character so that its head and shoulders fill the unit cube."""
    x, y, chin, height = frame(points)
    to_origin = Matrix.Translation(-Vector((x, y, chin)))
    scaled = Matrix.Scale((TOP - CHIN) / height, 4)
    move(Matrix.Translation((0, 0, CHIN)) @ scaled @ to_origin)


def move(matrix):
    """Moves everything in the scene."""
    for thing in bpy.context.scene.objects:
        if thing.parent is None:
            thing.matrix_world = matrix @ thing.matrix_world
    bpy.context.view_layer.update()


def turn(degrees):
    """Turns everything about the vertical, to the left."""
    move(Matrix.Rotation(math.radians(degrees), 4, 'Z'))


def close(mesh, cut, axis):
    """Closes what a plane across an axis has cut, by elements `cut`, so that nobody looks into a
    hollow body; the new faces have the material and the colours of what is beside them."""
    import bmesh
    points = [element for element in cut if isinstance(element, bmesh.types.BMVert)]
    if not points:
        return
    height = points[0].co[axis]
    bmesh.ops.remove_doubles(mesh, verts=points, dist=1e-5)  # seams of textures are open

    def is_cut(edge):
        return edge.is_boundary and all(abs(end.co[axis] - height) < 1e-5 for end in edge.verts)

    edges = [edge for edge in mesh.edges if is_cut(edge)]
    made = bmesh.ops.edgeloop_fill(mesh, edges=edges)['faces']
    for face in made:
        for loop in face.loops:
            beside = [other for other in loop.vert.link_loops if other.face not in made]
            if beside:
                loop.copy_from(beside[0])
                face.material_index = beside[0].face.material_index


def keep_inside(shown, graph, box):
    """Replaces a mesh by what of it, as it is posed, is inside the cube [-box, box]^3."""
    import bmesh
    posed = shown.evaluated_get(graph)
    mesh = bmesh.new()
    mesh.from_mesh(posed.to_mesh())
    mesh.transform(posed.matrix_world)
    for axis in range(3):
        for sign in (-1.0, 1.0):
            point, normal = [0.0] * 3, [0.0] * 3
            point[axis], normal[axis] = sign * box, sign
            geometry = [*mesh.verts, *mesh.edges, *mesh.faces]
            cut = bmesh.ops.bisect_plane(
                mesh, geom=geometry, plane_co=point, plane_no=normal, clear_outer=True
            )['geom_cut']
            close(mesh, cut, axis)
    still = bpy.data.meshes.new(shown.name)
    mesh.to_mesh(still)
    mesh.free()
    for material in posed.data.materials:
        still.materials.append(material)
    replacement = bpy.data.objects.new(shown.name, still)
    bpy.context.scene.collection.objects.link(replacement)
    shown.hide_render = True


# Pictures -----------------------------------------------------------------------------------------
def make_dull(tree, node):
    """Makes a material neither shine nor look like metal."""
    for name, value in (('Metallic', 0.0), ('Specular IOR Level', 0.0), ('Roughness', 1.0)):
        socket = node.inputs[name]
        for link in list(socket.links):
            tree.links.remove(link)
        socket.default_value = value


def light():
    """Even white light from all around, none of the scene's own, and surfaces that do not shine:
    colours are then the same from all sides."""
    scene = bpy.context.scene
    for material in bpy.data.materials:
        for node in material.node_tree.nodes if material.node_tree else ():
            if node.type == 'BSDF_PRINCIPLED':
                make_dull(material.node_tree, node)
    for thing in scene.objects:
        if thing.type == 'LIGHT':
            thing.hide_render = True
    world = bpy.data.worlds.new('even')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # from version 5 on it is so by itself
        world.use_nodes = True
    background = world.node_tree.nodes['Background'].inputs
    background['Color'].default_value = (1, 1, 1, 1)
    background['Strength'].default_value = 1.0
    scene.world = world


def prepare(size, samples):
    """Sets up camera and renderer for square RGBA pictures of so many pixels a side."""
    scene = bpy.context.scene
    scene.render.engine = 'CYCLES'
    scene.cycles.samples = samples
    scene.cycles.use_denoising = False
    scene.cycles.max_bounces = 4
    scene.render.resolution_x = scene.render.resolution_y = size
    scene.render.resolution_percentage = 100
    scene.render.film_transparent = True
    scene.render.image_settings.file_format = 'PNG'
    scene.render.image_settings.color_mode = 'RGBA'
    scene.view_settings.view_transform = 'Standard'
    scene.view_settings.look = 'None'
    scene.render.use_persistent_data = True
    scene.render.use_border = False
    camera = bpy.data.objects.new('portraits', bpy.data.cameras.new('portraits'))
    camera.data.angle = math.radians(FOV)
    camera.data.sensor_fit = 'HORIZONTAL'
    scene.collection.objects.link(camera)
    scene.camera = camera
    return camera


def take(camera, view, path):
    """Renders one view, (azimuth, elevation), into a file; returns the camera's pose."""
    pose = camera_pose(*view)
    camera.matrix_world = Matrix(pose)
    bpy.context.scene.render.filepath = str(path)
    bpy.ops.render.render(write_still=True)
    return pose


def render(path, folder, args, say):
    """Renders one character into its folder, which appears when all is there."""
    load(path, args.up)
    if path.suffix.lower() == '.vrm' and vrm_looks_back(path):
        turn(180)
    turn(args.turn)
    hide_bone_shapes()
    points = corners()
    if len(points) < 4:
        raise RuntimeError('it has no mesh')

    place(points)
    graph = bpy.context.evaluated_depsgraph_get()
    for k, shown in enumerate(shown_meshes()):
        keep_inside(shown, graph, BOX - 1e-3 * k)  # so that no two ends lie in one plane
    light()
    camera = prepare(args.size, args.samples)

    unfinished = folder.with_name(f'.{folder.name}.tmp')
    (unfinished / 'train').mkdir(parents=True, exist_ok=True)
    (unfinished / 'test').mkdir(exist_ok=True)
    done = 0
    views = {
        'train': [PORTRAIT, *spread(args.views - 1, 0)],
        'test': spread(args.test, 77),
    }
    for split, of_split in views.items():
        frames = []
        for k, view in enumerate(of_split):
            name = f'{split}/{k:03d}'
            pose = take(camera, view, unfinished / f'{name}.png')
            frames.append({'file_path': name, 'transform_matrix': pose})
            done += 1
            say(done)
        content = {'camera_angle_x': math.radians(FOV), 'frames': frames}
        content['aabb'] = [[-1] * 3, [1] * 3]
        text = json.dumps(content, indent=1)
        (unfinished / f'transforms_{split}.json').write_text(text)
    shutil.copy(unfinished / 'train/000.png', unfinished / 'portrait.png')
    os.replace(unfinished, folder)


# The command --------------------------------------------------------------------------------------
def models_in(path):
    """The files of characters in a folder, sorted, or the one that the path is."""
    if path.is_file() and path.suffix.lower() in SUFFIXES:
        return [path]
    if not path.is_dir():
        stop(f'--models {path}: give a folder of {" ".join(SUFFIXES)}')
    found = sorted(file for file in path.rglob('*') if file.suffix.lower() in SUFFIXES)
    if not found:
        stop(f'--models {path}: there is no {" ".join(SUFFIXES)} in it')
    return found


def folders_of(paths, data):
    """A folder for each file, named as it is; two of one name get their suffix, too."""
    stems = [path.stem for path in paths]
    folders = []
    for path in paths:
        name = path.stem
        if stems.count(name) > 1:
            name = f'{path.parent.name}-{path.stem}-{path.suffix[1:]}'
        folders.append(data / name)
    return folders


def quietly(work):
    """Runs work() without what Blender prints; returns what it raised, or None."""
    sys.stdout.flush()
    with silence(1):
        try:
            work()
            return None
        except (RuntimeError, ValueError, KeyError, OSError, SystemError) as error:
            return error
        finally:
            sys.stdout.flush()


def main(args):
    if bpy is None:
        stop('render_blender.py runs in Blender, or needs the bpy package: pip install bpy '
             f'({WITHOUT})')
    if min(args.views, args.test, args.samples) < 1 or args.size < 16:
        stop('--views, --test and --samples must be at least 1, --size 16')
    paths = models_in(args.models)
    args.data.mkdir(parents=True, exist_ok=True)
    total = args.views + args.test
    failed = 0
    for k, (path, folder) in enumerate(zip(paths, folders_of(paths, args.data)), 1):
        head = f'[{k}/{len(paths)}] {path.name}'
        if folder.is_dir():
            print(f'{head}: is there', file=sys.stderr)
            continue
        began = time.monotonic()

        def say(done, head=head, began=began):
            if sys.stderr.isatty():
                seconds = time.monotonic() - began
                line = f'\r{head}: view {done} of {total}, {seconds:.0f} s'
                print(line, end='', file=sys.stderr, flush=True)

        error = quietly(functools.partial(render, path, folder, args, say))
        seconds = time.monotonic() - began
        end = f'{seconds:.0f} s'
        if not error and missing_pictures():
            end += f', without {", ".join(missing_pictures())}, not found'
        if error:
            end = f'left out ({(str(error).strip().splitlines() or [repr(error)])[-1]})'
        failed += bool(error)
        print(f'\r{head}: {end}          ', file=sys.stderr)
    made = len(paths) - failed
    print(f'{made} of {len(paths)} characters are in {args.data}; next: '
          f'python fit.py --decoder --data {args.data}')
    if not made:
        raise SystemExit(1)


def parse(argv=None):
    if argv is None:
        argv = sys.argv[1:]
        if '--' in argv:  # Blender's own options are before it
            argv = argv[argv.index('--') + 1:]
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument('--models', type=Path, required=True, help='a folder, or one file')
    p.add_argument('--data', type=Path, default=Path('data'))
    p.add_argument('--views', type=int, default=30, help='for training')
    p.add_argument('--test', type=int, default=6, help='held-out views')
    p.add_argument('--size', type=int, default=256, help='pixels a side')
    p.add_argument('--turn', type=float, default=0, metavar='DEGREES', help='of all characters, if '
                   'they do not look to the front')
    p.add_argument('--up', choices=('Y', 'Z'), default='Y', help='what is up in .obj files')
    p.add_argument('--samples', type=int, default=32, help='light paths a pixel')
    return p.parse_args(argv)


if __name__ == '__main__':
    main(parse())
