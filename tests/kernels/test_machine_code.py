"""What nvcc makes of the kernels, held to kernels/budgets.json.

Where the library has been built of the sources as they are, its own code is read, for every architecture; else the
files are compiled for one of them.
"""

import pytest

SLOW = pytest.mark.slow  # `make kernels` reads all three


@pytest.mark.parametrize("architecture", [90, pytest.param(80, marks=SLOW), pytest.param(100, marks=SLOW)])
def test_every_kernel_keeps_its_budget(machine_code, cannot, toolchain, architecture):
    for program in ("nvcc", *machine_code.PROGRAMS):
        if toolchain.find_cuda_program(program) is None:
            cannot(f"no {program}")
    library = machine_code.built_library()
    if library is None and architecture != 90:
        cannot("the library isn't built of these sources: python setup.py build_ext --inplace")
    code = machine_code.examine(architecture, library)
    assert len(code) > 10
    assert not machine_code.problems(code, machine_code.load_budgets()[f"sm_{architecture}"])


def test_every_way_to_break_a_budget_is_seen(machine_code):
    good = machine_code.MachineCode(registers=80, shared=64, stack=0, local=0, wide_loads=2, wide_stores=1)
    budget = {"kernel": {"registers": 80, "shared": 64, "wide_loads": 2, "wide_stores": 1}}
    assert machine_code.problems({"kernel": good}, budget) == []
    for key, value in dict(registers=81, shared=65, stack=32, local=1, wide_loads=1, wide_stores=0).items():
        changed = machine_code.MachineCode(**{**vars(good), key: value})
        (problem,) = machine_code.problems({"kernel": changed}, budget)
        assert key in problem
    assert machine_code.problems({}, budget)
    assert machine_code.problems({"kernel": good}, {})


def test_every_architecture_has_budgets(machine_code, toolchain):
    assert set(machine_code.load_budgets()) == {f"sm_{architecture}" for architecture in toolchain.ARCHITECTURES}
