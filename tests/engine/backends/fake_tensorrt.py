# SPDX-License-Identifier: Apache-2.0
"""TensorRT 10, 11 and TensorRT-RTX without a GPU: the parts of their Python API that we use, as documented.

Names, arguments and return values are those of the bindings at the tags v10.3.0, v10.14, v11.1 of NVIDIA/TensorRT and
of tensorrt_rtx 1.7: what a version does not have, raises AttributeError here too. An "ONNX file" is JSON that lists
tensors and layers, an "engine" is that JSON; running one calls a Python function on the memory behind the addresses.
"""

import ctypes
import enum
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from virst_engine.backends.manifest import StageSpec

Kernel = Callable[[dict[str, Tensor]], dict[str, Tensor]]

Severity = enum.IntEnum("Severity", "INTERNAL_ERROR ERROR WARNING INFO VERBOSE", start=0)
DataType = enum.IntEnum("DataType", "FLOAT HALF INT8 INT32 BOOL UINT8 FP8 BF16 INT64", start=0)
LayerType = enum.IntEnum("LayerType", "SOFTMAX MATRIX_MULTIPLY ELEMENTWISE SHUFFLE UNARY CAST", start=0)
MatrixOperation = enum.IntEnum("MatrixOperation", "NONE TRANSPOSE VECTOR", start=0)
ElementWiseOperation = enum.IntEnum("ElementWiseOperation", "SUM PROD MAX", start=0)
NAMES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "int64": "INT64", "int32": "INT32", "bool": "BOOL"}


class ILogger:
    Severity = Severity

    def log(self, severity: Severity, message: str) -> None:
        raise NotImplementedError


class FakeTensor:
    def __init__(self, name: str, dtype: DataType, shape: tuple[int, ...]) -> None:
        self.name, self.dtype, self.shape = name, dtype, tuple(shape)


class ILayer:
    """What `network.get_layer` gives: the attributes of a kind of layer appear once its class is assigned."""

    def __init__(self, name: str, kind: LayerType, inputs: list[Any], output: FakeTensor, own: dict[str, Any]) -> None:
        self.name, self.type, self._inputs, self._output, self._own = name, kind, inputs, output, own

    num_outputs = 1

    @property
    def num_inputs(self) -> int:
        return len(self._inputs)

    def get_input(self, index: int) -> Any:
        return self._inputs[index]

    def set_input(self, index: int, tensor: Any) -> None:
        self._inputs[index] = tensor

    def get_output(self, index: int) -> FakeTensor:
        return self._output


class ISoftMaxLayer(ILayer):
    pass


class IMatrixMultiplyLayer(ILayer):
    @property
    def op0(self) -> Any:
        return self._own["op0"]

    @property
    def op1(self) -> Any:
        return self._own["op1"]


class IElementWiseLayer(ILayer):
    @property
    def op(self) -> Any:
        return self._own["op"]


class IShuffleLayer(ILayer):
    @property
    def first_transpose(self) -> Any:
        return self._own["first_transpose"]

    @first_transpose.setter
    def first_transpose(self, permutation: Any) -> None:
        self._own["first_transpose"] = permutation

        self._output.shape = tuple(self._inputs[0].shape[i] for i in permutation)

    @property
    def second_transpose(self) -> Any:
        return self._own["second_transpose"]

    @property
    def reshape_dims(self) -> Any:
        return self._output.shape

    @reshape_dims.setter
    def reshape_dims(self, shape: Any) -> None:
        assert math.prod(shape) == math.prod(self._inputs[0].shape)
        self._output.shape = tuple(shape)


class IAttention:
    def __init__(self, query: Any, key: Any, value: Any, number: int) -> None:
        self.inputs, self.mask, self.decomposable = (query, key, value), None, True
        self._output = FakeTensor(f"attention_{number}", query.dtype, query.shape)

    def get_output(self, index: int) -> FakeTensor:
        return self._output


class Network:
    """INetworkDefinition up to 10.13; `AttentionNetwork` is that of 10.14 and later."""

    def __init__(self, flags: int) -> None:
        self.flags = flags
        self.inputs: list[FakeTensor] = []
        self.outputs: list[FakeTensor] = []
        self.layers: list[ILayer] = []
        self.attentions: list[IAttention] = []
        self.kernel = ""

    num_inputs = property(lambda self: len(self.inputs))
    num_outputs = property(lambda self: len(self.outputs))
    num_layers = property(lambda self: len(self.layers))

    def get_input(self, index: int) -> FakeTensor:
        return self.inputs[index]

    def get_output(self, index: int) -> FakeTensor:
        return self.outputs[index]

    def get_layer(self, index: int) -> ILayer:
        return self.layers[index]

    def add_shuffle(self, input: FakeTensor) -> IShuffleLayer:
        out = FakeTensor(f"shuffle_{len(self.layers)}", input.dtype, input.shape)
        identity = {"first_transpose": list(range(8)), "second_transpose": list(range(8))}
        layer = IShuffleLayer(out.name, LayerType.SHUFFLE, [input], out, identity)
        self.layers.append(layer)
        return layer


class AttentionNetwork(Network):
    def add_attention(self, query: Any, key: Any, value: Any, norm_op: Any, causal: bool) -> IAttention:
        assert not causal
        assert key.shape == value.shape, "Key and Value must have the same shape"
        self.attentions.append(IAttention(query, key, value, len(self.attentions)))
        return self.attentions[-1]


def fake_tensorrt(flavour: str, version: str, kernels: dict[str, Kernel] | None = None) -> Any:
    """A module `tensorrt` or `tensorrt_rtx` of that version.

    `calls`: what was done to it, in order. `build_error`: a reason for which every build fails.
    `kernels`: what engines compute, by the name of the stage; missing ones give zeros.
    """
    module = SimpleNamespace(__name__=flavour, __version__=version, calls=[], build_error="", networks=[])
    major, minor = (int(number) for number in version.split(".")[:2])
    is_rtx = flavour == "tensorrt_rtx"
    has_attention = is_rtx or (major, minor) >= (10, 14)
    network_class = AttentionNetwork if has_attention else Network

    class Parser:
        def __init__(self, network: Network, logger: ILogger) -> None:
            self._network, self._errors = network, []

        num_errors = property(lambda self: len(self._errors))

        def get_error(self, index: int) -> str:
            return self._errors[index]

        def parse_from_file(self, model: str) -> bool:
            try:
                graph = json.loads(Path(model).read_text())
            except ValueError:
                self._errors = ["Failed to parse the ONNX model"]
                return False
            read_graph(self._network, graph)
            return True

    class BuilderConfig:
        def __init__(self) -> None:
            if is_rtx:
                self.num_compute_capabilities = 0

        def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
            module.calls.append(("workspace", pool_size))

    class RtxBuilderConfig(BuilderConfig):
        def set_compute_capability(self, capability: Any, index: int) -> bool:
            assert index < self.num_compute_capabilities
            module.calls.append(("target", capability.name))
            return True

    class Builder:
        def __init__(self, logger: ILogger) -> None:
            assert isinstance(logger, ILogger)
            self._logger = logger

        def create_network(self, flags: int = 0) -> Network:
            assert flags == 1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
            module.networks.append(network_class(flags))
            return module.networks[-1]

        def create_builder_config(self) -> BuilderConfig:
            return (RtxBuilderConfig if is_rtx else BuilderConfig)()

        def build_serialized_network(self, network: Network, config: BuilderConfig) -> Any:
            module.calls.append(("build", network.kernel))
            if module.build_error:
                self._logger.log(Severity.ERROR, module.build_error)
                return None
            tensors = {t.name: [t.dtype.name, list(t.shape), "in"] for t in network.inputs}
            tensors |= {t.name: [t.dtype.name, list(t.shape), "out"] for t in network.outputs}
            plan = {"version": [flavour, version], "kernel": network.kernel, "tensors": tensors}
            return json.dumps(plan).encode()

    class Runtime:
        def __init__(self, logger: ILogger) -> None:
            self._logger = logger

        def deserialize_cuda_engine(self, serialized_engine: bytes) -> Any:
            plan = json.loads(serialized_engine)
            if plan["version"] != [flavour, version]:
                self._logger.log(Severity.ERROR, "The engine plan file is not compatible with this version of TensorRT")
                return None
            return Engine(plan)

    class Engine:
        device_memory_size_v2 = 1000

        def __init__(self, plan: dict[str, Any]) -> None:
            self.plan = plan
            self._names = list(plan["tensors"])

        num_io_tensors = property(lambda self: len(self._names))

        def get_tensor_name(self, index: int) -> str:
            return self._names[index]

        def get_tensor_dtype(self, name: str) -> DataType:
            return DataType[self.plan["tensors"][name][0]]

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            return tuple(self.plan["tensors"][name][1])

        def create_execution_context(self) -> Any:
            return Context(self)

    class Context:
        def __init__(self, engine: Engine) -> None:
            self._engine, self._addresses = engine, {}

        def set_tensor_address(self, name: str, memory: int) -> bool:
            self._addresses[name] = memory
            return True

        def execute_async_v3(self, stream_handle: int) -> bool:
            plan = self._engine.plan
            assert self._addresses.keys() == plan["tensors"].keys(), "an address is missing"
            views = {
                name: tensor_at(self._addresses[name], dtype, shape)
                for name, (dtype, shape, _) in plan["tensors"].items()
            }
            rows = max((v.shape[0] for v in views.values()), default=0)
            module.calls.append(("run", plan["kernel"], rows))
            kernel = (kernels or {}).get(plan["kernel"])
            inputs = {n: views[n].clone() for n, (_, _, side) in plan["tensors"].items() if side == "in"}
            for name, value in (kernel(inputs) if kernel else {}).items():
                views[name].copy_(value)
            return True

    module.ILogger, module.DataType, module.LayerType = ILogger, DataType, LayerType
    module.MatrixOperation, module.ElementWiseOperation = MatrixOperation, ElementWiseOperation
    module.ISoftMaxLayer, module.IMatrixMultiplyLayer = ISoftMaxLayer, IMatrixMultiplyLayer
    module.IElementWiseLayer, module.IShuffleLayer = IElementWiseLayer, IShuffleLayer
    module.Permutation = list
    module.MemoryPoolType = enum.IntEnum("MemoryPoolType", "WORKSPACE", start=0)
    # 11 and RTX know strongly typed networks alone.
    flags = {"STRONGLY_TYPED": 0} if is_rtx or major >= 11 else {"EXPLICIT_BATCH": 0, "STRONGLY_TYPED": 1}
    module.NetworkDefinitionCreationFlag = enum.IntEnum("NetworkDefinitionCreationFlag", flags)
    if has_attention:
        module.AttentionNormalizationOp = enum.IntEnum("AttentionNormalizationOp", "NONE SOFTMAX", start=0)
    if is_rtx:
        module.ComputeCapability = enum.IntEnum("ComputeCapability", "NONE CURRENT SM75 SM80 SM86 SM89 SM120", start=0)
    module.Builder, module.OnnxParser, module.Runtime = Builder, Parser, Runtime
    return module


def tensor_at(address: int, dtype: str, shape: list[int]) -> Tensor:
    """The host memory at an address, as a tensor."""
    torch_dtype = getattr(torch, {short: name for name, short in NAMES.items()}[dtype])
    size = math.prod(shape) * torch.empty(0, dtype=torch_dtype).element_size()
    memory = (ctypes.c_char * size).from_address(address)
    return torch.frombuffer(memory, dtype=torch_dtype).view(shape)


class HostMemory:
    """The host in place of a GPU: `Gpu` of engine/backends/tensorrt_backend.py."""

    def __init__(self, name: str = "Fake RTX 3080", target: str = "SM86") -> None:
        self.device = torch.device("cpu")
        self._describe = (name, target)

    def describe(self) -> tuple[str, str]:
        return self._describe

    def pinned(self, like: Tensor) -> Tensor:
        return torch.empty_like(like, device="cpu")

    def record(self, enqueue: Callable[[int], bool]) -> Callable[[], None]:
        assert enqueue(1234)

        def replay() -> None:
            assert enqueue(1234)

        return replay

    def mark(self) -> Callable[[], None]:
        return lambda: None


def graph_of(stage: str, spec: StageSpec, layers: list[list[Any]]) -> str:
    """The text of a fake ONNX file. Layers: [kind, name, [input names], output dtype, output shape, attributes]."""

    def tensors(side: Any) -> dict[str, Any]:
        return {name: [t.dtype, [-1 if size == "objects" else size for size in t.shape]] for name, t in side.items()}

    return json.dumps({"kernel": stage, "in": tensors(spec.inputs), "out": tensors(spec.outputs), "layers": layers})


def read_graph(network: Network, graph: dict[str, Any]) -> None:
    network.kernel = graph["kernel"]
    known = {}
    for side, tensors in (("in", network.inputs), ("out", network.outputs)):
        for name, (dtype, shape) in graph[side].items():
            known[name] = FakeTensor(name, DataType[NAMES[dtype]], tuple(shape))
            tensors.append(known[name])
    for kind, name, inputs, dtype, shape, attributes in graph["layers"]:
        known[name] = FakeTensor(name, DataType[NAMES[dtype]], tuple(shape))
        own = {"first_transpose": list(range(8)), "second_transpose": list(range(8)), **attributes}
        for key, values in (("op0", MatrixOperation), ("op1", MatrixOperation), ("op", ElementWiseOperation)):
            if key in own:
                own[key] = values[own[key]]
        network.layers.append(ILayer(name, LayerType[kind], [known[i] for i in inputs], known[name], own))
    for out in network.outputs:  # an output has the shape of the inputs' objects
        if -1 in out.shape:
            out.__class__ = _FollowsInputs
            out.network = network  # type: ignore[attr-defined]


class _FollowsInputs(FakeTensor):
    network: Network

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if name == "shape":
            rows = max(tensor.shape[0] for tensor in super().__getattribute__("network").inputs)
            return tuple(rows if size == -1 else size for size in value)
        return value
