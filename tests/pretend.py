"""A second device for machines that have none: PyTorch's spare device 'pretend', whose memory is the CPU's.

Every operation runs, by its CPU kernel, so numbers are real; but its tensors are another device's to PyTorch and to
everybody who asks: to mix them with the CPU's, to make a numpy array of one, or to leave a network behind raises what a
GPU would raise. Autocast lowers what takes the time, not all that CUDA's does. Nothing here is asynchronous.
"""
import ctypes, sys
from contextlib import contextmanager
from functools import partial

import torch
from torch.library import Library, fallthrough_kernel
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = 'pretend'
EXTERNAL = 12  # DLPack's code of a device of somebody else's
CPU = torch.device('cpu')
CPU_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
AS_STRIDED = torch.ops.aten.as_strided.default


# ---------------------------------------------------------------- memory
# A CPU tensor, handed over as one of the device by DLPack.

_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]

def _there(x):
    "A CPU tensor of ours as one of the device, with its memory and strides."
    capsule = torch._C._to_dlpack(x)
    # the first two fields: where the numbers are, and the type of their device
    device_type = ctypes.c_int32.from_address(_pointer(capsule, b'dltensor') + ctypes.sizeof(ctypes.c_void_p))
    device_type.value = EXTERNAL
    return torch._C._from_dlpack(capsule)

def _set_(x, storage, offset, shape, strides=()):
    op = torch.ops.aten.set_.source_Storage_storage_offset
    return op.redispatch(CPU_KEYS, x, storage, offset, shape, strides)

def _set(x, y):
    "Make `x` what `y` is."
    _set_(x, y.untyped_storage(), y.storage_offset(), y.shape, y.stride())

def _here(x):
    "The same memory as a CPU tensor."
    s = x.untyped_storage()
    if not s.nbytes(): return torch.empty(x.shape, dtype=x.dtype)
    s = torch._C._construct_storage_from_data_pointer(s.data_ptr(), CPU, s.nbytes())
    return torch.empty(0, dtype=x.dtype).set_(s, x.storage_offset(), x.shape, x.stride())


# ---------------------------------------------------------------- operations

def _is_there(x): return isinstance(x, torch.Tensor) and not x.is_cpu and x.device.type == NAME

def _tensors(xs, out):
    for x in xs:
        if isinstance(x, torch.Tensor): out.append(x)
        elif type(x) in (tuple, list): _tensors(x, out)
    return out

def _check_devices(op, args, kwargs):
    "Indices of what is on the device may be the CPU's, in a list; so may tensors without a dimension."
    indexed = 'index' in op._schema.name and isinstance(args[1], (tuple, list)) and _is_there(args[0])
    look = (args[0], args[2:]) if indexed else args
    devices = {x.device.type for x in _tensors((look, tuple(kwargs.values())), []) if x.dim() or _is_there(x)}
    if len(devices) > 1:
        found = ' and '.join(sorted(devices))
        expected = 'Expected all tensors to be on the same device, but found at least two devices'
        raise RuntimeError(f'{expected}, {found}! ({op})')

def _lowered_one(x, pairs, elsewhere):
    "An argument for the CPU's kernel. Notes tensors of the device with the CPU's of the same memory, and all others."
    if isinstance(x, torch.Tensor):
        if _is_there(x):
            pairs.append((x, _here(x)))
            return pairs[-1][1]
        if x.dim(): elsewhere.append(x)
    elif type(x) in (tuple, list): return type(x)([_lowered_one(o, pairs, elsewhere) for o in x])
    elif isinstance(x, torch.device) and x.type == NAME: return CPU
    return x

def _lifted(c, pairs):
    "A result of the CPU's kernel as one of the device: a view of an argument, an argument itself, or new."
    if type(c) in (tuple, list): return type(c)([_lifted(o, pairs) for o in c])
    if not isinstance(c, torch.Tensor): return c
    for x,k in pairs:
        if c is k: return x
    memory = c.untyped_storage().data_ptr()
    for x,k in pairs:
        if memory and memory == k.untyped_storage().data_ptr():
            if x.dtype != c.dtype: x = torch.ops.aten.view.dtype.redispatch(CPU_KEYS, x, c.dtype)
            return AS_STRIDED.redispatch(CPU_KEYS, x, c.shape, c.stride(), c.storage_offset())
    return _there(c)

def _fallback(op, *args, **kwargs):
    """Run `op` on the same memory by the CPU's kernel.

    Called for every operation: it looks at each argument once, and keeps nothing alive (functions within that call
    themselves would, until the next collection, and weights that a graph holds cannot move).
    """
    pairs, elsewhere = [], []
    with torch._C.DisableTorchFunctionSubclass():
        lowered = [_lowered_one(x, pairs, elsewhere) for x in args]
        named = {k: _lowered_one(v, pairs, elsewhere) for k,v in kwargs.items()}
        if elsewhere: _check_devices(op, args, kwargs)
        out = op(*lowered, **named)
        for x,c in pairs:
            if c.numel() > x.numel() == 0: _set(x, _there(c))  # an empty one that was to be filled
        return _lifted(out, pairs)

def _copy_(self, src, non_blocking=False):
    with torch._C.DisableTorchFunctionSubclass():
        (_here(self) if _is_there(self) else self).copy_(_here(src) if _is_there(src) else src)
    return self

def _empty(shape, **kwargs): return _there(torch.empty(shape, **{**kwargs, 'device': CPU}))

def _same_memory(name):
    "A view, as the CPU makes it: its kernel looks at no number."
    op = getattr(torch.ops.aten, name).default
    return lambda *args: op.redispatch(CPU_KEYS, *args)

def _convolution(*args): return _fallback(torch.ops.aten.convolution.default, *args)

def _convolution_backward(grad, x, w, *rest):
    bias_sizes = None
    return _fallback(torch.ops.aten.convolution_backward.default, grad, x, w, bias_sizes, *rest)


# ---------------------------------------------------------------- what PyTorch does in C++
# with the memory of a device that it knows.

def _instead(cls, name, mine):
    "Let `mine` do what a method does, for what is on the device."
    theirs = getattr(cls, name)
    def method(self, *args, **kwargs):
        f = mine if self.device.type == NAME else theirs
        return f(self, *args, **kwargs)
    setattr(cls, name, method)

def _restored(storage, where):
    "A storage of a file, on the device if it is to go there."
    if not where.startswith(NAME): return None
    numbers = torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),), (1,))
    return _there(numbers).untyped_storage()

def _deepcopy(x, memo):
    copied = x.detach().clone().requires_grad_(x.requires_grad)
    return memo.setdefault(id(x), copied)

def _storage_on_cpu(storage):
    same = torch._C._construct_storage_from_data_pointer(storage.data_ptr(), CPU, storage.nbytes())
    return same.clone()

_OfCPU = torch.Generator

class _Generator(_OfCPU):
    "Random numbers of the device: the CPU's under another name."
    def __new__(cls, device='cpu'):
        self = super().__new__(cls)
        self.where = torch.device(device)
        return self
    @property
    def device(self): return self.where

class _GeneratorOf(type):
    def __instancecheck__(cls, x): return isinstance(x, _OfCPU)
    def __call__(cls, device='cpu'):
        of = _Generator if torch.device(device).type == NAME else _OfCPU
        return of(device)

class Generator(metaclass=_GeneratorOf): pass


_LOWER = 'conv2d linear matmul mm bmm addmm baddbmm scaled_dot_product_attention'.split()

def _lowered(name):
    "An operation that autocast runs in half precision."
    op = getattr(torch.ops.aten, name).default
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)
    def run(*args, **kwargs):
        dtype = torch.get_autocast_dtype(NAME)
        def cast(x): return x.to(dtype) if isinstance(x, torch.Tensor) and x.dtype == torch.float32 else x
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return op(*map(cast, args), **{k: cast(v) for k,v in kwargs.items()})
    return run

def _in_two_steps():
    "Operations that PyTorch else does on a device of others by an empty result and a call that fills it."
    made_so = 'CompositeExplicitAutogradNonFunctional'
    for full in torch._C._dispatch_get_all_op_names():
        if not full.startswith('aten::') or not torch._C._dispatch_has_kernel_for_dispatch_key(full, made_so): continue
        name, _, overload = full.removeprefix('aten::').partition('.')
        if torch._C._dispatch_has_kernel_for_dispatch_key(full, 'CPU'):
            yield getattr(getattr(torch.ops.aten, name), overload or 'default')

_libraries = []

class _Module(_DummyBackendModule):
    "`torch.pretend`."
    # outside of `pretending` nobody is to see a device: FakeTensorMode would expect a driver of CUDA
    here = False
    def is_available(self): return self.here
    def get_amp_supported_dtype(self): return [torch.float16, torch.bfloat16]

def _register():
    _setup_privateuseone_for_python_backend(NAME, _Module())
    every = Library('_', 'IMPL')
    aten = Library('aten', 'IMPL')
    every.fallback(_fallback, 'PrivateUse1')
    aten.impl('copy_', _copy_, 'PrivateUse1')
    aten.impl('empty.memory_format', _empty, 'PrivateUse1')
    for name in ('as_strided', 'view', '_reshape_alias'): aten.impl(name, _same_memory(name), 'PrivateUse1')
    for op in _in_two_steps(): aten.impl(op, partial(_fallback, op), 'PrivateUse1')
    aten.impl('convolution_overrideable', _convolution, 'PrivateUse1')
    aten.impl('convolution_backward_overrideable', _convolution_backward, 'PrivateUse1')
    every.fallback(fallthrough_kernel, 'AutocastPrivateUse1')
    for name in _LOWER: aten.impl(name, _lowered(name), 'AutocastPrivateUse1')
    _libraries.extend([every, aten])
    aten.impl('set_.source_Storage_storage_offset', _set_, 'PrivateUse1')
    torch.serialization.register_package(1, lambda storage: None, _restored)
    _instead(torch.Tensor, '__deepcopy__', _deepcopy)
    _instead(torch.UntypedStorage, 'cpu', _storage_on_cpu)

if not _libraries: _register()


# ---------------------------------------------------------------- in place of a GPU

def replace(old, new):
    "Put `new` in place of a function in every module that has it; returns how to undo it."
    this = sys.modules[__name__]
    for module in list(sys.modules.values()):
        if module is this: continue
        names = [k for k,v in list(getattr(module, '__dict__', {}).items()) if v is old]
        for k in names: setattr(module, k, new)
    return lambda: replace(new, old)

@contextmanager
def pretending():
    "While this lasts, the device is fastai's default one: what a GPU is where there is one."
    import fastai.torch_core
    asked = fastai.torch_core.default_device
    def default_device(use=-1):
        asked()  # who counts goes on counting
        return torch.device(NAME, 0)
    undo = [replace(asked, default_device), replace(_OfCPU, Generator)]
    # a network that moves keeps its parameters, as between CPU and CUDA
    torch.__future__.set_swap_module_params_on_conversion(True)
    _Module.here = True
    try: yield torch.device(NAME, 0)
    finally:
        _Module.here = False
        for f in undo: f()
        torch.__future__.set_swap_module_params_on_conversion(False)
