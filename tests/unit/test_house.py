"""The rules of the house that neither import-linter nor ruff can see, read from the syntax trees.

Each rule is a function from one file to its violations, so that `test_a_rule_sees` can show it a violation and a
near miss: a rule that never fires would hold of every house.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from megacogvx.cli import VERBS

PROJECT = Path(__file__).resolve().parents[2]
LIBRARY = ("megacogvx", "kernels/megacogvx_kernels")
PROGRAMS = ("tools", "examples", "kernels/benchmarks", "setup.py")
LONGEST_FILE = 500  # lines

COMMUNICATING = ("megacogvx/parallel/", "megacogvx/checkpoint/", "megacogvx/testing/")
EXCHANGING_OPS = tuple(f"kernels/megacogvx_kernels/{op}/" for op in ("causal_halo", "group_norm_moments"))
READING_ENVIRONMENT = (
    "megacogvx/parallel/groups.py",
    "megacogvx/parallel/launch.py",
    "megacogvx/testing/",
    "megacogvx/cli.py",
    "megacogvx/inference/language_models.py",
)
UNPICKLING = ("megacogvx/checkpoint/reading.py",)  # with an unpickler that admits a checkpoint's own classes
DRAWING = ("megacogvx/draws.py", "megacogvx/testing/")
SUITE_WIDE = ("tests/unit/test_house.py", "tests/unit/test_package.py")  # of no single module


@dataclass(frozen=True)
class Source:
    """One Python file: where it lies, relative to the project, and what it says."""

    path: str
    text: str

    @property
    def tree(self) -> ast.Module:
        return _parse(self.text)

    def is_in(self, *places: str) -> bool:
        return self.path.startswith(places)


@cache
def _parse(text: str) -> ast.Module:
    return ast.parse(text)


def sources(*places: str) -> list[Source]:
    """Read all Python files under these folders of the project (or these files), those that exist."""
    roots = [PROJECT / place for place in places]
    files = sorted(file for root in roots for file in ([root] if root.is_file() else root.rglob("*.py")))
    return [Source(file.relative_to(PROJECT).as_posix(), file.read_text()) for file in files]


# ------------------------------------------------------------------------------------------- reading a tree


def uses(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) of every import and every attribute chain, aliases resolved."""
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        for line, full, alias in _imports(node):
            aliases[alias] = full
            yield line, full
    for node in ast.walk(tree):
        name = dotted(node)
        if name and not isinstance(node, ast.Name):
            head, _, rest = name.partition(".")
            yield node.lineno, f"{aliases.get(head, head)}.{rest}"  # type: ignore[attr-defined]


def _imports(node: ast.AST) -> Iterator[tuple[int, str, str]]:
    if isinstance(node, ast.Import):
        for name in node.names:
            bound = name.asname or name.name.partition(".")[0]
            yield node.lineno, name.name, bound
            if name.asname is None and "." in name.name:
                yield node.lineno, bound, bound
    elif isinstance(node, ast.ImportFrom) and node.module:
        for name in node.names:
            yield node.lineno, f"{node.module}.{name.name}", name.asname or name.name


def dotted(node: ast.AST) -> str:
    """Return `a.b.c` for a chain of attributes of a name, else an empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return ""


def names(source: Source, pattern: str) -> list[str]:
    """Return `path:line uses name` for every use of a dotted name that matches the pattern from its beginning."""
    found = {(line, name) for line, name in uses(source.tree) if re.match(pattern, name)}
    return [f"{source.path}:{line} uses {name}" for line, name in sorted(found)]


# -------------------------------------------------------------------------------------------------- rules


def communication(source: Source) -> list[str]:
    """torch.distributed and megatron-core's parallel_state stay in the rooms that communicate."""
    if source.is_in(*COMMUNICATING, *EXCHANGING_OPS):
        return []
    return names(source, r"(torch\.distributed|.*\bparallel_state)\b")


def environment(source: Source) -> list[str]:
    """Environment variables are read where a program starts, and nowhere below."""
    if source.is_in(*READING_ENVIRONMENT):
        return []
    return names(source, r"os\.(environb?|getenvb?|putenv|unsetenv)\b")


def randomness(source: Source) -> list[str]:
    """Random numbers come from megacogvx.draws, never from a running generator."""
    if source.is_in(*DRAWING):
        return []
    drawn_weights = r"torch\.nn\.init\.(.*(normal|uniform)_|orthogonal_|sparse_)$"
    torch_draws = r"torch\.(rand(n|int|perm)?(_like)?|normal|bernoulli|multinomial|manual_seed|seed|Generator)$"
    return names(source, rf"(random\.|random$|secrets\b|numpy\.random\b|torch\.random\b|{torch_draws}|{drawn_weights})")


def safety(source: Source) -> list[str]:
    """Nothing that a file from elsewhere could use to run code: no pickle, eval, shell or unsafe YAML."""
    found = [] if source.is_in(*UNPICKLING) else names(source, r"(c?[Pp]ickle)\b")
    found += names(source, r"(dill|cloudpickle|joblib|marshal|shelve)\b")
    found += names(
        source, r"(os\.(system|popen)|yaml\.(load|load_all|unsafe_load|full_load)|torch\.serialization\.add)\b"
    )
    found += names(source, r".*\b(broadcast_object_list|(all_)?gather_object|scatter_object_list)$")
    forbidden = {("weights_only", False), ("shell", True), ("allow_pickle", True)}
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec"):
            found.append(f"{source.path}:{node.lineno} uses {node.func.id}")
        for keyword in node.keywords:
            value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
            if (keyword.arg, value) in forbidden:
                found.append(f"{source.path}:{node.lineno} passes {keyword.arg}={value}")
    return found


def length(source: Source) -> list[str]:
    """No file is longer than 500 lines."""
    lines = len(source.text.splitlines())
    return [f"{source.path} has {lines} lines, over {LONGEST_FILE}"] if lines > LONGEST_FILE else []


RULES = {
    communication: LIBRARY,
    environment: LIBRARY,
    randomness: LIBRARY,
    safety: (*LIBRARY, *PROGRAMS),
    length: (*LIBRARY, *PROGRAMS, "tests"),
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps(rule):
    found = [problem for source in sources(*RULES[rule]) for problem in rule(source)]
    assert not found, f"{rule.__doc__}\n" + "\n".join(found)


LONG = "x = 1\n" * (LONGEST_FILE + 1)


@pytest.mark.parametrize(
    ("rule", "violation", "near_miss"),
    [
        (communication, "import torch.distributed as dist", "import torch.distributions"),
        (communication, "from torch.distributed import all_reduce", "from torch import nn"),
        (communication, "from torch import distributed", "distributed = True"),
        (communication, "import torch\ntorch.distributed.barrier()", "import torch\ntorch.zeros(1)"),
        (communication, "from megatron.core import parallel_state", "from megatron.core import tensor_parallel"),
        (communication, "import megatron.core as mc\nmc.parallel_state.x()", "parallel_states = 1"),
        (environment, "import os\nos.environ['A']", "import os\nos.path.join('a')"),
        (environment, "from os import environ", "from os import replace"),
        (environment, "import os as o\no.getenv('A')", "class A:\n    environ = 1\nA.environ"),
        (randomness, "import torch\ntorch.randn(3)", "from megacogvx import draws\ndraws.normal((3,), 0, 'a')"),
        (randomness, "import torch\ntorch.rand_like(x)", "import torch\ntorch.random_projection(x)"),
        (randomness, "import torch as t\nt.manual_seed(1)", "import torch\ntorch.nn.init.zeros_(x)"),
        (randomness, "import numpy as np\nnp.random.rand(3)", "import numpy as np\nnp.arange(3)"),
        (randomness, "from torch import nn\nnn.init.xavier_uniform_(w)", "from torch import nn\nnn.init.ones_(w)"),
        (randomness, "import random", "randomness = 1"),
        (safety, "import pickle", "pickled = 1"),
        (safety, "from torch.distributed import broadcast_object_list", "from torch.distributed import broadcast"),
        (safety, "import yaml\nyaml.load(text)", "import yaml\nyaml.safe_load(text)"),
        (safety, "torch.load(path, weights_only=False)", "torch.load(path, weights_only=True)"),
        (safety, "subprocess.run(line, shell=True)", "subprocess.run(words)"),
        (safety, "import numpy\nnumpy.load(path, allow_pickle=True)", "import numpy\nnumpy.load(path)"),
        (safety, "import os\nos.system('ls')", "import os\nos.cpu_count()"),
        (safety, "eval(text)", "model.eval()"),
        (length, LONG, LONG.removesuffix("x = 1\n")),
    ],
)
def test_a_rule_sees(rule, violation, near_miss):
    assert rule(Source("megacogvx/room/module.py", violation))
    assert not rule(Source("megacogvx/room/module.py", near_miss))


@pytest.mark.parametrize(
    ("rule", "text", "allowed", "forbidden"),
    [
        (communication, "import torch.distributed", "megacogvx/parallel/groups.py", "megacogvx/models/parallel/a.py"),
        (communication, "import torch.distributed", "kernels/megacogvx_kernels/causal_halo/__init__.py",
         "kernels/megacogvx_kernels/packed_attention/__init__.py"),
        (environment, "from os import environ", "megacogvx/cli.py", "megacogvx/parallel/config.py"),
        (randomness, "import random", "megacogvx/draws.py", "megacogvx/data/planner.py"),
        (safety, "import pickle", "megacogvx/checkpoint/reading.py", "megacogvx/checkpoint/distributed.py"),
    ],
)  # fmt: skip
def test_a_rule_knows_its_rooms(rule, text, allowed, forbidden):
    assert not rule(Source(allowed, text))
    assert rule(Source(forbidden, text))


# -------------------------------------------------------------------------------------------- whole house


def test_the_rules_read_the_whole_library():
    paths = {source.path for source in sources(*LIBRARY)}
    assert {"megacogvx/config.py", "megacogvx/parallel/groups.py"} <= paths
    assert "kernels/megacogvx_kernels/packed_attention/reference.py" in paths


def test_kernels_is_no_package():
    assert not (PROJECT / "kernels" / "__init__.py").exists()


def test_every_folder_of_the_library_is_a_package():
    folders = {(PROJECT / source.path).parent for source in sources(*LIBRARY)}
    assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


def mirrored(test: str) -> tuple[str, str]:
    """Return the module and the package, either of which `tests/unit/<path>/test_<module>.py` may mirror."""
    folder, name = test.removeprefix("tests/unit/").rsplit("/", 1) if test.count("/") > 2 else ("", Path(test).name)
    module = "/".join(part for part in ("megacogvx", folder, name.removeprefix("test_").removesuffix(".py")) if part)
    return f"{module}.py", f"{module}/__init__.py"


def test_every_unit_test_mirrors_a_module():
    tests = [source.path for source in sources("tests/unit") if source.path not in SUITE_WIDE]
    orphans = [test for test in tests if not any((PROJECT / module).exists() for module in mirrored(test))]
    assert not orphans, (
        f"tests/unit/<path>/test_<module>.py mirrors megacogvx/<path>/<module>.py; these don't: {orphans}"
    )


def test_mirrored_names():
    assert mirrored("tests/unit/test_log.py")[0] == "megacogvx/log.py"
    assert mirrored("tests/unit/data/indexed/test_reader.py")[0] == "megacogvx/data/indexed/reader.py"


def test_tests_have_no_packages():
    assert [source.path for source in sources("tests") if source.path.endswith("__init__.py")] == []


def module_names(tree: ast.Module) -> set[str]:
    """Return the names that a module's own statements bind: functions, classes, assignments, imports."""
    found = {alias for node in tree.body for _, _, alias in _imports(node)}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_has_what_the_command_line_asks_for(verb):
    file = PROJECT / (VERBS[verb][0].replace(".", "/") + ".py")
    assert file.exists(), f"megacogvx {verb}: {file} does not exist"
    missing = {"add_arguments", "run", "EXAMPLE"} - module_names(ast.parse(file.read_text()))
    assert not missing, f"megacogvx {verb}: {file} lacks {missing}"


def test_every_verb_is_listed():
    listed = {module.replace(".", "/") + ".py" for module, _ in VERBS.values()}
    verbs = {source.path for source in sources("megacogvx") if "add_arguments" in module_names(source.tree)}
    assert verbs <= listed, f"modules with add_arguments that no verb of megacogvx/cli.py names: {verbs - listed}"
