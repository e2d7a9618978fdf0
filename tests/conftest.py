"""What all tests share: the project's modules, a seed, and two small avatars drawn once."""
import os
import sys
from pathlib import Path

# One of several processes, each on a core: PyTorch and the tests' own processes read this
if 'PYTEST_XDIST_WORKER' in os.environ:
    os.environ.setdefault('OMP_NUM_THREADS', '1')

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import avatars  # noqa: E402
import likeness  # noqa: E402
import rodinhd as rh  # noqa: E402


@pytest.fixture(autouse=True)
def seeded():
    """Seeds PyTorch before each test."""
    torch.manual_seed(0)


@pytest.fixture(scope='session')
def data(tmp_path_factory):
    """A folder with two avatars of 64 x 64 pixels, 24 training and 4 held-out views."""
    folder = tmp_path_factory.mktemp('avatars') / 'data'
    avatars.main(avatars.parse(['--preset', 'tiny', '--count', '2', '--data', str(folder)]))
    return folder


@pytest.fixture(scope='session')
def tiny():
    """The Config of the preset for tests."""
    return rh.make_config('tiny')


@pytest.fixture(scope='module')
def brief_descent():
    """Sampling goes towards a portrait in two steps of few rays; test_likeness.py has all of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(likeness, 'TOWARDS_STEPS', 2)
        patch.setattr(likeness, 'TOWARDS_RAYS', 64)
        yield
