"""Kernels and tensors from the log of a build."""

from benchmarks.rtx_schedule import alive, parse_kernels


def tensor(name: str, dimensions: str, dtype: str = "Half") -> str:
    return (
        f"{{ Name: {name}, Dimensions: [{dimensions}], Strides: [1], StrideOrder: [0], Datatype: {dtype} }}"
    )


def kernel(name: str, read: str, written: str, constants: str = "") -> str:
    middle = f", Constants: [ {constants}]" if constants else ""
    return (
        f"Name: {name}, LayerType: kgen, Inputs: [ {read}]{middle}, Outputs: [ {written}], "
        "TacticName: t, StreamId: 0, Metadata: m"
    )


LOG = [
    "Total Activation Memory: 1 bytes",
    "Layers:\n"
    + "\n".join(
        (
            kernel("a", tensor("x", "2,8"), tensor("h", "2,100")),
            kernel("signal", "", ""),
            kernel("b", tensor("h", "2,100"), tensor("s", "5", "Float"), tensor("w", "8,100")),
            kernel("c", f"{tensor('s', '5', 'Float')}, {tensor('x', '2,8')}", tensor("y", "2,8")),
        )
    ),
    "Name: x, IOMode: Input, DataType: Half",
]


def test_a_tensor_lives_from_its_kernel_to_its_last_reader() -> None:
    kernels = parse_kernels(LOG)
    assert [one.name for one in kernels] == ["a", "b", "c"]
    assert alive(kernels, ["y"]) == [{"h": 400}, {"h": 400, "s": 20}, {"s": 20}]


def test_traffic_counts_constants() -> None:
    assert [one.traffic for one in parse_kernels(LOG)] == [432, 2020, 84]
