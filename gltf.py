"""glTF 2.0 in one binary file (.glb): what Blender, three.js, model-viewer and phones read."""
import io
import json
import struct

import numpy as np

import running

FLOAT = 5126
UNSIGNED_INT = 5125
UNSIGNED_SHORT = 5123
COMPONENTS = {'float32': FLOAT, 'uint32': UNSIGNED_INT, 'uint16': UNSIGNED_SHORT}
TYPES = {1: 'SCALAR', 2: 'VEC2', 3: 'VEC3', 4: 'VEC4'}
ARRAY_BUFFER, ELEMENT_ARRAY_BUFFER = 34962, 34963
POINTS = 0
UNLIT = 'KHR_materials_unlit'
SPLATS = 'KHR_gaussian_splatting'


def linear(colours):
    """Returns colours (N, 3) in 0..1, as they look, as glTF wants them of vertices: linear, with
    alpha, in 16 bits, (N, 4) uint16."""
    dark = colours / 12.92
    bright = ((colours + 0.055) / 1.055) ** 2.4
    light = np.where(colours <= 0.04045, dark, bright)
    opaque = np.concatenate([light, np.ones((len(light), 1))], axis=1)
    return (opaque * 65535).round().astype(np.uint16)


class Asset:
    """A glTF asset that grows: its JSON, and the bytes that this refers to."""
    def __init__(self):
        self.json = {
            'asset': {'version': '2.0', 'generator': 'RodinHD in PyTorch'},
            'scene': 0,
            'scenes': [{'nodes': [0]}],
            'nodes': [{'mesh': 0, 'name': 'avatar'}],
            'accessors': [],
            'bufferViews': [],
        }
        self.bytes = bytearray()

    def add_bytes(self, data, **how):
        """Adds a buffer view of so many bytes; returns its index."""
        view = {'buffer': 0, 'byteOffset': len(self.bytes), 'byteLength': len(data), **how}
        self.bytes += data + bytes(-len(data) % 4)
        self.json['bufferViews'].append(view)
        return len(self.json['bufferViews']) - 1

    def add(self, array, target=ARRAY_BUFFER, **how):
        """Adds an accessor of an array (N,) or (N, 2..4), 64-bit floats as 32-bit ones; returns
        its index."""
        if array.dtype == np.float64:
            array = array.astype(np.float32)
        width = array.shape[1] if array.ndim == 2 else 1
        accessor = {
            'bufferView': self.add_bytes(array.tobytes(), target=target),
            'componentType': COMPONENTS[array.dtype.name],
            'count': len(array),
            'type': TYPES[width],
            **how,
        }
        self.json['accessors'].append(accessor)
        return len(self.json['accessors']) - 1

    def add_attributes(self, attributes):
        """Adds arrays by the names of vertex attributes -> {name: index}."""
        indices = {}
        for name, array in attributes.items():
            how = {}
            if name == 'POSITION':
                array = array.astype(np.float32)
                how = {'min': array.min(0).tolist(), 'max': array.max(0).tolist()}
            if array.dtype == np.uint16:
                how = {'normalized': True}
            indices[name] = self.add(array, **how)
        return indices

    def add_texture(self, image):
        """Adds a PIL image as a texture; returns its index."""
        with io.BytesIO() as file:
            image.save(file, 'PNG')
            view = self.add_bytes(file.getvalue())
        self.json['images'] = [{'bufferView': view, 'mimeType': 'image/png'}]
        self.json['textures'] = [{'source': 0}]
        return 0

    def use(self, extension):
        self.json.setdefault('extensionsUsed', []).append(extension)


def of_mesh(attributes, faces, texture=None):
    """Makes an Asset of a mesh: arrays by the names of vertex attributes, faces (F, 3), and a PIL
    image. Its material is no metal, and unlit: light is in its colours."""
    asset = Asset()
    shown = {'metallicFactor': 0.0, 'roughnessFactor': 1.0}
    if texture is not None:
        shown['baseColorTexture'] = {'index': asset.add_texture(texture)}
    material = {
        'name': 'avatar',
        'pbrMetallicRoughness': shown,
        'extensions': {UNLIT: {}},
    }
    asset.use(UNLIT)
    primitive = {
        'attributes': asset.add_attributes(attributes),
        'indices': asset.add(faces.astype(np.uint32).ravel(), ELEMENT_ARRAY_BUFFER),
        'material': 0,
    }
    asset.json['materials'] = [material]
    asset.json['meshes'] = [{'primitives': [primitive], 'name': 'avatar'}]
    return asset


def of_splats(attributes):
    """Makes an Asset of splats: arrays by the names of attributes, those of the extension too."""
    asset = Asset()
    asset.use(SPLATS)
    how = {'kernel': 'ellipse', 'colorSpace': 'srgb_rec709_display'}
    primitive = {
        'mode': POINTS,
        'attributes': asset.add_attributes(attributes),
        'extensions': {SPLATS: how},
    }
    asset.json['meshes'] = [{'primitives': [primitive], 'name': 'avatar'}]
    return asset


def write(path, asset):
    """Writes an Asset, whole or not at all."""
    asset.json['buffers'] = [{'byteLength': len(asset.bytes)}]
    head = json.dumps(asset.json, separators=(',', ':')).encode()
    head += b' ' * (-len(head) % 4)
    chunks = struct.pack('<I4s', len(head), b'JSON') + head
    chunks += struct.pack('<I4s', len(asset.bytes), b'BIN\0') + asset.bytes
    with running.atomic(path) as temporary:
        temporary.write_bytes(struct.pack('<4sII', b'glTF', 2, 12 + len(chunks)) + chunks)
