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
import rodinhd as rh
import running
import scenes
import splats
import words


def make(models, paths, sentence, tell):
    """Makes an avatar of each image file, or of a sentence; yields {name in `page`: what there is
    of it}. tell((done, total), desc=what) hears of the work."""
    folder = Path(tempfile.mkdtemp(prefix='rodinhd-'))
    config, decoder = models['base'].config, models['decoder']
    if not paths:  # a sentence
        paths = [folder / 'prompt.png']
        export.save_image(paths[0], words.portrait_of(sentence), tag=True)
    crops, turns, files = ([] for _ in range(3))
    for k, path in enumerate(paths):
        rgb, alpha, known = photo.read(path, config.portrait)
        images = scenes.portrait_on_white(rgb, alpha)[None]
        yield {'crop': crops + pictures.pil_images(images)}
        planes = likeness.avatars_of(
            models, images, None, alpha[None], known[None],
            progress=running.Count(tell, 'sampling').steps,
            report=running.Count(tell, 'fitting', config.likeness_steps).update)
        crops += pictures.pil_images(images)
        turns.append(pictures.turn_of(planes[0], decoder))
        names = pictures.write_grid(folder, turns, crops)
        names += pictures.write_viewers(folder, turns, crops, 12)
        yield {'picture': str(folder / 'grid.png'),
               'viewer': ''.join(export.embedded(folder / name) for name in names[1:])}
        mesh = meshes.mesh_of(*turns[k].avatar, triangles=10000, texture=meshes.TEXTURE)
        files += meshes.write_mesh(folder / f'avatar{k}.glb', mesh)
        files += splats.write_splats(folder / f'splats{k}.ply', splats.splats_of(*turns[k].avatar))
    names += pictures.write_turntable(folder, turns, 36, running.Count(tell, 'turning', 36))
    files = map(str, (*files, *(folder / name for name in names)))
    yield {'turning': str(folder / 'turntable.webp'), 'files': list(files)}


def page(models):
    try:
        import gradio as gr
    except ImportError:
        rh.stop('the page needs the gradio package: pip install gradio')
    with gr.Blocks(title='RodinHD', analytics_enabled=False) as blocks:
        inputs = [gr.File(label='Photographs', file_count='multiple', file_types=['image']),
                  gr.Textbox(label='or a sentence, such as: a man with a red beard')]
        button = gr.Button('Make avatars', variant='primary')
        places = {'crop': gr.Gallery(label='What the model sees', height=280),
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


def parse(argv=None):
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--port', type=int, default=7860)
    return p.parse_args(argv)


if __name__ == '__main__':
    page(running.load_models()).launch(server_name='127.0.0.1', server_port=parse().port)
