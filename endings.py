"""How a program ends: in one line, by an error as by Ctrl-C and SIGTERM.

It imports the standard library alone, and scripts import it before PyTorch, which takes seconds.
"""
import os
import signal
import sys
import threading


def is_stop(kind):
    """Whether an exception is rodinhd.Stop, which imports PyTorch."""
    method = sys.modules.get('rodinhd')
    return method is not None and issubclass(kind, method.Stop)


def one_line(kind, error, trace):
    """sys.excepthook of all scripts: rodinhd.Stop, a full disk, a folder in place of a file, too
    little memory and Ctrl-C are said in one line."""
    if is_stop(kind):  # from a process of a DataLoader it comes with its trace: the last line is it
        last = str(error).splitlines()[-1].removeprefix('rodinhd.Stop: ')
        print(f'error: {last}', file=sys.stderr)
    elif not issubclass(kind, (OSError, MemoryError, KeyboardInterrupt)):
        sys.__excepthook__(kind, error, trace)
    elif issubclass(kind, MemoryError):
        print('error: out of memory', file=sys.stderr)
    elif str(error):
        print(f'error: {error}', file=sys.stderr)
    else:
        print('interrupted; the same command goes on after the last file written', file=sys.stderr)


def interrupt(number, frame):
    """Makes SIGTERM end a program as Ctrl-C does: what it has half written is removed."""
    raise KeyboardInterrupt


def install():
    """One of several ranks waits for others where Python cannot interrupt it, so it has to die at
    once; the next run removes what it has half written."""
    sys.excepthook = one_line
    alone = os.environ.get('WORLD_SIZE', '1') == '1'
    if alone and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, interrupt)


install()
