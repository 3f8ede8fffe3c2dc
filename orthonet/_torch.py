"""What orthonet reads from private or undocumented parts of PyTorch, one function a fact.

No other file of the library touches them, so a release of PyTorch that moves one breaks one line
here. `tests/test_torch.py` checks every function; it has passed with PyTorch 2.6.0 and 2.14.1.
Where the versions differ, the docstring says how.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import operator
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.conv import _ConvNd as ConvNd
from torch.optim import Optimizer
from torch.utils import _pytree as pytree
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import TorchDispatchMode as DispatchMode

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = [
    "ConvNd",
    "DispatchMode",
    "ModuleStamp",
    "MODULE_ATTRIBUTES",
    "NEAREST_EXACT_2D",
    "NN_FUNCTIONS",
    "Stamp",
    "TO_COPY",
    "composite_of",
    "cannot_change_unseen",
    "capturing",
    "conv_forward",
    "conv_output_padding",
    "conv_paddings",
    "core_decompositions",
    "current_stream",
    "eager",
    "flat_weights",
    "foreach_copy_",
    "foreach_norm",
    "has_dispatch_mode",
    "has_function_mode",
    "has_saved_tensor_hooks",
    "in_forward_mode",
    "in_transform",
    "is_exporting",
    "is_hooked",
    "is_overload",
    "is_shard",
    "is_traced",
    "mutates",
    "not_compiled",
    "operation_arguments",
    "operation_name",
    "overload_name",
    "parameters_of",
    "patched",
    "REQUIRED",
    "forward_hook_tables",
    "forward_hooks",
    "has_global_forward_hooks",
    "run_backward",
    "tensors_in",
    "recording_in_kernel",
    "running_ddp",
    "set_conv_paddings",
    "tracing",
    "version_of",
    "without_autocast",
    "without_values",
]

_C: Any = torch._C
_Variable: Any = torch.autograd.Variable
_ops: Any = torch._ops

# Bound once: `eager` runs at every read of a constrained weight.
_tracing_state = _C._get_tracing_state
_func_interpreter = _C._functorch.peek_interpreter_stack
_dispatch_modes = _C._len_torch_dispatch_stack
_function_modes = _C._len_torch_function_stack


# What watches or transforms the code that runs.


def tracing() -> bool:
    """Return whether `torch.jit.trace` records what runs, as the old ONNX exporter does."""
    return _tracing_state() is not None


def is_exporting() -> bool:
    """Return whether `torch.export` traces what runs; its programs write no parameter.

    PyTorch 2.6 does not tell an export from a compilation: there the answer is False.
    """
    return getattr(torch.compiler, "is_exporting", bool)()


def in_transform(*tensors: Tensor) -> bool:
    """Return whether a transform of `torch.func` (vmap, grad, jvp, ...) runs.

    Inside one, side effects are forbidden. A vectorized backward pass (`is_grads_batched=True`,
    `torch.autograd.functional.jacobian(vectorize=True)`) runs its nodes outside of the
    interpreter stack of functorch: only the `tensors` show it.

    The answer is False under `torch.compile`, which traces transforms itself.
    """
    if torch.compiler.is_compiling():
        return False
    functorch = _C._functorch
    return functorch.peek_interpreter_stack() is not None or any(
        functorch.is_functorch_wrapped_tensor(t) or functorch.is_legacy_batchedtensor(t)
        for t in tensors
    )


def is_traced(*tensors: Tensor) -> bool:
    """Return whether code must be one graph of plain operations: compiled or transformed."""
    return torch.compiler.is_compiling() or in_transform(*tensors)


def in_forward_mode() -> bool:
    """Return whether a level of `torch.autograd.forward_ad` is open.

    Code then needs plain operations or a `jvp`. The transforms `torch.func.jvp` and `jacfwd` open a
    level, too. The level belongs to the process, not to the thread.
    """
    return forward_ad._current_level >= 0


def has_dispatch_mode() -> bool:
    """Return whether a `TorchDispatchMode` is active: fake tensors, a FLOP counter, ..."""
    return _dispatch_modes() > 0


def has_function_mode() -> bool:
    """Return whether a `TorchFunctionMode` is active other than that of a default device.

    `torch.set_default_device` and `with torch.device(...)` push one that changes nothing but the
    device of new tensors.
    """
    return any(
        type(_C._get_function_stack_at(i)) is not DeviceContext for i in range(_function_modes())
    )


def eager() -> bool:
    """Return whether nothing watches or transforms what runs: values may be kept and reused."""
    return (
        _tracing_state() is None
        and _func_interpreter() is None
        and forward_ad._current_level < 0
        and _dispatch_modes() == 0
        and (_function_modes() == 0 or not has_function_mode())
    )


def without_autocast(where: Tensor | torch.device) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which the device of `where` computes products in full precision.

    Autocast is off, and the short formats are, too, that `torch.set_float32_matmul_precision` and
    cuDNN allow for float32 (TF32, bfloat16). The context is empty if all that is so already, and
    for a device without autocast (meta).
    """
    kind = where.device.type if isinstance(where, Tensor) else where.type
    # The compiler of 2.6 cannot trace these questions, and all its devices have autocast.
    if torch.compiler.is_compiling():
        return torch.autocast(kind, enabled=False)
    short = torch.get_float32_matmul_precision() != "highest" or (
        kind == "cuda" and torch.backends.cudnn.allow_tf32
    )
    if short:
        return _full_precision(kind)
    if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
        return contextlib.nullcontext()
    return torch.autocast(kind, enabled=False)


@contextlib.contextmanager
def _full_precision(kind: str) -> Iterator[None]:
    """No autocast and no short formats; the settings of before are restored in any case."""
    before = torch.get_float32_matmul_precision()
    cudnn: Any = torch.backends.cudnn
    try:
        with contextlib.ExitStack() as stack:
            torch.set_float32_matmul_precision("highest")
            if kind == "cuda":
                stack.enter_context(
                    cudnn.flags(
                        enabled=cudnn.enabled,
                        benchmark=cudnn.benchmark,
                        deterministic=cudnn.deterministic,
                        allow_tf32=False,
                    )
                )
            if torch.amp.is_autocast_available(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
            yield
    finally:
        torch.set_float32_matmul_precision(before)


# The autograd engine.


def run_backward(
    outputs: Sequence[Tensor], grads: Sequence[Tensor], inputs: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """Return what `torch.autograd.grad` returns, without its checks of the arguments.

    The checks take as long as the engine itself. The graph is retained, an input that `outputs` do
    not depend on gets None, and no graph of the gradients is made.
    """
    return _Variable._execution_engine.run_backward(
        outputs, grads, True, False, tuple(inputs), True, accumulate_grad=False
    )


@contextlib.contextmanager
def recording_in_kernel() -> Iterator[None]:
    """Let autograd record inside of the kernel of a custom operation, where it is switched off."""
    keys, excluded = _C.DispatchKey, _C._dispatch_tls_local_exclude_set()
    recording = [keys.AutogradFunctionality, keys.ADInplaceOrView]
    for key in (*recording, keys.AutogradOther, keys.AutogradNestedTensor):
        excluded = excluded.remove(key)
    included = _C._dispatch_tls_local_include_set()
    with _C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield


def has_saved_tensor_hooks() -> bool:
    """Return whether hooks on saved tensors are active (checkpointing, offloading to the CPU).

    PyTorch 2.6 does not tell: there the answer is True, the one that keeps code correct.
    """
    top = getattr(_C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is None or top(True) is not None


def running_ddp() -> Any:
    """Return the `DistributedDataParallel` module whose forward pass runs; None outside of one."""
    from torch.nn.parallel import DistributedDataParallel

    return DistributedDataParallel._get_active_ddp_module()


# Tensors and modules.

_torch: Any = torch
foreach_copy_ = _torch._foreach_copy_
foreach_norm = _torch._foreach_norm
"""One call for a list of tensors, as `torch.optim` uses them; an empty list is an error."""


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """Return the parameters of all groups of an optimizer, in order."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def is_shard(tensor: Tensor) -> TypeGuard[DTensor]:
    """Return whether this process holds a part of the tensor only (a DTensor, as of FSDP2).

    Asked by attribute: loading `torch.distributed.tensor` takes long.
    """
    return hasattr(tensor, "full_tensor")


def is_hooked(module: nn.Module, *, backward: bool = False) -> bool:
    """Return whether hooks of this module run around its forward (or also its backward) pass."""
    hooks = module._forward_hooks or module._forward_pre_hooks
    return bool(hooks or (backward and (module._backward_hooks or module._backward_pre_hooks)))


def flat_weights(module: nn.RNNBase) -> list[Any]:
    """Return what the forward pass of a recurrent layer of `torch.nn` computes with."""
    return module._flat_weights


def version_of(tensor: Tensor) -> int:
    """Return how often a tensor was written to; 0 where no writes are counted."""
    return 0 if tensor.is_inference() else tensor._version


def forward_hooks(module: nn.Module | None) -> list[Callable[..., Any]]:
    """Return the hooks before and after the forward pass of a module; None: of every module."""
    where, kind = (nn.modules.module, "_global") if module is None else (module, "")
    names = (f"{kind}_forward_pre_hooks", f"{kind}_forward_hooks")
    return [hook for name in names for hook in getattr(where, name).values()]


def forward_hook_tables(module: nn.Module) -> list[dict[int, Any]]:
    """Return the dictionaries in which a module keeps the hooks around its forward pass."""
    return [module._forward_pre_hooks, module._forward_hooks]


def has_global_forward_hooks() -> bool:
    """Return whether hooks run around the forward pass of every module of the process."""
    return bool(forward_hooks(None))


_OF_RECURRENT_LAYERS = {"_all_weights", "_flat_weight_refs", "_flat_weights", "_flat_weights_names"}
MODULE_ATTRIBUTES = frozenset(vars(nn.Module())) | _OF_RECURRENT_LAYERS
"""What `nn.Module` and the recurrent layers of `torch.nn` keep for themselves."""


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors of nested tuples, lists, dictionaries and registered classes, in order."""
    return [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]


def is_hooked_tensor(tensor: Tensor) -> bool:
    """Return whether hooks of the user run when a gradient of the tensor arrives."""
    return bool(tensor._backward_hooks or tensor._post_accumulate_grad_hooks)


def conv_forward(module: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolve as a convolution of `torch.nn` does, padding mode included, with other weights."""
    return module._conv_forward(input, weight, bias)


def conv_paddings(module: Any) -> list[int]:
    """Return the paddings of a convolution of `torch.nn` in the order that `F.pad` takes.

    The last dimension comes first, each as (before, after). `padding="same"` is resolved.
    """
    return module._reversed_padding_repeated_twice


def set_conv_paddings(module: Any, pads: list[int]) -> None:
    """Set what `conv_paddings` returns and a padding mode other than zeros reads."""
    module._reversed_padding_repeated_twice = pads


def conv_output_padding(module: Any, input: Tensor, output_size: Sequence[int] | None) -> list[int]:
    """Return the output padding with which a transposed convolution reaches `output_size`.

    None means the output padding of the module.

    Raises:
        ValueError: The size has the wrong length or cannot be reached.
    """
    dims = len(module.kernel_size)
    return module._output_padding(
        input, output_size, module.stride, module.padding, module.kernel_size, dims, module.dilation
    )


# Operations of an exported graph.

NN_FUNCTIONS: Any = _C._nn
"""The namespace in which `torch.nn.functional` finds its functions that are not Python."""

NEAREST_EXACT_2D: Any = torch.ops.aten._upsample_nearest_exact2d.default
"""The operation of `F.interpolate(mode="nearest-exact")`, which takes sizes and scales."""

TO_COPY: Any = torch.ops.aten._to_copy.default
"""The operation that changes the dtype or device of a tensor, as a dispatch mode sees it."""


def is_overload(target: Any) -> bool:
    """Return whether the target is an overload of an operation, e.g. `aten.add.Tensor`."""
    return isinstance(target, _ops.OpOverload)


def operation_name(target: Any) -> str | None:
    """Return the name `namespace::operation` of an overload or a packet; None for other targets."""
    if isinstance(target, _ops.OpOverload):
        return target._schema.name
    if isinstance(target, _ops.OpOverloadPacket):
        return target._qualified_op_name
    return None


def overload_name(target: Any) -> str | None:
    """Return the name of an overload, "add.Tensor" or "other::add.Tensor"; None for other targets.

    The namespace of ATen is left out.
    """
    if not is_overload(target):
        return None
    name = target._schema.name.removeprefix("aten::")
    return f"{name}.{target._schema.overload_name or 'default'}"


REQUIRED: Any = object()
"""Stands for the default of an argument that has none."""


def operation_arguments(target: Any) -> dict[str, Any] | None:
    """Return the arguments of an overload with their defaults, in order; None for other targets."""
    if not is_overload(target):
        return None
    return {
        a.name: a.default_value if a.has_default_value() else REQUIRED
        for a in target._schema.arguments
    }


def mutates(target: Any) -> bool:
    """Return whether the operation writes to one of its arguments; False for other targets."""
    schema = getattr(target, "_schema", None)
    return schema is not None and schema.is_mutable


def composite_of(target: Any) -> Callable[..., Any] | None:
    """Return the function that runs a composite operation by its parts; None for other operations.

    Composite means that PyTorch derives its gradient from that of its parts
    (CompositeImplicitAutograd).
    """
    kind = _C.DispatchKey.CompositeImplicitAutograd
    return target.decompose if target.has_kernel_for_dispatch_key(kind) else None


def core_decompositions() -> dict[Any, Callable[..., Any]]:
    """Return PyTorch's table of operations written in core ATen operations; slow to load."""
    from torch._decomp import core_aten_decompositions

    return dict(core_aten_decompositions().items())


def without_values() -> contextlib.AbstractContextManager[Any]:
    """Return a context in which tensors have shapes and dtypes only."""
    from torch._subclasses import FakeTensorMode

    return FakeTensorMode()


# Patches.

_patching = threading.RLock()


@contextlib.contextmanager
def patched(
    namespaces: Iterable[dict[str, Any]], substitutes: Mapping[Any, Callable[..., Any]]
) -> Iterator[None]:
    """Put each function's substitute in its place wherever `namespaces` name it.

    The change is undone at the end, also after an exception. It acts in the calling thread only: in
    other threads the changed names call the original functions, though they are not identical with
    them meanwhile. A second thread that enters waits until the first has left.

    Args:
        namespaces: Dictionaries of names, such as `vars(torch.nn.functional)`.
        substitutes: From each function to what is called instead.
    """
    thread, active = threading.get_ident(), True

    def guarded(original: Callable[..., Any], substitute: Callable[..., Any]) -> Any:
        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            # A module that is imported meanwhile may keep this function for ever.
            mine = active and threading.get_ident() == thread
            return (substitute if mine else original)(*args, **kwargs)

        return call

    by_identity = {id(f): guarded(f, g) for f, g in substitutes.items()}
    changed: list[tuple[dict[str, Any], str, Any]] = []
    with _patching:
        try:
            for space in {id(s): s for s in namespaces}.values():
                for name, value in list(space.items()):
                    if id(value) in by_identity:
                        changed.append((space, name, value))
                        space[name] = by_identity[id(value)]
            yield
        finally:
            active = False
            for space, name, value in reversed(changed):
                space[name] = value


# The state of a tensor.


class Stamp:
    """The state of a tensor at one time, so that a later change of it can be noticed.

    Compared are the version counter, the place of the memory, the strides and, in main memory, the
    bits of one entry: a write that leaves no trace (through `.data` or NumPy) to the whole tensor
    changes it, most likely. On an accelerator, to look at an entry would be to wait for it.

    Args:
        tensor: A strided tensor of known memory.
    """

    __slots__ = ("dtype", "entry", "pointer", "requires_grad", "strides", "value", "version")

    def __init__(self, tensor: Tensor) -> None:
        self.version, self.pointer = tensor._version, tensor.data_ptr()
        self.dtype, self.strides = tensor.dtype, tensor.stride()
        self.requires_grad = tensor.requires_grad
        self.entry = _entry(tensor)
        self.value = 0 if self.entry is None else self.entry.value

    def holds(self, tensor: Tensor) -> bool:
        """Return whether the tensor, which must be the same object, has not changed."""
        return (
            tensor._version == self.version
            and tensor.data_ptr() == self.pointer
            and tensor.stride() == self.strides
            and tensor.dtype is self.dtype
            # the pointer is that of before, so the memory is there
            and (self.entry is None or self.entry.value == self.value)
        )


class ModuleStamp:
    """Which parameters and sub-modules a module has, so that a replacement can be noticed."""

    __slots__ = ("own",)

    def __init__(self, module: nn.Module) -> None:
        self.own = (*module._parameters.values(), *module._modules.values())

    def holds(self, module: nn.Module) -> bool:
        """Return whether they are the same, without hooks around their forward passes."""
        own = (*module._parameters.values(), *module._modules.values())
        if len(own) != len(self.own) or not all(map(operator.is_, own, self.own)):
            return False
        for part in module._modules.values():
            if part is not None and (part._forward_hooks or part._forward_pre_hooks):
                return False
        return True


_WORDS = (ctypes.c_uint8, ctypes.c_uint16, ctypes.c_uint32, ctypes.c_uint64)
_BITS: dict[int, Any] = {ctypes.sizeof(word): word for word in _WORDS}


def _entry(tensor: Tensor) -> Any:
    """The bits of one entry of a tensor in main memory, read anew each time; None elsewhere."""
    size = tensor.element_size()
    if tensor.device.type != "cpu" or tensor.numel() == 0 or tensor.is_meta:
        return None
    place = tensor.numel() * 5 // 8 if tensor.is_contiguous() else 0
    return _BITS[min(size, 8)].from_address(tensor.data_ptr() + place * size)


def cannot_change_unseen(tensor: Tensor) -> bool:
    """Return whether every change of a tensor leaves a trace that a `Stamp` sees.

    False for subclasses of tensors, for tensors without memory or without a version counter, for
    memory that other processes may write to, and while a CUDA graph is captured, whose replay
    must compute.
    """
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and not tensor.is_meta
        and not tensor.is_inference()
        and tensor.layout is torch.strided
        and not (tensor.device.type == "cpu" and tensor.is_shared())
        and not capturing(tensor)
    )


def capturing(tensor: Tensor) -> bool:
    """Return whether work on the device of `tensor` is captured into a CUDA graph now."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def current_stream(tensor: Tensor) -> object:
    """Return the stream on which work with `tensor` is queued now; None on the CPU."""
    return torch.cuda.current_stream(tensor.device) if tensor.is_cuda else None


def not_compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let compiled code call a function as it is, without tracing it.

    As `torch.compiler.disable`, but the compiler is loaded when the function is first called. The
    constructor of every optimizer does that, too.
    """
    return _torch._disable_dynamo(function)
