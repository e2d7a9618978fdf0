"""Counts what a GPU would be given: the operations of PyTorch that start kernels, and those for
which the host has to wait. It works on a CPU, by what passes PyTorch's dispatcher."""
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

NO_KERNEL = {  # besides views
    'alias', 'detach', 'empty', 'empty_like', 'empty_strided', 'lift_fresh', 'new_empty',
    'new_empty_strided', 'resize_', '_record_function_enter_new', '_record_function_exit',
    '_reshape_alias', '_unsafe_view',
}
WAITS = {'_local_scalar_dense', 'equal', 'is_nonzero', 'masked_select', 'nonzero'}


class Counting(TorchDispatchMode):
    """Counts in a block, by name: `kernels`, and those of them that are `waits`."""
    def __init__(self):
        super().__init__()
        self.kernels = Counter()
        self.waits = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.partition('::')[2]
        aliases = [x.alias_info for x in func._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in aliases)
        if not is_view and name not in NO_KERNEL:
            self.kernels[name] += 1
        if name in WAITS or (name.strip('_').startswith('index') and has_mask(args)):
            self.waits[name] += 1
        return func(*args, **(kwargs or {}))


def has_mask(args):
    """Whether an index is a mask, whose length only the device knows."""
    indices = args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else ()
    return any(torch.is_tensor(x) and x.dtype == torch.bool for x in indices)
