"""A page: photographs or a sentence in, avatars out. `pip install gradio`, then `python app.py`."""
import argparse
import tempfile
from pathlib import Path

import endings  # noqa: F401  # isort: skip  # before PyTorch, whose import takes seconds
import export
import likeness
import meshes
import photo
import pictures
import rodin
import rodinhd as rh
import running
import scenes
import splats


def make(models, paths, sentence, tell):
    """Makes an avatar of each image file, or of a sentence; yields {name in `page`: what there is
    of it}. tell((done, total), desc=what) hears of the work."""
    folder = Path(tempfile.mkdtemp(prefix='rodinhd-'))
    config, decoder = models['base'].config, models['decoder']
    crops = []
    turns = []
    files = []
    for k, path in enumerate(paths or [None]):  # None: a sentence
        if path is None:
            running.load_latents(models, 'text')
            planes = rodin.planes_of(models, sentence or '')
        else:
            rgb, alpha, known = photo.read(path, config.portrait)
            images = scenes.portrait_on_white(rgb, alpha)[None]
            crops += pictures.pil_images(images)
            yield {'crop': crops}
            planes = likeness.avatars_of(
                models, images, None, alpha[None], known[None],
                report=running.Count(tell, 'fitting', config.likeness_steps).update,
                progress=running.Count(tell, 'sampling').steps)
        turns.append(pictures.turn_of(planes[0], decoder))
        names = pictures.write_grid(folder, turns, crops)
        yield {'picture': str(folder / 'grid.png')}
        names += pictures.write_viewers(folder, turns, crops, 12)
        yield {'viewer': ''.join(export.embedded(folder / name) for name in names[1:])}
        mesh = meshes.mesh_of(*turns[k].avatar, triangles=10000, texture=meshes.TEXTURE)
        files += meshes.write_mesh(folder / f'avatar{k}.glb', mesh)
        files += splats.write_splats(folder / f'splats{k}.ply', splats.splats_of(*turns[k].avatar))
    names += pictures.write_turntable(folder, turns, 36, running.Count(tell, 'turning', 36))
    files += [folder / name for name in names]
    yield {'turning': str(folder / 'turntable.webp'), 'files': [str(path) for path in files]}


def page(models):
    try:
        import gradio as gr
    except ImportError:
        rh.stop('the page needs the gradio package: pip install gradio')
    with gr.Blocks(title='RodinHD', analytics_enabled=False) as blocks:
        inputs = [gr.File(label='Photographs', file_count='multiple', file_types=['image']),
                  gr.Textbox(label='or a sentence, such as: a man with red hair in a green shirt')]
        button = gr.Button('Make avatars', variant='primary')
        places = {'crop': gr.Gallery(label='What the model sees', height=280, object_fit='contain'),
                  'picture': gr.Image(label='The avatar', format='png'), 'viewer': gr.HTML(),
                  'turning': gr.Image(label='It turns, and is synthetic'),
                  'files': gr.File(label='To download', file_count='multiple')}
        def work(paths, sentence, progress=gr.Progress()):  # noqa: B008
            try:
                for found in make(models, paths, sentence, progress):
                    yield {places[name]: value for name, value in found.items()}
            except rh.Stop as stopped:
                raise gr.Error(str(stopped)) from None
        button.click(work, inputs, list(places.values()))
    return blocks


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--port', type=int, default=7860)
    port = parser.parse_args().port
    page(running.load_models()).launch(server_name='127.0.0.1', server_port=port)
