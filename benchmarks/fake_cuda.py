"""A CUDA device that computes nothing: what symbolic_gpu.py and tests/test_cuda.py run the real code on.

Import it before torch: importing compiles and registers the device (g++, seconds the first time, then benchmarks/work/
keeps it). `install()` then gives `torch.cuda` streams and events that only count, and two 4090s. Under torch's
FakeTensorMode every tensor on "cuda:0" has a shape and no memory, no kernel runs and no collective moves anything.

`Tracker` sees each operation. It records where the host waits for the device, what is sent, which bytes are alive, and
a trace for the two simulations: `reserved` (the caching allocator) and `timeline` (streams, events and the link).
"""

import bisect
import collections
import contextlib
import ctypes
import hashlib
import importlib.util
import shutil
import subprocess
import sys
import threading
import traceback
import weakref
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "benchmarks" / "work"
GIB = 2**30

# ==== The device ====

# torch's CPU build has no guard for "cuda", and autograd's engine asks for one.
SOURCE = r"""
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>
using namespace c10;
// Operators that have a CUDA kernel, but fall apart into smaller ones where none is registered. Never called: the
// Python key, where fake tensors live, comes first. The name alone keeps the operator whole, as on a GPU.
template <int> void stub(const OperatorHandle&, torch::jit::Stack*) { TORCH_CHECK(false, "no kernel"); }
TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  for (auto name : {"silu_backward", "_fused_rms_norm", "_fused_rms_norm_backward"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&stub<0>>());
}
struct Guard final : impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device) const override { return getDevice(); }
  Device getDevice() const override { return Device(DeviceType::CUDA, 0); }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, getDevice()); }
  Stream getDefaultStream(Device) const override { return Stream(Stream::DEFAULT, getDevice()); }
  Stream exchangeStream(Stream) const noexcept override { return Stream(Stream::DEFAULT, getDevice()); }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)
struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  DeviceIndex current_device() const override { return 0; }
  void init() const override {}
};
namespace at { C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, Hooks) }
"""


def compile_device():
    """Return the path of the compiled device, from benchmarks/work/ if it is there. Raises: SystemExit without g++."""
    home = Path(importlib.util.find_spec("torch").origin).parent
    digest = hashlib.sha256((SOURCE + (home / "version.py").read_text()).encode()).hexdigest()[:16]
    library = WORK / f"fake_cuda_{digest}.so"
    if library.is_file():
        return library
    if not shutil.which("g++"):
        raise SystemExit("g++ is missing: it compiles the symbolic GPU. Install it (apt install g++).")
    WORK.mkdir(exist_ok=True)
    unfinished = library.with_suffix(f".{threading.get_native_id()}")
    command = ["g++", "-x", "c++", "-std=c++20", "-O0", "-w", "-shared", "-fPIC", f"-I{home / 'include'}", "-"]
    command += ["-o", str(unfinished), f"-L{home / 'lib'}", "-lc10", "-ltorch_cpu"]
    done = subprocess.run(command, input=SOURCE, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"g++ could not compile the symbolic GPU:\n{done.stderr[-2000:]}")
    unfinished.rename(library)
    return library


def register():
    """Load the device into this process. torch looks its hooks up once, while it is imported."""
    if "torch" in sys.modules:
        raise SystemExit("Import fake_cuda before torch: the device must be there when torch looks for it.")
    library = compile_device()
    folder = Path(importlib.util.find_spec("torch").origin).parent / "lib"
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(library))


register()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.distributed.fsdp._fully_shard import _fsdp_init  # noqa: E402
from torch.distributed.tensor._sharding_prop import ShardingPropagator  # noqa: E402
from torch.testing._internal.distributed import fake_pg  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils.flop_counter import flop_registry  # noqa: E402

# ==== Streams, events and the card, as torch.cuda has them ====

CARD = "NVIDIA GeForce RTX 4090"
CARD_BYTES = int(23.65 * GIB)  # what torch sees of its 24 GB
STARTED_BYTES = int(0.75 * GIB)  # CUDA context, NCCL's buffers and cuBLAS workspaces, gone before the first tensor
PEAK_FLOPS, PEAK_FLOPS_FP32, BANDWIDTH = 165.2e12, 82.6e12, 1.008e12  # of the card; bytes/s


class Stream:
    """A CUDA stream by name; what runs in it and waits for what goes into the Tracker's trace."""

    count = 0

    def __init__(self, device=None, priority=0, **kwargs):
        Stream.count += 1
        self.name = f"stream {Stream.count}"
        self.device = torch.device("cuda", 0)

    def wait_event(self, event):
        trace("wait", self.name, id(event), event)
        if Tracker.active:
            Tracker.active.order.seen[self.name] |= event.known

    def wait_stream(self, stream):
        self.wait_event(stream.record_event())

    def record_event(self, event=None):
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self):
        host_wait("stream.synchronize", self.name)

    def query(self):
        return True

    def is_capturing(self):
        return False

    def __enter__(self):
        self.context = using(self)
        return self.context.__enter__()

    def __exit__(self, *exc):
        return self.context.__exit__(*exc)


class Event:
    """A CUDA event: a point in a stream."""

    def __init__(self, *args, **kwargs):
        self.stream, self.known = None, collections.Counter()

    def record(self, stream=None):
        self.stream = (stream or current_stream()).name
        trace("record", self.stream, id(self), self)
        if Tracker.active:
            self.known = Tracker.active.order.known(self.stream)

    def wait(self, stream=None):
        (stream or current_stream()).wait_event(self)

    def synchronize(self):
        host_wait("event.synchronize", self.stream)

    def query(self):
        return True


class Properties:
    """Of torch.cuda.get_device_properties."""

    total_memory, name, major, minor, multi_processor_count = CARD_BYTES, CARD, 8, 9, 128


DEFAULT = Stream()
DEFAULT.name = "compute"
LOCAL = threading.local()  # .stream: each thread has its own current one; autograd's engine runs in one of its own


def current_stream(device=None):
    return getattr(LOCAL, "stream", DEFAULT)


@contextlib.contextmanager
def using(stream):
    before = current_stream()
    LOCAL.stream = stream or before
    try:
        yield
    finally:
        LOCAL.stream = before


def alive_bytes(device=None):
    """Return the bytes in tensors: what the plan has to leave out of the card's free memory."""
    return Tracker.active.alive if Tracker.active else 0


def free_bytes(device=None):
    return CARD_BYTES - STARTED_BYTES - alive_bytes(), CARD_BYTES


CUDA = {  # functions and classes of torch.cuda
    "Stream": Stream,
    "Event": Event,
    "stream": using,
    "current_stream": current_stream,
    "default_stream": lambda device=None: DEFAULT,
    "current_device": lambda: 0,
    "device_count": lambda: 2,
    "set_device": lambda device: None,
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "_lazy_init": lambda: None,
    "synchronize": lambda device=None: host_wait("cuda.synchronize", None),
    "get_device_name": lambda device=None: CARD,
    "get_device_properties": lambda device=None: Properties,
    "get_device_capability": lambda device=None: (8, 9),
    "mem_get_info": free_bytes,
    "memory_allocated": alive_bytes,
    "memory_reserved": alive_bytes,
}


def pinned(tensor, *args):
    """torch.Tensor.pin_memory: the same tensor with a mark, so that a copy from it is no wait."""
    tensor.is_in_pinned_memory = True
    return tensor


def install():
    """Put the card, its streams and memory into torch; mend three places where a fake tensor is unlike a real one."""
    for name, value in CUDA.items():
        setattr(torch.cuda, name, value)
    torch.accelerator.current_stream = current_stream
    torch.Tensor.pin_memory = pinned
    torch.UntypedStorage.resize_ = resize
    _fsdp_init._move_states_to_device = move_states
    ShardingPropagator._propagate_tensor_meta_non_cached = propagate


def fake_process_group(init_process_group, ranks):
    """Return init_process_group with torch's fake backend: rank 0 of `ranks`, collectives that move nothing."""

    def init(*args, **kwargs):
        return init_process_group("fake", rank=0, world_size=ranks, store=fake_pg.FakeStore())

    return init


real_resize = torch.UntypedStorage.resize_
real_move = _fsdp_init._move_states_to_device
real_propagate = ShardingPropagator._propagate_tensor_meta_non_cached


def resize(storage, size):
    """FSDP frees and makes room by resizing storages, which is no operator."""
    result = real_resize(storage, size)
    if Tracker.active:
        Tracker.active.resized(storage, size)
    return result


def move_states(params, buffers, device):
    """`parameter.data = tensor of another device` moves a fake tensor's storage, but not its device as a real one's."""
    real_move(params, buffers, device)
    for tensor in (*params, *buffers):
        tensor.fake_device = device
        Tracker.active.add(tensor)


def propagate(propagator, schema):
    """DTensor finds the shapes of a new operator by running it on fake tensors; on a GPU those cost nothing."""
    before, Tracker.paused = Tracker.paused, True
    try:
        return real_propagate(propagator, schema)
    finally:
        Tracker.paused = before


class FakeTensors(FakeTensorMode):
    """torch's fake tensors. It sees a card here, but must not compute constants on it as it would on a real one."""

    avoid_device_init = True


# ==== Every operation: bytes alive, waits, what is sent, how long at best ====

WAITS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "unique_dim", "_unique2", "masked_select"}
NO_KERNEL = {
    *("view", "_unsafe_view", "t", "transpose", "select", "slice", "unsqueeze", "squeeze", "expand", "as_strided"),
    *("detach", "split", "split_with_sizes", "permute", "alias", "narrow", "lift_fresh", "unbind", "diagonal", "chunk"),
    *("_reshape_alias", "reshape", "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"),
    *("device", "is_pinned", "resize_", "set_"),
}
READS_WHAT_IT_RETURNS = {"embedding", "gather", "index", "index_select"}  # of their first argument, not all of it


@dataclass
class Kernel:
    """One operation of the device: what it moves and computes."""

    name: str
    kind: str  # part of the model
    flops: float
    bytes: float
    seconds: float  # at the roofline


@dataclass
class Transfer:
    """One collective: the bytes that this rank sends in a ring."""

    name: str
    bytes: float


@dataclass
class Trace:
    """What happened in order: for the timeline, (phase, what, stream, detail); for the allocator, changes in bytes."""

    events: list = field(default_factory=list)
    memory: list = field(default_factory=list)  # (storage's key, bytes more or less, stream)


def trace(what, stream, detail, keep=None):
    """Add to the active Tracker's trace. keep: an object whose id must not be used again."""
    tracker = Tracker.active
    if tracker:
        tracker.trace.events.append((tracker.phase, what, stream, detail))
        tracker.kept.append(keep)


def host_wait(what, stream):
    """Note that the host waits for `stream` (None: all of them) to have done what it was given.

    Once for all elements of one `tolist()`, which reaches a fake tensor as several scalars and a card as one copy.
    """
    tracker = Tracker.active
    if not tracker:
        return
    wait = (tracker.phase, what, project_line())
    events = tracker.trace.events
    tracker.order.host_wait(stream)
    if not (events and events[-1][1] == "host" and tracker.waits[-1:] == [wait]):
        tracker.waits.append(wait)
        trace("host", stream, what)


def project_line():
    """Return the innermost line of the project, "file.py:line", that leads here."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.is_relative_to(ROOT) and ".venv" not in path.parts and path != Path(__file__):
            return f"{path.name}:{frame.lineno}"
    return "autograd's engine"


def tensors_of(values):
    """Yield the tensors in nested lists, tuples and dicts."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_of(value)
        elif isinstance(value, dict):
            yield from tensors_of(value.values())


def rounded(size):
    """Return bytes as the caching allocator counts them."""
    return -(-size // 512) * 512


class Order:
    """Which operations come before which: by the order in a stream, by events, by waits of the host.

    A tensor's memory belongs to the stream in which it was made. Once it is free, the next tensor of that stream may
    get it, so by then that stream must have waited for what other streams did with it.
    """

    def __init__(self):
        self.seen = collections.defaultdict(collections.Counter)  # stream -> {stream: its operations that come before}
        self.host = collections.Counter()
        self.last = collections.defaultdict(dict)  # storage's key -> {stream: (number, name) of its last operation}
        self.freed = collections.defaultdict(list)  # stream -> [(other stream, number, name)] on memory it got back

    def known(self, stream):
        """Return {stream: number of operations that come before the next one of `stream`}."""
        return self.seen[stream] | self.host

    def host_wait(self, stream):
        for name in list(self.seen) if stream is None else [stream]:
            self.host |= self.seen[name]

    def use(self, stream, name, keys):
        """Note an operation `name` of `stream` on the storages `keys`."""
        self.seen[stream][stream] += 1
        for key in keys:
            self.last[key][stream] = (self.seen[stream][stream], name)

    def free(self, key, owner):
        self.freed[owner] += [(stream, *operation) for stream, operation in self.last.pop(key, {}).items()]

    def allocate(self, owner):
        """Return the names of the operations that may still run on memory that a new tensor of `owner` may get."""
        freed, known = self.freed.pop(owner, []), self.known(owner)
        return [name for stream, number, name in freed if stream != owner and known[stream] < number]


class Tracker(TorchDispatchMode):
    """Sees each operation on the device. Enter it inside FakeTensorMode."""

    active, paused = None, False

    def __init__(self, kind_of):
        """kind_of: function of (name of the operator, its largest tensor, whether it multiplies) to a part's name."""
        super().__init__()
        self.kind_of = kind_of
        self.lock = threading.RLock()
        self.sizes, self.streams = {}, {}  # of each storage on the device, by its key
        self.alive = self.peak = 0
        self.phase, self.phase_peaks = "start", collections.Counter()
        self.waits = []  # (phase, what, "file.py:line")
        self.trace, self.kept = Trace(), []
        self.order, self.races = Order(), collections.Counter()  # (phase, operation) -> times
        self.squares = 0  # sum over the micro-batch's documents of their squared lengths, for attention's operations

    def __enter__(self):
        Tracker.active = self
        return super().__enter__()

    def __exit__(self, *exc):
        Tracker.active = None
        return super().__exit__(*exc)

    def forget(self):
        """Start a new step: its events, waits and peaks. What is alive and the allocator's trace stay."""
        self.trace = Trace(memory=self.trace.memory)
        self.kept.clear()
        self.waits.clear()
        self.phase_peaks.clear()
        self.peak = self.alive

    # -- bytes --

    def add(self, tensor):
        """Note a tensor that came to the device; views of what is known change nothing."""
        if tensor.device.type != "cuda":
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        with self.lock:
            if key not in self.sizes:
                self.sizes[key], self.streams[key] = 0, current_stream().name
                weakref.finalize(storage, self.gone, key)
                self.change(key, rounded(storage.nbytes()))

    def resized(self, storage, size):
        if storage._cdata in self.sizes:
            self.change(storage._cdata, rounded(size))

    def gone(self, key):
        self.change(key, 0)
        with self.lock:
            del self.sizes[key], self.streams[key]

    def change(self, key, size):
        with self.lock:
            growth = size - self.sizes[key]
            if growth:
                if growth < 0:
                    self.order.free(key, self.streams[key])
                else:
                    self.races.update((self.phase, name) for name in self.order.allocate(self.streams[key]))
                self.sizes[key] = size
                self.alive += growth
                self.peak = max(self.peak, self.alive)
                self.phase_peaks[self.phase] = max(self.phase_peaks[self.phase], self.alive)
                self.trace.memory.append((key, growth, self.streams[key]))

    # -- operations --

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(issubclass(kind, dist.tensor.DTensor) for kind in types):
            return NotImplemented
        kwargs = kwargs or {}
        if Tracker.paused:
            return function(*args, **kwargs)
        namespace, _, name = function._schema.name.partition("::")
        inputs = list(tensors_of((*args, *kwargs.values())))
        on_device = any(tensor.device.type == "cuda" for tensor in inputs)
        self.note_wait(name, args, kwargs, on_device)
        if name == "_local_scalar_dense" and on_device:
            return 1.0 if args[0].dtype.is_floating_point else 1
        result = function(*args, **kwargs)
        outputs = list(tensors_of([result]))
        for tensor in outputs:
            self.add(tensor)
        if name not in NO_KERNEL:
            keys = {t.untyped_storage()._cdata for t in (*inputs, *outputs) if t.device.type == "cuda"}
            self.order.use(current_stream().name, name, keys)
        if namespace in ("c10d", "_c10d_functional"):
            self.send(name, args, inputs)
        elif name not in NO_KERNEL and (on_device or any(tensor.device.type == "cuda" for tensor in outputs)):
            self.run(function, name, args, inputs, outputs)
        return result

    def note_wait(self, name, args, kwargs, on_device):
        """Note a wait of the host if this operation is one."""
        stream = current_stream().name
        if name in WAITS and on_device:
            host_wait(name, stream)
        elif name == "index" and on_device and any(t.dtype == torch.bool for t in tensors_of(args[1])):
            host_wait("index by a mask", stream)
        elif name == "_to_copy" and kwargs.get("device") is not None:
            from_host, to_host = args[0].device.type == "cpu", kwargs["device"].type == "cpu"
            waits = not kwargs.get("non_blocking") or not getattr(args[0], "is_in_pinned_memory", False)
            if not from_host and to_host and not kwargs.get("non_blocking"):
                host_wait("copy to the host", stream)
            elif from_host and not to_host and waits and args[0].numel() > 1:
                host_wait("copy from memory that is not pinned", stream)
        elif name == "copy_" and args[0].device.type == "cpu" and args[1].device.type == "cuda":
            non_blocking = kwargs.get("non_blocking") or args[2:3] == (True,)
            if not non_blocking:
                host_wait("copy to the host", stream)

    def send(self, name, args, inputs):
        """Note a collective. In a ring each rank sends all but its own part, and twice that for an all-reduce."""
        sizes = [tensor.nbytes for tensor in inputs if tensor.device.type == "cuda"]
        if not sizes or "wait" in name:
            return
        total = max(sizes)
        ranks = total / min(sizes) if len(sizes) > 1 else dist.get_world_size()
        share = total * (ranks - 1) / ranks
        if "allreduce" in name or "all_reduce" in name:
            ranks = group_size(args)
            share = 2 * total * (ranks - 1) / ranks
        elif "broadcast" in name:
            share = total
        trace("send", current_stream().name, Transfer(name, share))

    def run(self, function, name, args, inputs, outputs):
        """Note a kernel and what it takes at the roofline: the larger of its arithmetic and its traffic."""
        flops = self.flops(function, name, args, outputs)
        moving = [*inputs[1:], *outputs, *outputs] if name in READS_WHAT_IT_RETURNS else [*inputs, *outputs]
        if name == "scatter_add_":
            moving = [args[2], args[3], args[3], args[3]]
        moved = sum(tensor.numel() * tensor.element_size() for tensor in moving)
        largest = max((*inputs, *outputs), key=lambda tensor: tensor.numel())
        peak = PEAK_FLOPS_FP32 if flops and largest.dtype == torch.float32 else PEAK_FLOPS
        kind = self.kind_of(name, largest, bool(flops))
        seconds = max(flops / peak, moved / BANDWIDTH)
        trace("run", current_stream().name, Kernel(name, kind, flops, moved, seconds))

    def flops(self, function, name, args, outputs):
        """Return the operations of a matmul or of attention (causal inside each document), 0 of anything else."""
        if "varlen_attn" in name:
            backward = "backward" in name
            query = args[1] if backward else args[0]
            return (2.5 if backward else 1) * 2 * query.shape[1] * query.shape[2] * self.squares
        packet = function._overloadpacket
        if packet in flop_registry and "attention" not in name:
            return flop_registry[packet](*args, out_val=outputs[0])
        return 0


def group_size(args):
    """Return the number of ranks of the process group among a collective's arguments."""
    for value in args:
        if isinstance(value, torch.ScriptObject):
            with contextlib.suppress(RuntimeError):
                return dist.ProcessGroup.unbox(value).size()
        if isinstance(value, str) and value.isdigit():
            return dist.distributed_c10d._resolve_process_group(value).size()
    return dist.get_world_size()


# ==== The caching allocator ====


def reserved(memory):
    """Return {(stream, "small" | "large"): bytes} that the caching allocator maps for a trace of changes in bytes.

    With expandable segments (distributed.py sets them): one growing range per stream and pool, best fit, neighbours
    that are free join. Nothing is given back under pressure.
    """
    pools = {}
    for key, change, stream in memory:
        size = abs(change)
        name = (stream, "small" if size <= 2**20 else "large")
        pool = pools.setdefault(name, {"free": [], "used": collections.defaultdict(list), "end": 0})
        if change > 0:
            pool["used"][key].append((take(pool, size), size))
        else:
            give(pool, *pool["used"][key].pop())
    unit = {"small": 2 * 2**20, "large": 20 * 2**20}
    return {name: -(-pool["end"] // unit[name[1]]) * unit[name[1]] for name, pool in pools.items()}


def take(pool, size):
    """Take `size` bytes out of the smallest free block that has them, or at the end; return their address."""
    free = pool["free"]  # [address, size], by address
    fits = [(room, address, n) for n, (address, room) in enumerate(free) if room >= size]
    if fits:
        room, address, n = min(fits)
        free[n] = [address + size, room - size]
        if room == size:
            free.pop(n)
        return address
    address = pool["end"]
    if free and sum(free[-1]) == pool["end"]:
        address = free.pop()[0]
    pool["end"] = address + size
    return address


def give(pool, address, size):
    """Give a block back; it joins free neighbours."""
    free = pool["free"]
    n = bisect.bisect(free, [address, size])
    free.insert(n, [address, size])
    if n + 1 < len(free) and sum(free[n]) == free[n + 1][0]:
        free[n][1] += free.pop(n + 1)[1]
    if n and sum(free[n - 1]) == free[n][0]:
        free[n - 1][1] += free.pop(n)[1]


# ==== The timeline: streams, events, the link ====


def timeline(traces, link, efficiency=1.0):
    """Return the seconds that the ranks' `traces` (lists of events) of one step take together.

    link: bytes/s that a rank sends and receives at the same time; efficiency: share of the roofline that kernels reach.
    A stream runs its work in order, an event holds the streams that wait for it, and the host gives no more work while
    it waits. A collective begins when it has come up on every rank and the link is free. The host itself costs nothing
    here, and the copies on the collectives' own streams do not slow the kernels beside them.
    """
    clocks = [Clock(efficiency) for _ in traces]
    positions = [0] * len(traces)
    free = 0.0  # when the link is
    while any(position < len(events) for position, events in zip(positions, traces, strict=True)):
        meeting = []
        for rank, (clock, events) in enumerate(zip(clocks, traces, strict=True)):
            positions[rank] = clock.advance(events, positions[rank])
            if positions[rank] < len(events):
                meeting.append(events[positions[rank]])
                positions[rank] += 1
        if meeting:
            if len(meeting) != len(traces) or len({event[3].name for event in meeting}) != 1:
                raise ValueError("The ranks' collectives differ: the run would hang.")
            begin = max(free, *(clock.ready(event[2]) for clock, event in zip(clocks, meeting, strict=True)))
            free = begin + meeting[0][3].bytes / link
            for clock, event in zip(clocks, meeting, strict=True):
                clock.streams[event[2]] = free
    return max(max(clock.streams.values()) for clock in clocks)


class Clock:
    """When each stream of one rank has done what it was given so far."""

    def __init__(self, efficiency):
        self.efficiency = efficiency
        self.streams, self.events = {}, {}
        self.host = 0.0  # no work is given before

    def ready(self, stream):
        return max(self.streams.get(stream, 0.0), self.host)

    def advance(self, events, position):
        """Run `events` from `position` on up to the next collective; return its position."""
        while position < len(events) and events[position][1] != "send":
            _, what, stream, detail = events[position]
            if what == "run":
                self.streams[stream] = self.ready(stream) + detail.seconds / self.efficiency
            elif what == "record":
                self.events[detail] = self.ready(stream)
            elif what == "wait":
                self.streams[stream] = max(self.ready(stream), self.events.get(detail, 0.0))
            elif what == "host":
                self.host = max(self.streams.values()) if stream is None else self.ready(stream)
            position += 1
        return position
