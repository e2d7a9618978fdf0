"""Avatars as they turn: the grid, the turntable, the strip and the viewer that sample.py writes.

A picture is an array (H, W, 3) uint8.
"""
import math
from typing import NamedTuple

import numpy as np
from PIL import Image

import export
import frozen
import rodinhd as rh
from refiner import side_of

ELEVATION = 5  # of the turntable's camera, degrees
SIDES = (0, 320, 40, 270, 90, 180)  # azimuths of the grid's views, degrees
STRIP = (0, 50)  # azimuths of the strip's rows
VIEWER_FRAMES = 12  # at most


class Avatar(NamedTuple):
    """An avatar to be drawn."""

    field: frozen.Frozen
    grid: rh.OccupancyGrid


def avatar_of(planes, decoder, config):
    """Makes planes (3, C, R, R) an Avatar. Haze is not drawn: the threshold is the paper's."""
    field = frozen.freeze(planes, decoder, threshold=10 * config.steps / 1024)
    return Avatar(field, field.grid)


def turn_of(planes, decoder, size=256, tag=True):
    """The Turn of planes (3, C, R, R)."""
    return Turn(avatar_of(planes, decoder, decoder.config), size, tag)


# Views --------------------------------------------------------------------------------------------
class Turn:
    """The views of an avatar from all around, each of which is drawn once; with `tag` each says
    that it is synthetic. A `refiner` makes each view of a smaller one (refiner.py)."""
    def __init__(self, avatar, size, tag=False, refiner=None):
        self.avatar = avatar
        self.size = size
        self.refiner = refiner
        self.tag = tag
        self.drawn = {}  # by azimuth, degrees

    def __call__(self, azimuth):
        """Returns the picture from a side."""
        azimuth = azimuth % 360
        if azimuth not in self.drawn:
            picture = draw(self.avatar, azimuth, self.size, self.refiner)
            self.drawn[azimuth] = export.tagged(picture) if self.tag else picture
        return self.drawn[azimuth]


def draw(avatar, azimuth, size, refiner=None):
    """Draws one view of an avatar as it turns."""
    if refiner is not None:
        size = side_of(size, refiner)
    device = avatar.grid.values.device
    pose = rh.orbit_pose(azimuth, ELEVATION).to(device)
    intrinsics = rh.intrinsics_of(rh.PORTRAIT_FOV, size).to(device)
    view = frozen.render_view(avatar.field, pose, intrinsics, size, size).rgb
    if refiner is not None:
        view = refiner.refine(view)
    return (view * 255).round().byte().cpu().numpy()


def around(count):
    """So many azimuths from all around, in degrees."""
    return [360 * k / count for k in range(count)]


# Layout -------------------------------------------------------------------------------------------
def beside(pictures):
    return np.concatenate(pictures, axis=1)


def below(pictures):
    return np.concatenate(pictures, axis=0)


def tiled(pictures):
    """Lays pictures of one size out in about as many rows as columns; gaps are white."""
    rows = max(1, int(len(pictures) ** 0.5))
    columns = math.ceil(len(pictures) / rows)
    missing = -len(pictures) % columns
    pictures = pictures + [np.full_like(pictures[0], 255)] * missing
    starts = range(0, len(pictures), columns)
    return below([beside(pictures[i : i + columns]) for i in starts])


def pil_images(images):
    """Images (B, 3, P, P) in [-1, 1], or None for none, as a list of PIL images."""
    if images is None:
        return []
    pixels = ((images + 1) * 127.5).round().byte()
    return [Image.fromarray(x) for x in pixels.permute(0, 2, 3, 1).cpu().numpy()]


def portrait_of(portraits, k, count):
    """The portrait of the k-th of so many avatars, or None where there are no portraits."""
    return portraits[k * len(portraits) // count] if portraits else None


# Files --------------------------------------------------------------------------------------------
def save_rows(path, rows, turns):
    """Writes rows of pictures of these Turns as one picture."""
    export.save_image(path, Image.fromarray(below(rows)), turns[0].tag)


def write_grid(folder, turns, portraits):
    """Writes grid.png, a row for each Turn: its portrait (PIL images; may be none) and SIDES."""
    rows = []
    for k, turn in enumerate(turns):
        row = [turn(side) for side in SIDES]
        portrait = portrait_of(portraits, k, len(turns))
        if portrait:
            resized = portrait.resize((turn.size, turn.size), Image.LANCZOS)
            row.insert(0, np.asarray(resized))
        rows.append(beside(row))
    save_rows(folder / 'grid.png', rows, turns)
    return ['grid.png']


def write_viewers(folder, turns, portraits, frames, title='', meshes=()):
    """Writes a viewer of each Turn, with so many frames of it, but at most VIEWER_FRAMES.

    title: of the pages. meshes: paths of as many files, or none, that the pages let one download.
    """
    names = []
    for k, turn in enumerate(turns):
        views = [Image.fromarray(turn(side)) for side in around(min(frames, VIEWER_FRAMES))]
        portrait = portrait_of(portraits, k, len(turns))
        field, grid = turn.avatar
        names.append(export.numbered('viewer.html', k))
        path = folder / names[-1]
        tag = export.TAG if turn.tag else ''
        mesh = meshes[k] if meshes else None
        export.write_viewer(
            path, field.planes, field.decoder, grid, views, portrait, title, tag, mesh
        )
    return names


def write_turntable(folder, turns, frames, bar):
    """Writes turntables of so many frames, with all Turns beside one another."""
    drawn = []
    for side in around(frames):
        drawn.append(tiled([turn(side) for turn in turns]))
        bar.update()
    return export.save_animation(folder, drawn, turns[0].tag)


def write_strip(folder, turns):
    """Writes strip.png, with front and side of each Turn."""
    rows = [beside([turn(side) for turn in turns]) for side in STRIP]
    save_rows(folder / 'strip.png', rows, turns)
    return ['strip.png']


def write_edits(folder, rows):
    """Writes edits.png: a row of fronts for each list of Turns."""
    fronts = [beside([turn(STRIP[0]) for turn in turns]) for turns in rows]
    save_rows(folder / 'edits.png', fronts, rows[0])
    return ['edits.png']


def write_passage(folder, turns, frames, bar):
    """Writes turntables of so many frames, in which the first Turn becomes the last."""
    drawn = []
    for k, side in enumerate(around(frames)):
        drawn.append(turns[k * len(turns) // frames](side))
        bar.update()
    return export.save_animation(folder, drawn, turns[0].tag)
